"""Writes golden vectors: inputs, and what numerics makes of them, for csrc/tests/replay.cpp. See there for the layout.

    python tests/ops/native/golden.py golden.bin

Values that lie within rounding of a threshold are left out by taking another seed: the rest is equal everywhere.
"""

import itertools
import math
import struct
import sys
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from bitquest.numerics.estimators import Clip, StraightThrough, Trust
from bitquest.numerics.fake_quant import dequantize, encode, fake_quantize_forward
from bitquest.numerics.grids import FP4, TERNARY, CodebookGrid, Grid, UniformGrid
from bitquest.numerics.integers import integer_form, integer_linear, weight_only_linear
from bitquest.numerics.packing import pack
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import rotation_from_block
from bitquest.numerics.scaling import EPSILON, AbsMax, GaussianMSE, PerGroup, PerRow
from bitquest.numerics.sparsity import NofM
from bitquest.ops import native_abi as abi

QUANTIZE, MASK_ROTATE, DEQUANTIZE, LINEAR = 1, 2, 3, 4
NOTHING = torch.empty(0, dtype=torch.uint8)


def write(file: BinaryIO, kind: int, name: str, integers: list[int], floats: list[float], arrays: list[Tensor]) -> None:
    text = name.encode()
    file.write(struct.pack("<qq", kind, len(text)) + text)
    file.write(struct.pack(f"<q{len(integers)}q", len(integers), *integers))
    file.write(struct.pack(f"<q{len(floats)}f", len(floats), *floats))
    file.write(struct.pack("<q", len(arrays)))
    for array in arrays:
        data = array.contiguous().view(torch.uint8).numpy().tobytes() if array.numel() else b""
        file.write(struct.pack("<q", len(data)) + data)


def bits_of(mask: Tensor) -> Tensor:
    return pack(mask.to(torch.int8) - 1, 1)


def clear_of_thresholds(x: Tensor, step: Tensor, quantizer: Quantizer, block: int) -> bool:
    grid, limits = quantizer.grid, quantizer.estimator.range(quantizer.grid)
    t = rotation_from_block(block).apply(x).double().unflatten(-1, (step.shape[-1], -1)) / step.double().unsqueeze(-1)
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    bounds = (levels[1:] + levels[:-1]) / 2
    if limits is None:  # the mask turns at level ± threshold
        reach = quantizer.estimator.threshold(grid)  # type: ignore[union-attr]
        bounds = torch.cat([bounds, levels - reach, levels + reach])
    else:
        bounds = torch.cat([bounds, torch.tensor([limit for limit in limits if math.isfinite(limit)])])
    return bool(((t.unsqueeze(-1) - bounds).abs().amin(-1) > 2e-5 * (t.abs() / 16).clamp(min=1)).all())


def quantize(file: BinaryIO, quantizer: Quantizer, block: int, rows: int, width: int, dtype: torch.dtype) -> None:
    for seed in itertools.count():
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, width, generator=generator).to(dtype)
        codes, step, _ = encode(x, quantizer, rotation_from_block(block))
        if clear_of_thresholds(x, step, quantizer, block):
            break
    grid, form = quantizer.grid, integer_form(quantizer.grid)
    mask = fake_quantize_forward(x, quantizer, rotation_from_block(block)).mask
    mask = mask if mask.numel() else torch.ones(rows, width, dtype=torch.bool)
    factors = NOTHING if form is None else form.of_codes(codes)
    groups = step.shape[-1]
    sums = NOTHING if form is None else factors.unflatten(-1, (groups, -1)).sum(-1, dtype=torch.int32)
    level = middle = integer = NOTHING
    if isinstance(grid, CodebookGrid):
        level = torch.tensor(grid.levels)
        middle = (level[1:] + level[:-1]) / 2
        integer = NOTHING if form is None else torch.tensor(form.table, dtype=torch.int8)
    limits = quantizer.estimator.range(grid)
    by_range = limits is not None
    low, high = limits if limits is not None else (0.0, quantizer.estimator.threshold(grid))  # type: ignore[union-attr]
    gaussian = isinstance(quantizer.scale, GaussianMSE)
    integers = [grid.bits, level.numel(), block, abi.SCALE_GAUSSIAN if gaussian else abi.SCALE_ABSMAX]
    integers += [width // groups if groups > 1 else 0, abi.MASK_RANGE if by_range else abi.MASK_DISTANCE]
    integers += [{torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[dtype], rows, width]
    floats = [grid.clip_multiplier if gaussian else 1.0, EPSILON, grid.max_level, low, high]
    wanted = [factors, pack(codes, grid.bits), bits_of(mask), sums, step]
    name = f"quantize {quantizer} block {block} ({rows}, {width}) {dtype}"
    write(file, QUANTIZE, name, integers, floats, [level, middle, integer, x, *wanted])


def linear(file: BinaryIO, w: Quantizer, x: Quantizer | None, tokens: int, channels: int, width: int) -> None:
    plain = rotation_from_block(1)
    generator = torch.Generator().manual_seed(width)
    floats, bias = torch.randn(tokens, width, generator=generator), torch.randn(channels, generator=generator)
    codes, step, kept = encode(torch.randn(channels, width, generator=generator), w, plain)
    form = integer_form(w.grid)
    assert form is not None
    integer = NOTHING if form.table is None else torch.tensor((*form.table, *[0] * (2**form.bits - len(form.table))))
    weight = [pack(codes, w.bits), integer.to(torch.int8), NOTHING if kept is None else kept, step, bias]
    factors = form.of_codes(codes, kept)
    if x is None:
        y = weight_only_linear(floats, factors, step, form)
        activation, exact = [NOTHING, NOTHING, NOTHING, NOTHING, floats], NOTHING
        x_bits, x_uniform, x_form, x_groups = abi.FLOAT_INPUT, 0, None, 1
    else:
        x_codes, x_step, _ = encode(floats, x, plain)
        x_form = integer_form(x.grid)
        assert x_form is not None
        x_factors, x_groups = x_form.of_codes(x_codes), x_step.shape[-1]
        y = integer_linear(x_factors, x_step, factors, step, x_form, form)
        groups = max(x_groups, step.shape[-1])
        sums = x_factors.unflatten(-1, (x_groups, -1)).sum(-1, dtype=torch.int32)
        activation = [x_factors, pack(x_codes, 1) if x.bits == 1 else NOTHING, sums, x_step, NOTHING]
        parts = (a.int().unflatten(-1, (groups, -1)) for a in (x_factors, factors))
        exact = torch.einsum("tgk,ngk->tgn", *parts).to(torch.int32)
        x_bits, x_uniform = x.bits, int(x_form.table is None)
    integers = [channels, width, step.shape[-1], w.bits, x_bits, x_uniform, form.factor, form.offset, tokens, x_groups]
    integers += [1, 0] if x_form is None else [x_form.factor, x_form.offset]
    wanted = [form.unit, 1.0 if x_form is None else x_form.unit, 1e-5 * float(y.abs().max())]
    name = f"linear {w} × {x} ({tokens}, {channels}, {width})"
    write(file, LINEAR, name, integers, wanted, [*weight, *activation, exact, y + bias])


def main(path: str) -> None:
    grids: tuple[Grid, ...] = (
        *map(UniformGrid, range(1, 9)),
        TERNARY,
        FP4,
        CodebookGrid("odd", (-1.0, -0.25, 0.5, 2.0)),
    )
    dtypes = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))
    estimators = itertools.cycle((Trust(), Clip(1.3), StraightThrough(), Trust(0.5)))
    with Path(path).open("wb") as file:
        for grid, width in itertools.product(grids, (1, 60, 64, 130, 192, 256)):
            for block in sorted({1, math.gcd(width, 4), math.gcd(width, 32), math.gcd(width, 128)}):
                quantize(file, Quantizer(grid, estimator=next(estimators)), block, 2, width, next(dtypes))
            if width % 64 == 0:
                grouped = Quantizer(
                    grid, PerGroup(32 if width == 64 else 64), AbsMax() if width == 192 else GaussianMSE()
                )
                quantize(file, grouped, 16, 3, width, next(dtypes))
        for width, block in ((1, 1), (60, 4), (130, 2), (192, 64), (256, 128)):
            gradient, mask = torch.randn(5, width), torch.rand(5, width) > 0.5
            rotated = rotation_from_block(block).inverse(gradient * mask)
            arrays = [gradient, bits_of(mask), rotated]
            write(file, MASK_ROTATE, f"mask_rotate ({width}) block {block}", [5, width, block], [], arrays)
        for grid, width in itertools.product(grids, (1, 60, 66)):
            codes = (torch.randint(0, len(grid.levels), (4, width)) - 2 ** (grid.bits - 1)).to(torch.int8)
            step = torch.rand(4, 2 if width % 2 == 0 else 1)
            levels = torch.tensor((*grid.levels, *[0.0] * (2**grid.bits - len(grid.levels))))
            arrays = [pack(codes, grid.bits), levels, step, dequantize(codes, step, grid)]
            write(file, DEQUANTIZE, f"dequantize {grid} ({width})", [grid.bits, step.shape[1], 4, width], [], arrays)
        pairs: list[tuple[Grid, Grid | None]] = [(UniformGrid(b), UniformGrid(b)) for b in range(1, 9)]
        pairs += [(UniformGrid(w), UniformGrid(x)) for w, x in ((1, 2), (1, 4), (2, 4), (1, 8), (2, 8), (3, 8), (4, 8))]
        pairs += [(TERNARY, UniformGrid(8)), (TERNARY, TERNARY), (FP4, FP4)]
        pairs += [(UniformGrid(b), None) for b in range(1, 9)] + [(TERNARY, None)]
        shapes = ((1, 1, 1), (1, 33, 70), (3, 19, 129), (2, 40, 512), (9, 16, 64))
        for (w, x), (tokens, channels, width) in itertools.product(pairs, shapes):
            linear(file, Quantizer(w), None if x is None else Quantizer(x), tokens, channels, width)
        for w, x in pairs:
            grouped = PerGroup(64)
            activation = None if x is None else Quantizer(x, grouped)
            linear(file, Quantizer(w, grouped), activation, 3, 20, 192)
            if x is not None:
                linear(file, Quantizer(w, grouped), Quantizer(x, PerRow()), 2, 7, 192)
            if integer_form(w).offset == 0:  # type: ignore[union-attr]
                sparse = Quantizer(w, sparsity=NofM(2, 4))
                linear(file, sparse, None if x is None else Quantizer(x), 2, 18, 196)


if __name__ == "__main__":
    main(sys.argv[1])

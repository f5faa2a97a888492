"""Rows to codes and back in native code, on every instruction set here, against the definition in numerics."""

import itertools
import math

import pytest
import torch

from bitquest.errors import ConfigError
from bitquest.numerics.estimators import ALL_ESTIMATORS, Clip, Trust, passes_everything
from bitquest.numerics.fake_quant import dequantize, encode, fake_quantize_forward
from bitquest.numerics.grids import ALL_GRIDS, FP4, TERNARY, CodebookGrid, UniformGrid
from bitquest.numerics.integers import integer_form
from bitquest.numerics.packing import pack, unpack
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import rotation_from_block
from bitquest.numerics.scaling import AbsMax, AbsMean, GaussianMSE, PerGroup, PerRow, PerTensor
from bitquest.numerics.sparsity import NofM
from bitquest.ops import native
from bitquest.ops.rows import RMSNorm, SwiGLU, apply_prologue

EVERYTHING = frozenset({"factors", "packed", "mask", "sums"})
WIDTHS = (1, 5, 32, 60, 64, 96, 130, 288, 576)


def rows(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    x[0, 0] *= 30  # something to clip
    return x


def blocks(width: int) -> list[int]:
    return [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if width % n == 0]


def bits_of(mask: torch.Tensor) -> torch.Tensor:
    return pack(mask.to(torch.int8) - 1, 1)


def check(x: torch.Tensor, quantizer: Quantizer, block: int, step: torch.Tensor | None = None) -> int:
    """Codes are the reference's but where x/Δ is within 1e-5 of a threshold; the rest follows from them, exactly."""
    made = native.quantize_rows(x, quantizer, block, frozenset({"packed", "mask"}), step)
    grid, width, rotation = quantizer.grid, x.shape[1], rotation_from_block(block)
    wanted = encode(x, quantizer, rotation, step)
    torch.testing.assert_close(made.step, wanted.step, rtol=2e-6, atol=0)
    codes = unpack(made.packed, grid.bits, width)
    groups = wanted.step.shape[-1]
    exact = rotation.apply(x).double().unflatten(-1, (groups, -1)) / made.step.double().unsqueeze(-1)
    exact = exact.flatten(-2)
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    thresholds = (levels[1:] + levels[:-1]) / 2
    # Rounding moves a rotated value in proportion to its size: 1e-5 up to 32 steps, beyond all thresholds up to 6 bits.
    near = (exact.unsqueeze(-1) - thresholds).abs().amin(-1) <= 1e-5 * (exact.abs() / 32).clamp(min=1)
    differs = codes != wanted.codes
    assert not (differs & ~near).any()
    assert ((codes.int() - wanted.codes).abs() <= 1).all()
    if passes_everything(quantizer.estimator, grid):
        assert made.mask.numel() == 0
    else:
        reference = fake_quantize_forward(x, quantizer, rotation, step).mask
        mask = unpack(made.mask, 1, width) == 0
        limits = quantizer.estimator.range(grid)
        if limits is None:
            value = torch.tensor(grid.levels, dtype=torch.float64)[codes.long() + 2 ** (grid.bits - 1)]
            edge = ((value - exact).abs() - quantizer.estimator.threshold(grid)).abs()
        else:
            edge = torch.minimum((exact - limits[0]).abs(), (exact - limits[1]).abs())
        assert not ((mask != reference) & (edge > 1e-5 * (exact.abs() / 32).clamp(min=1)) & ~differs).any()
    form = integer_form(grid)
    if form is not None:
        again = native.quantize_rows(x, quantizer, block, EVERYTHING, step)
        assert torch.equal(again.packed, made.packed)
        assert torch.equal(again.step, made.step)
        assert torch.equal(again.mask, made.mask)
        assert torch.equal(again.factors, form.of_codes(codes))
        assert torch.equal(again.sums, again.factors.unflatten(-1, (groups, -1)).sum(-1, dtype=torch.int32))
    return int(differs.sum())


@pytest.mark.parametrize("grid", ALL_GRIDS, ids=str)
def test_every_grid_width_and_block(isa: str, grid):
    for width in WIDTHS:
        for block in blocks(width):
            check(rows(3, width), Quantizer(grid), block)


@pytest.mark.parametrize("estimator", ALL_ESTIMATORS, ids=str)
def test_every_estimator(isa: str, estimator):
    for grid, width in itertools.product(ALL_GRIDS, (60, 128, 200)):
        check(rows(4, width), Quantizer(grid, estimator=estimator), math.gcd(width, 128))


@pytest.mark.parametrize("scale", [GaussianMSE(), AbsMax(), AbsMean()], ids=str)
def test_every_scale_rule_and_granularity(isa: str, scale):
    for grid, granularity, width in itertools.product(
        (UniformGrid(1), UniformGrid(4), UniformGrid(8), TERNARY, FP4),
        (PerRow(), PerGroup(32), PerGroup(64), PerGroup(128)),
        (32, 96, 160, 384),
    ):
        size = getattr(granularity, "size", width)
        if width % size or (isinstance(scale, AbsMean) and grid not in (UniformGrid(1), TERNARY)):
            continue
        for block in (1, 16, math.gcd(width, 128)):
            check(rows(3, width), Quantizer(grid, granularity=granularity, scale=scale), block)


def test_a_given_step_replaces_the_scale_rule(isa: str):
    x = rows(4, 192)
    for grid in (UniformGrid(1), UniformGrid(3), TERNARY):
        for step in (torch.full((1, 1), 0.37), torch.rand(4, 1) + 0.1):
            check(x, Quantizer(grid, granularity=PerTensor() if step.shape[0] == 1 else PerRow()), 64, step)
        for step in (torch.rand(4, 6) + 0.1, torch.rand(1, 6) + 0.1):
            made = native.quantize_rows(x, Quantizer(grid, granularity=PerGroup(32)), 32, EVERYTHING, step)
            whole = step.expand(4, -1)
            codes = encode(x, Quantizer(grid, granularity=PerGroup(32)), rotation_from_block(32), whole).codes
            assert torch.equal(made.packed, pack(codes, grid.bits))


def test_thresholds_round_half_to_even_and_codebooks_go_down(isa: str):
    for grid in ALL_GRIDS:
        levels = torch.tensor(grid.levels)
        x = torch.cat([(levels[1:] + levels[:-1]) / 2, levels, levels * 3, torch.zeros(1)]).unsqueeze(0) * 0.25
        step = torch.full((1, 1), 0.25)  # a power of two: every quotient is exact
        for estimator in ALL_ESTIMATORS:
            quantizer = Quantizer(grid, estimator=estimator)
            made = native.quantize_rows(x, quantizer, 1, frozenset({"packed", "mask"}), step)
            assert torch.equal(made.packed, pack(encode(x, quantizer, rotation_from_block(1), step).codes, grid.bits))
            mask = fake_quantize_forward(x, quantizer, rotation_from_block(1), step).mask
            assert torch.equal(made.mask, bits_of(mask) if mask.numel() else made.mask[:0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_in_exactly(isa: str, dtype: torch.dtype):
    for width, bits in itertools.product((60, 128, 300), (1, 4, 8)):
        x = rows(3, width).to(dtype)
        x[0, 1], x[0, 2] = 1e-6, 0  # subnormal in float16
        quantizer, block = Quantizer(UniformGrid(bits)), math.gcd(width, 128)
        half = native.quantize_rows(x, quantizer, block, EVERYTHING)
        full = native.quantize_rows(x.float(), quantizer, block, EVERYTHING)
        assert all(torch.equal(a, b) for a, b in zip(half, full, strict=True))


def test_rows_apart_from_each_other_and_no_rows(isa: str):
    wide = rows(5, 200)
    quantizer = Quantizer(UniformGrid(3))
    apart = native.quantize_rows(wide[:, :96], quantizer, 32, EVERYTHING)
    packed = native.quantize_rows(wide[:, :96].contiguous(), quantizer, 32, EVERYTHING)
    assert all(torch.equal(a, b) for a, b in zip(apart, packed, strict=True))
    none = native.quantize_rows(wide[:0], quantizer, 8, EVERYTHING)
    assert [part.shape[0] for part in none] == [0] * 5
    assert native.rotate(wide[:0], 8).shape == (0, 200)


def test_zeros_and_what_is_no_number(isa: str):
    for grid in ALL_GRIDS:
        made = native.quantize_rows(torch.zeros(2, 70), Quantizer(grid), 2, frozenset({"packed", "mask"}))
        wanted = encode(torch.zeros(2, 70), Quantizer(grid), rotation_from_block(2))
        assert torch.equal(made.packed, pack(wanted.codes, grid.bits))
        torch.testing.assert_close(made.step, wanted.step)
        # A NaN or an infinity spoils its own row: some code of the grid, no gradient, and no other row.
        x = rows(3, 70)
        x[1, 9] = math.nan
        spoilt = native.quantize_rows(x, Quantizer(grid, estimator=Clip()), 1, frozenset({"packed", "mask"}))
        x[1] = 0
        clean = native.quantize_rows(x, Quantizer(grid, estimator=Clip()), 1, frozenset({"packed", "mask"}))
        for row in (0, 2):
            assert torch.equal(spoilt.packed[row], clean.packed[row])
        assert not spoilt.mask[1].any()
        for scale in (GaussianMSE(), AbsMax()):
            for granularity, groups in ((PerRow(), 1), (PerGroup(32), 2)):
                quantizer = Quantizer(grid, granularity=granularity, scale=scale)
                x[1, 9] = math.nan
                step = native.quantize_rows(x[:, :64], quantizer, 1, frozenset({"packed"})).step
                assert step.isnan().tolist() == [[row == 1 and g == 0 for g in range(groups)] for row in range(3)]
        codes = unpack(spoilt.packed, grid.bits, 70).int() + 2 ** (grid.bits - 1)
        assert (codes < 2**grid.bits).all()


def test_any_number_of_threads_gives_the_same_bits(isa: str):
    x, quantizer = rows(37, 288), Quantizer(UniformGrid(4))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results += [native.quantize_rows(x, quantizer, 32, EVERYTHING) for _ in range(20)]
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotation_alone_and_the_way_back_for_gradients(isa: str, dtype: torch.dtype):
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for width in WIDTHS:
        x = rows(3, width).to(dtype)
        mask = torch.rand(3, width) > 0.3
        for block in blocks(width):
            rotation = rotation_from_block(block)
            torch.testing.assert_close(native.rotate(x, block), rotation.apply(x), rtol=3e-6, atol=3e-6)
            back = native.mask_rotate(x, bits_of(mask), block)
            wanted = rotation.inverse(x.float() * mask)
            assert back.dtype == dtype
            torch.testing.assert_close(back.float(), wanted, rtol=tolerance, atol=tolerance)
            assert torch.equal(native.mask_rotate(x, bits_of(mask), block, torch.float32).to(dtype), back)
            passed = native.mask_rotate(x, None, block, torch.float32)
            torch.testing.assert_close(passed, rotation.inverse(x.float()), rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_become_values_again(isa: str, dtype: torch.dtype):
    for grid, width in itertools.product(ALL_GRIDS, (1, 33, 64, 200)):
        codes = torch.randint(0, len(grid.levels), (3, width)) - 2 ** (grid.bits - 1)
        codes = codes.to(torch.int8)
        steps = [torch.rand(3, 1) + 0.1, torch.rand(1, 1)] + ([torch.rand(3, 2)] if width % 2 == 0 else [])
        for step in steps:
            values = native.dequantize_rows(pack(codes, grid.bits), step, grid, width, dtype)
            assert torch.equal(values, dequantize(codes, step, grid).to(dtype))


def test_norm_and_gate_are_fused_before_the_rotation(isa: str):
    for width, dtype in itertools.product((60, 128, 300), (torch.float32, torch.bfloat16)):
        x, up, weight = rows(3, width).to(dtype), rows(3, width, 1).to(dtype), rows(1, width, 2)[0].exp()
        x[1, :4] = torch.tensor([-80.0, 80.0, 0.0, -20.0])
        for prologue in (RMSNorm(weight, 1e-5), SwiGLU(up)):
            wanted = apply_prologue(x, prologue)
            torch.testing.assert_close(native.rotate(x, 1, prologue), wanted, rtol=1e-6, atol=1e-30)
            block = math.gcd(width, 128)
            # The codes are those of the rows behind the prologue, but where its last bit decides.
            fused = native.quantize_rows(x, Quantizer(UniformGrid(4)), block, EVERYTHING, prologue=prologue)
            apart = native.quantize_rows(wanted, Quantizer(UniformGrid(4)), block, EVERYTHING)
            torch.testing.assert_close(fused.step, apart.step, rtol=1e-6, atol=0)
            assert (fused.factors != apart.factors).sum() <= 1
            plain = native.rotate(native.rotate(x, 1, prologue), block)
            assert torch.equal(native.rotate(x, block, prologue), plain)


def test_what_is_refused_says_why(isa: str):
    x = rows(2, 256)
    want = frozenset({"factors"})
    for quantizer, block, words in (
        (Quantizer(UniformGrid(4)), 256, "blocks of 128"),
        (Quantizer(UniformGrid(4)), 3, "blocks of 3"),
        (Quantizer(UniformGrid(4), sparsity=NofM(2, 4)), 32, "sparsity"),
        (Quantizer(UniformGrid(4), granularity=PerTensor()), 32, "whole tensor"),
        (Quantizer(CodebookGrid("odd", (-1.0, 0.3, 1.0))), 32, "no integers"),
    ):
        with pytest.raises(ConfigError, match=words):
            native.quantize_rows(x, quantizer, block, want)
    with pytest.raises(ConfigError, match="float64"):
        native.quantize_rows(x.double(), Quantizer(), 1, want)
    with pytest.raises(ConfigError, match=r"shape \(256,\)"):
        native.quantize_rows(x[0], Quantizer(), 1, want)
    with pytest.raises(ConfigError, match="the step has shape"):
        native.quantize_rows(x, Quantizer(), 1, want, torch.ones(2, 2))
    with pytest.raises(ConfigError, match="the mask has shape"):
        native.mask_rotate(x, torch.zeros(2, 31, dtype=torch.uint8), 1)
    with pytest.raises(ConfigError, match="blocks of 256"):
        native.rotate(x, 256)


def test_rounding_is_the_reference_s_at_full_width(isa: str):
    """Without a rotation nothing but the division separates the two; on 4 · 8192 values no code differs."""
    x = rows(4, 8192)
    for bits in range(1, 9):
        quantizer = Quantizer(UniformGrid(bits), estimator=Trust())
        step = encode(x, quantizer, rotation_from_block(1)).step
        assert check(x, quantizer, 1, step) == 0

"""The warpgroup kernels themselves, compiled by g++ against the model of Hopper in hopper_model/: exact products."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from bitquest.numerics.grids import UniformGrid
from bitquest.numerics.integers import integer_form, integer_linear
from bitquest.numerics.packing import pack
from bitquest.numerics.sparsity import NofM
from bitquest.ops.cuda import sparse
from bitquest.ops.cuda.hopper import OUTPUTS, TILES, Tile, plan
from bitquest.ops.cuda.planes import plane_sums, planes_of, split_planes

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "src" / "bitquest" / "ops" / "cuda" / "kernels"


def build(main: str, macros: tuple[str, ...], folder: Path) -> Path:
    """The model's program, compiled."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: the kernels cannot be compiled for the CPU")
    made = folder / Path(main).stem
    command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-Wno-clobbered", f"-I{HERE / 'hopper_model'}", f"-I{KERNELS}", *macros]
    built = subprocess.run(
        [*command, str(HERE / "hopper_model" / main), "-o", str(made)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return made


def run(program: Path, parts: list[np.ndarray]) -> bytes:
    """The program's output; its complaint is the failure."""
    ended = subprocess.run([str(program)], input=b"".join(part.tobytes() for part in parts), capture_output=True)
    assert ended.returncode == 0, f"{ended.returncode}: {ended.stderr.decode()[-2000:]}"
    return ended.stdout


def padded(planes: torch.Tensor) -> np.ndarray:
    """Planes in rows of whole 16 bytes, garbage behind the last: the copy engine must not read it."""
    return np.pad(planes.numpy(), ((0, 0), (0, 0), (0, -planes.shape[-1] % 16)), constant_values=0xFF)


def check(program: Path, tile: Tile, bits: tuple[int, int], out: torch.dtype, shape: tuple[int, int, int], seed: int):
    """One product under the model, every result compared. `seed` draws data, order of events and their lateness."""
    tokens, channels, width = shape
    generator = torch.Generator().manual_seed(seed)
    operands = []
    for rows, b in ((tokens, bits[0]), (channels, bits[1])):
        codes = torch.randint(-(2 ** (b - 1)), 2 ** (b - 1), (rows, width), generator=generator, dtype=torch.int8)
        planes = planes_of(pack(codes, b), b, width)
        operands.append((2 * codes.double() + 1, padded(planes), plane_sums(planes, width)))
    (x, x_rows, x_sums), (w, w_rows, w_sums) = operands
    x_step, w_step, bias = (torch.randn(n, generator=generator) for n in (tokens, channels, channels))
    made = plan(tokens, channels, width, bits, OUTPUTS[out], tile, multiprocessors=4)
    geometry = [made.steps, made.tile_rows, made.tile_columns, made.grid, made.shared_bytes, made.x_box, made.w_box]
    head = np.array([*shape, x_rows.shape[2], w_rows.shape[2], seed % 3 > 0, seed, *geometry], dtype=np.int32)
    floats = [values.numpy() for values in (x_step, w_step, x_sums, w_sums, bias)]
    output = bytearray(run(program, [head, x_rows, w_rows, *floats]))
    dot = x @ w.t()
    expected = dot.to(torch.int32)
    if out != torch.int32:
        value = dot.float() * (x_step * 0.25).unsqueeze(1) * w_step
        expected = (value + bias if seed % 3 else value).to(out)
    assert torch.equal(torch.frombuffer(output, dtype=out).reshape(tokens, channels), expected)


# Odd seeds run products late, every other pair of seeds lets copies land at once (hopper_model/*_main.cpp).
SEEDS = (pytest.param((0, 1)), pytest.param(tuple(range(2, 18)), marks=pytest.mark.slow))

WIDE, SPLIT, NARROW, SMALL = TILES
# Tile, bits of (x, w), type of y, shapes (T, N, K): tails of every kind, several tiles a block, one step and many.
CASES = (
    (WIDE, (1, 1), torch.bfloat16, ((300, 400, 1300), (1, 8, 1), (520, 600, 6200))),
    (SPLIT, (2, 2), torch.int32, ((513, 200, 1030),)),
    (NARROW, (2, 1), torch.float16, ((70, 131, 2050), (257, 1, 129))),
    (SMALL, (1, 2), torch.float32, ((65, 257, 1024), (600, 33, 24))),
    (WIDE._replace(cluster=1), (2, 2), torch.bfloat16, ((129, 200, 640),)),
)


@pytest.mark.parametrize("seeds", SEEDS, ids=str)
@pytest.mark.parametrize(("tile", "bits", "out", "shapes"), CASES, ids=lambda value: str(value).replace("torch.", ""))
def test_products_are_exact_whatever_comes_late(tile, bits, out, shapes, seeds, tmp_path):
    whole = {channels % 8 == 0 for _, channels, _ in shapes}
    for is_whole in whole:
        macros = plan(1, 8 if is_whole else 1, 1, bits, OUTPUTS[out], tile, multiprocessors=4).options
        program = build("b1_main.cpp", macros, tmp_path)
        for shape in shapes:
            for seed in seeds:
                if (shape[1] % 8 == 0) == is_whole:
                    check(program, tile, bits, out, shape, seed)


def check_sparse(program: Path, tile: Tile, bits: int, pattern: NofM, out: torch.dtype, shape, seed: int):
    """A product of activations of `bits` bits with a sparse 4-bit weight under the model, every result compared."""
    tokens, channels, width = shape
    generator = torch.Generator().manual_seed(seed)
    forms, factors = [integer_form(UniformGrid(b)) for b in (bits, 4)], []
    for form, rows, b in zip(forms, (tokens, channels), (bits, 4), strict=True):
        codes = torch.randint(-(2 ** (b - 1)), 2 ** (b - 1), (rows, width), generator=generator, dtype=torch.int8)
        factors.append(form.of_codes(codes))
    kept = pattern.kept(torch.randn(channels, width, generator=generator))
    weight = sparse.prepare_sparse_weight(factors[1], kept, pattern.pair)
    x = sparse.arrange_activation(factors[0], pattern.pair)
    x_step, w_step, bias = (torch.randn(n, generator=generator) for n in (tokens, channels, channels))
    made = sparse.sparse_plan(tokens, channels, width, bits == 8, OUTPUTS[out], tile, multiprocessors=4)
    rows = [padded(values.view(torch.uint8)[None]) for values in (x, weight.values)]
    geometry = [made.steps, made.tile_rows, made.tile_columns, made.grid, made.shared_bytes, made.x_box, made.w_box]
    head = np.array([*shape, rows[0].shape[2], rows[1].shape[2], seed % 3 > 0, seed, *geometry], dtype=np.int32)
    unit = np.array([forms[0].unit * forms[1].unit], dtype=np.float32)
    rest = [values.numpy() for values in (weight.places, x_step, w_step, weight.sums, bias)]
    output = bytearray(run(program, [head, unit, *rows, *rest]))
    if out == torch.int32:
        dot = (forms[0].factor * factors[0].double() + forms[0].offset) @ (factors[1] * kept).double().t()
        expected = dot.to(torch.int32)
    else:
        steps = x_step.unsqueeze(1), w_step.unsqueeze(1)
        expected = integer_linear(factors[0], steps[0], factors[1] * kept, steps[1], *forms)
        expected = (expected + bias if seed % 3 else expected).to(out)
    assert torch.equal(torch.frombuffer(output, dtype=out).reshape(tokens, channels), expected)


HALVES, OWN, LITTLE = sparse.TILES
PAIRS, FOURS = NofM(2, 4, pair=True), NofM(2, 4)
# Tile, bits of x, pattern, type of y, shapes (T, N, K).
SPARSE_CASES = (
    (HALVES, 4, PAIRS, torch.bfloat16, ((300, 520, 392), (1, 8, 8))),
    (OWN, 8, FOURS, torch.float16, ((600, 131, 900),)),
    (LITTLE, 8, PAIRS, torch.float32, ((70, 130, 128),)),
    (OWN._replace(cluster=1), 4, NofM(1, 4), torch.int32, ((385, 200, 260),)),
)


@pytest.mark.parametrize("seeds", SEEDS, ids=str)
@pytest.mark.parametrize(
    ("tile", "bits", "pattern", "out", "shapes"), SPARSE_CASES, ids=lambda value: str(value).replace("torch.", "")
)
def test_sparse_products_are_exact_whatever_comes_late(tile, bits, pattern, out, shapes, seeds, tmp_path):
    whole = shapes[0][1] % 8 == 0
    macros = sparse.sparse_plan(1, 8 if whole else 1, 1, bits == 8, OUTPUTS[out], tile, multiprocessors=4).options
    program = build("sparse_main.cpp", macros, tmp_path)
    for shape in shapes:
        for seed in seeds:
            check_sparse(program, tile, bits, pattern, out, shape, seed)


@pytest.mark.parametrize(("rows", "width", "pitch"), [(5, 130, 33), (300, 512, 128), (37, 1000, 256), (1, 1, 1)])
def test_planes_are_split_as_torch_splits_them(rows, width, pitch, tmp_path):
    codes = torch.randint(-2, 2, (rows, width), dtype=torch.int8)
    packed, expected = pack(codes, 2), split_planes(pack(codes, 2), width)
    within = np.pad(packed.numpy(), ((0, 0), (0, pitch - packed.shape[1])), constant_values=0xFF).reshape(-1)
    plane_pitch = expected.stride(1)
    head = np.array([rows, packed.shape[1], pitch, plane_pitch], dtype=np.int32)
    program = build("planes_main.cpp", (), tmp_path)
    output = bytearray(run(program, [head, within[: (rows - 1) * pitch + packed.shape[1]]]))
    made = torch.frombuffer(output, dtype=torch.uint8).reshape(2, rows, plane_pitch)
    assert torch.equal(made[..., : expected.shape[2]], expected)
    assert not made[..., expected.shape[2] :].any()

"""The warpgroup kernels' launchers: tiles and checks everywhere, values on a Hopper GPU (`-m gpu`)."""

import ctypes
import math

import pytest
import torch

from bitquest.errors import ConfigError
from bitquest.numerics.grids import UniformGrid
from bitquest.numerics.integers import integer_form
from bitquest.numerics.packing import pack
from bitquest.numerics.sparsity import NofM
from bitquest.ops.cuda import hopper, sparse
from bitquest.ops.cuda.cache import source
from bitquest.ops.cuda.hopper import (
    TILES,
    aligned_rows,
    b1_linear_hopper,
    b1_product_hopper,
    choose_tile,
    launch_planes,
)
from bitquest.ops.cuda.planes import plane_sums, planes_of


def odd(bits: int, *shape: int, device: str = "cpu") -> torch.Tensor:
    """Random int8 codes of `bits` bits."""
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, dtype=torch.int8, device=device)


def test_every_tile_fits_and_covers():
    for tile in TILES:
        for tokens, channels in ((1, 1), (8192, 8192), (4097, 28672), (17, 100_003)):
            made = hopper.plan(tokens, channels, 1025, (2, 2), 2, tile, multiprocessors=132)
            assert made.shared_bytes <= hopper.SHARED_BYTES
            assert made.steps == 2
            assert made.tile_rows * tile.rows * tile.cluster >= tokens
            assert made.tile_columns * tile.columns >= channels
            assert 0 < made.grid <= 132
            assert made.grid % tile.cluster == 0
            assert max(made.x_box, made.w_box) <= 256


def test_large_products_take_wide_tiles_and_unaligned_rows_narrow_ones():
    assert choose_tile(8192, 8192, 132).columns == 192
    assert choose_tile(8192, 8191, 132).columns == 128
    assert choose_tile(64, 4096, 132).rows == 64


@pytest.mark.parametrize("width", [1, 7, 16, 17, 40])
def test_rows_for_the_copy_engine_keep_their_bytes(width):
    rows = torch.randint(0, 256, (2, 5, width), dtype=torch.uint8)
    made = aligned_rows(rows)
    assert torch.equal(made, rows)
    assert not any(pitch % 16 for pitch in (*made.stride()[:-1], made.data_ptr()))
    assert aligned_rows(made) is made


def test_says_why_it_does_not_run_on_a_cpu():
    bits, sums = pack(odd(1, 3, 16), 1), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ConfigError, match="need a CUDA device, not cpu"):
        b1_product_hopper(bits, sums, bits, sums, 16)


def test_refuses_operands_of_the_wrong_kind():
    bits, sums, step = pack(odd(1, 3, 16), 1), torch.zeros(3, dtype=torch.int32), torch.ones(3, 1)
    with pytest.raises(ConfigError, match=r"uint8 \(1 or 2, rows, 3\) for K = 17"):
        b1_product_hopper(bits, sums, bits, sums, 17)
    with pytest.raises(ConfigError, match=r"row sums of w are int32"):
        b1_product_hopper(bits, sums, bits, sums.long(), 16)
    with pytest.raises(ConfigError, match=r"steps of x are float32"):
        b1_linear_hopper(bits, step[:2], sums, bits, step, sums, 16, out_dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"not torch\.float64"):
        b1_linear_hopper(bits, step, sums, bits, step, sums, 16, out_dtype=torch.float64)


def parameters(file: str) -> list[str]:
    """The types of a kernel's parameters, from its source."""
    text = source(f"{file}.cu")
    start = text.index(f"{file}(GRID_CONSTANT") + len(file) + 1
    return [part.rsplit(None, 1)[0].strip() for part in text[start : text.index(") {", start)].split(",")]


def recorded(monkeypatch, module) -> list[tuple[object, ...]]:
    """Launches on CPU tensors, recorded and not made. A tensor map is the rows and the box it was asked for."""
    launches: list[tuple[object, ...]] = []

    class Recorder:
        def launch(self, grid, block, arguments):
            launches.append((grid, block, *arguments))

    monkeypatch.setattr(module, "check_device", lambda *tensors: torch.device("cuda", 0))
    monkeypatch.setattr(module, "multiprocessors", lambda index: 132)
    monkeypatch.setattr(module, "loaded", lambda *which: Recorder())
    monkeypatch.setattr(module, "tensor_map", lambda rows, box_rows, box_bytes: (rows, box_rows, box_bytes))
    monkeypatch.setattr(module.torch, "empty", lambda *shape, dtype, device: torch.zeros(shape, dtype=dtype))
    return launches


KINDS = {
    "GRID_CONSTANT TensorMap": lambda value: isinstance(value, tuple),
    "u8*": lambda value: value.dtype == torch.bfloat16,
    "const u8*": lambda value: value.dtype == torch.int32,
    "const float*": lambda value: value is None or (value.dtype == torch.float32 and value.is_contiguous()),
    "const int*": lambda value: value.dtype == torch.int32 and value.is_contiguous(),
    "GRID_CONSTANT Work": lambda value: isinstance(value, ctypes.Structure),
}


def test_launches_hand_over_what_the_kernels_take(monkeypatch):
    launches = recorded(monkeypatch, hopper)
    bits = [planes_of(pack(odd(2, rows, 1000), 2), 2, 1000) for rows in (300, 40)]
    sums = [plane_sums(planes, 1000) for planes in bits]
    steps = [torch.rand(rows, 1) for rows in (300, 40)]
    y = launch_planes(bits[0], steps[0], sums[0], bits[1], steps[1], sums[1], 1000, None, torch.bfloat16)
    assert y.shape == (300, 40)
    (made,) = launches
    types = parameters("b1_wgmma")
    assert len(made) == 2 + len(types)
    assert all(KINDS[kind](value) for kind, value in zip(types, made[2:], strict=True)), types
    work = made[-1]
    assert (work.tokens, work.channels, work.width, work.steps) == (300, 40, 1000, 1)
    assert made[5].shape == (300,)
    assert made[6].shape == (40,)
    assert "int tokens, channels, width;" in source("b1_wgmma.cu")
    assert ctypes.sizeof(work) == 24

    launches = recorded(monkeypatch, sparse)
    factors = 2 * torch.randint(-8, 8, (40, 200), dtype=torch.int8) + 1
    weight = sparse.prepare_sparse_weight(factors, NofM(2, 4).kept(factors.float()), False)
    form = integer_form(UniformGrid(4))
    sparse.sparse_linear(odd(4, 300, 200), steps[0], weight, steps[1], form, form, out_dtype=torch.bfloat16)
    (made,) = launches
    types = parameters("s8_sparse_wgmma")
    assert len(made) == 2 + len(types)
    assert all(KINDS[kind](value) for kind, value in zip(types, made[2:], strict=True)), types
    assert made[2][0].shape == (1, 300, 200)
    assert made[3][0].shape == (1, 40, 100)
    assert made[3][2] == 64
    assert made[6].shape == (300,)
    assert (made[-1].tokens, made[-1].channels, made[-1].steps, made[-1].unit) == (300, 40, 2, 0.25)


SHAPES = ((1, 1, 1), (1, 8, 128), (127, 192, 1024), (129, 200, 1030), (300, 1001, 4099), (2048, 4096, 4096))


def guarded_output(monkeypatch) -> list[torch.Tensor]:
    """Outputs lie between guards of NaN bytes, which must stay; what the kernel leaves unwritten is NaN too."""
    made: list[torch.Tensor] = []

    def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        whole = torch.full((size + 2048,), 0xFF, dtype=torch.uint8, device=device)
        made.append(whole)
        return whole[1024 : 1024 + size].view(dtype).view(shape)

    monkeypatch.setattr(hopper.torch, "empty", poisoned)
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_exact_on_the_device(shape, bits, monkeypatch):
    if hopper.refuses(torch.device("cuda")):
        pytest.skip(str(hopper.refuses(torch.device("cuda"))))
    tokens, channels, width = shape
    torch.manual_seed(tokens)
    codes = [odd(b, rows, width, device="cuda") for b, rows in zip(bits, (tokens, channels), strict=True)]
    planes = [planes_of(pack(c, b), b, width) for c, b in zip(codes, bits, strict=True)]
    sums = [plane_sums(p, width) for p in planes]
    exact = (2 * codes[0].double() + 1) @ (2 * codes[1].double() + 1).t()
    x_step, w_step, bias = (torch.randn(n, device="cuda") for n in (tokens, channels, channels))
    scaled = exact.float() * (x_step * 0.25).unsqueeze(1) * w_step + bias
    outputs = guarded_output(monkeypatch)
    for tile in (tile for tile in TILES if channels % 8 == 0 or tile.columns < 192):
        for dtype in (torch.int32, torch.float32, torch.bfloat16, torch.float16):
            steps = (None, None) if dtype == torch.int32 else (x_step, w_step)
            shift = None if dtype == torch.int32 else bias
            made = launch_planes(
                planes[0], steps[0], sums[0], planes[1], steps[1], sums[1], width, shift, dtype, tile=tile
            )
            assert torch.equal(made, (exact if dtype == torch.int32 else scaled).to(dtype)), (tile, dtype)
            assert (outputs[-1][:1024] == 0xFF).all()
            assert (outputs[-1][-1024:] == 0xFF).all()


@pytest.mark.gpu
def test_no_rows_make_no_launch_on_the_device():
    bits, sums = pack(odd(1, 3, 16, device="cuda"), 1), torch.zeros(3, dtype=torch.int32, device="cuda")
    assert b1_product_hopper(bits[:0], sums[:0], bits, sums, 16).shape == (0, 3)

"""The 1-bit products on a GPU, and without one: the kernels' own source on the CPU, emulated, under the sanitizers."""

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.grids import UniformGrid
from bitquest.numerics.integers import integer_form, integer_linear
from bitquest.numerics.packing import pack
from bitquest.ops.cuda import one_bit
from bitquest.ops.cuda.driver import DeviceLimits
from bitquest.ops.cuda.one_bit import B1Weight, Launch, Tile, b1_linear, b1_product, b1_row_sums, launch_of

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "src" / "bitquest" / "ops" / "cuda" / "kernels"
A100 = DeviceLimits(80, 108, 166_912, 167_936)
RTX4090 = DeviceLimits(89, 128, 101_376, 102_400)
H200 = DeviceLimits(90, 132, 232_448, 233_472)
WIDE, SQUARE, SMALL, FLAT = one_bit.TILES
# Every tile; both operations (AND on Hopper) and all types of result among them.
EMULATED = (
    (H200, WIDE, torch.bfloat16),
    (A100, SQUARE, torch.float16),
    (H200, SMALL, torch.int32),
    (RTX4090, FLAT, torch.float32),
)
SHAPES = [
    (1, 1, 1),  # smaller than everything
    (3, 40, 300),  # rows of y of whole 16 bytes: vectors out
    (17, 67, 6145),  # one bit into a seventh tile of 1024: the ring comes round; rows of y of odd length: elements out
    (130, 264, 140),  # a second block both ways
]


@cache
def emulator(options: tuple[str, ...], folder: Path) -> Path:
    """b1_mma.cu with these macros, compiled for the CPU."""
    made = folder / "-".join(option.split("=")[1] for option in options)
    command = ["g++", "-std=c++17", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command += ["-ffp-contract=off", "-w"]
    command += [f"-I{HERE / 'emulator'}", f"-I{KERNELS}", *options, str(HERE / "emulator" / "b1_main.cpp")]
    built = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
    if "cannot find -lasan" in built.stderr or "cannot find -lubsan" in built.stderr:
        pytest.skip("g++ has no sanitizers here")
    assert built.returncode == 0, built.stderr
    return made


class EmulatedFunction:
    """Takes a launch as driver.Function does, and has the emulator carry it out."""

    def __init__(self, program: Path, name: str, shared_bytes: int) -> None:
        self.program, self.name, self.shared_bytes = program, name, shared_bytes

    def launch(self, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: tuple) -> None:
        if self.name == "b1_sums":
            (x, out), w, arrays = arguments[:2], None, ()
            rows, width, *pitches = self.values(arguments[2:], (ctypes.c_int, ctypes.c_int, ctypes.c_int64))
            channels, flags, pitches = 0, (0, 0, 0), [*pitches, 0]
        else:
            x, w, out, *arrays = arguments[:8]
            types = (ctypes.c_int,) * 3 + (ctypes.c_int64,) * 2
            rows, channels, width, *pitches = self.values(arguments[8:], types)
            flags = tuple(arrays[i] is not None for i in (0, 2, 3))
            assert [array is None for array in arrays] == [not flags[i] for i in (0, 0, 1, 2, 2)]
        head = (7, self.name == "b1_mma", grid[0], block[0], self.shared_bytes, rows, channels, width, *pitches, *flags)
        given = np.array(head, dtype=np.int32).tobytes() + b"".join(map(contents, (x, w, *arrays)))
        environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}  # it fails in sandboxes
        ended = subprocess.run([str(self.program)], input=given, capture_output=True, timeout=120, env=environment)
        assert ended.returncode == 0, ended.stderr.decode()[-4000:]
        out.copy_(torch.frombuffer(bytearray(ended.stdout), dtype=out.dtype).reshape(out.shape))

    @staticmethod
    def values(arguments: tuple, types: tuple) -> list[int]:
        assert [type(argument) for argument in arguments] == list(types)
        return [argument.value for argument in arguments]


def contents(tensor: Tensor | None) -> bytes:
    """The memory from a tensor's first element to its last, with garbage between its rows."""
    if tensor is None:
        return b""
    if tensor.dim() == 1:
        assert tensor.is_contiguous()
        return tensor.numpy().tobytes()
    memory = np.full((tensor.shape[0], tensor.stride(0)), 0xFF, dtype=np.uint8)
    memory[:, : tensor.shape[1]] = tensor.numpy()
    return memory.tobytes()[: (tensor.shape[0] - 1) * tensor.stride(0) + tensor.shape[1]]


class Machine:
    """Where the products run: the tensors' device, and a launch for a tile."""

    def __init__(self, device: str, limits: DeviceLimits) -> None:
        self.device, self.limits = device, limits

    def launch(self, tile: Tile) -> Launch:
        launch = launch_of(tile, self.limits)
        if launch is None:
            pytest.skip(f"{tile} does not fit this device")
        return launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def emulated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[DeviceLimits, Tile, torch.dtype], Machine]:
    """Puts an emulated device of these limits in the place of the GPU; it runs one build of b1_mma.cu."""
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("the emulator needs g++ on x86-64")

    def make(limits: DeviceLimits, tile: Tile, dtype: torch.dtype) -> Machine:
        machine = Machine("cpu", limits)
        expected = machine.launch(tile).options(limits.capability >= 90, one_bit.OUTPUTS[dtype])

        def function(name: str, architecture: str, options: tuple[str, ...], shared_bytes: int, device: int):
            assert options == (expected if name == "b1_mma" else ())
            return EmulatedFunction(emulator(expected, folder), name, shared_bytes)

        monkeypatch.setattr(one_bit, "_function", function)
        monkeypatch.setattr(one_bit, "_limits", lambda device: limits)
        monkeypatch.setattr(one_bit, "_device", lambda *tensors: 0)
        return machine

    return make


def bits(rows: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Codes −1 and 0 (rows, K) and their bytes."""
    codes = torch.randint(-1, 1, (rows, width), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    return codes, pack(codes, 1)


def check(machine: Machine, tile: Tile, dtype: torch.dtype, shape: tuple[int, int, int], *, bias: bool) -> None:
    """Product or linear against the definition, bit for bit."""
    tokens, channels, width = shape
    (x, x_bits), (w, w_bits) = bits(tokens, width, 1), bits(channels, width, 2)
    generator = torch.Generator().manual_seed(3)
    x_step, w_step = (torch.rand(n, 1, generator=generator) for n in (tokens, channels))
    shift = torch.randn(channels, generator=generator) if bias else None
    launch = machine.launch(tile)
    there = partial(Tensor.to, device=machine.device)
    form = integer_form(UniformGrid(1))
    assert form is not None
    if dtype == torch.int32:
        ones = torch.ones(1, 1)
        expected = integer_linear(form.of_codes(x), ones, form.of_codes(w), ones * 4, form, form).to(torch.int32)
        y = b1_product(there(x_bits), there(w_bits), width, launch=launch)
    else:
        exact = integer_linear(form.of_codes(x), x_step, form.of_codes(w), w_step, form, form)
        expected = (exact if shift is None else exact + shift).to(dtype)
        moved = None if shift is None else there(shift)
        y = b1_linear(*map(there, (x_bits, x_step, w_bits, w_step)), width, bias=moved, out_dtype=dtype, launch=launch)
    torch.testing.assert_close(y.cpu(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("limits", "tile", "dtype"), EMULATED, ids=["wide", "square", "small", "flat"])
def test_emulated_products_equal_the_definition(emulated, limits, tile, dtype, shape):
    check(emulated(limits, tile, dtype), tile, dtype, shape, bias=shape[0] != 3)


def test_a_band_of_eight_tiles_ends_and_the_next_begins(emulated):
    check(emulated(RTX4090, FLAT, torch.float32), FLAT, torch.float32, (133, 136, 129), bias=False)


def test_prepared_weights_and_given_sums_give_the_same(emulated):
    machine = emulated(H200, SMALL, torch.int32)
    (x, x_bits), (w, w_bits) = bits(5, 77, 1), bits(9, 77, 2)
    weight = one_bit.prepare_b1_weight(w_bits, 77)
    assert isinstance(weight, B1Weight)
    assert weight.bits.stride(0) % 16 == 0
    torch.testing.assert_close(weight.bits, w_bits)
    torch.testing.assert_close(weight.sums, (2 * w + 1).sum(1, dtype=torch.int32))
    sums = (2 * x + 1).sum(1, dtype=torch.int32)
    launch = machine.launch(SMALL)
    y = b1_product(x_bits, weight, 77, x_sums=sums, launch=launch)
    torch.testing.assert_close(y, b1_product(x_bits, w_bits, 77, launch=launch))
    wrong = b1_product(x_bits, weight, 77, x_sums=sums + 1, launch=launch)
    torch.testing.assert_close(wrong, y - 1)  # the given sums are the ones used


def test_no_tokens_give_no_rows(emulated):
    emulated(H200, SMALL, torch.int32)
    empty = torch.empty(0, 10, dtype=torch.uint8)
    assert b1_product(empty, bits(9, 77, 2)[1], 77).shape == (0, 9)
    assert b1_row_sums(empty, 77).shape == (0,)


def test_what_cannot_be_done_is_named(emulated):
    emulated(H200, SMALL, torch.int32)
    x_bits, w_bits, step = bits(4, 100, 1)[1], bits(6, 100, 2)[1], torch.ones(4, 1)
    linear = partial(b1_linear, out_dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"uint8 \(rows, 13\) for K = 100, not torch\.uint8 \(4, 12\)"):
        b1_product(x_bits[:, :12], w_bits, 100)
    with pytest.raises(ConfigError, match="of w are uint8"):
        b1_product(x_bits, w_bits.to(torch.int8), 100)
    with pytest.raises(ConfigError, match="the step of w has 2 groups"):
        linear(x_bits, step, w_bits, torch.ones(6, 2), 100)
    with pytest.raises(ConfigError, match=r"the step of x is torch\.float32 \(4, 1\), not torch\.float64"):
        linear(x_bits, step.double(), w_bits, torch.ones(6, 1), 100)
    with pytest.raises(ConfigError, match=r"the bias has shape \(4,\), not \(6,\)"):
        linear(x_bits, step, w_bits, torch.ones(6, 1), 100, bias=torch.ones(4))
    with pytest.raises(ConfigError, match=r"not torch\.int32"):
        b1_linear(x_bits, step, w_bits, torch.ones(6, 1), 100, out_dtype=torch.int32)
    with pytest.raises(ConfigError, match=r"K must lie in \[1, 2\^24\), not 0"):
        b1_product(x_bits, w_bits, 0)


def test_cpu_tensors_are_refused():
    with pytest.raises(ConfigError, match="need a CUDA device; the operands are on cpu"):
        b1_product(bits(4, 100, 1)[1], bits(6, 100, 2)[1], 100)


@pytest.mark.parametrize("limits", [A100, RTX4090, H200, DeviceLimits(86, 82, 101_376, 102_400)])
def test_the_tile_follows_the_shape(limits):
    choose = partial(one_bit.choose_launch, limits=limits)
    assert choose(8192, 8192).tile == WIDE
    assert choose(1, 28672).tile == FLAT
    assert choose(64, 2048).tile in (SMALL, FLAT)
    for tile in one_bit.TILES:
        launch = launch_of(tile, limits)
        assert launch is not None
        assert launch.shared_bytes <= limits.shared_per_block
        assert tile.blocks * (launch.shared_bytes + 1024) <= limits.shared_per_multiprocessor


def test_too_little_shared_memory_is_an_error():
    with pytest.raises(ConfigError, match="fits 4096 bytes"):
        one_bit.choose_launch(1, 1, DeviceLimits(80, 1, 4096, 8192))


def test_availability_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert one_bit.availability() == (False, "torch finds no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, words in (((7, 5), "8.0 (Ampere) or later, the device has 7.5"), ((12, 0), "12.0 has no 1-bit")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda made=capability: made)
        available, reason = one_bit.availability()
        assert not available
        assert words in reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(one_bit, "load_driver", lambda: None)

    def missing():
        raise one_bit.CompilerMissingError("NVRTC was found nowhere")

    monkeypatch.setattr(one_bit, "load_nvrtc", missing)
    assert one_bit.availability() == (False, "NVRTC was found nowhere")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SHAPES, (1, 4096, 4096), (257, 1000, 1111), (2048, 2048, 2048)], ids=str)
@pytest.mark.parametrize("dtype", one_bit.OUTPUTS, ids=str)
@pytest.mark.parametrize("tile", one_bit.TILES, ids=str)
def test_products_on_the_gpu_equal_the_definition(tile, dtype, shape):
    limits = one_bit._limits(torch.cuda.current_device())
    check(Machine("cuda", limits), tile, dtype, shape, bias=shape[0] != 3)


@pytest.mark.gpu
def test_availability_on_the_gpu():
    available, reason = one_bit.availability()
    assert available, reason

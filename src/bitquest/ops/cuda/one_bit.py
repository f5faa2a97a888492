"""Products of 1-bit matrices on tensor cores by mma.sync, from Ampere to Hopper: the launchers.

kernels/b1_mma.cu says how it works. For T×K times K×N in one bit the floor is 2·T·N·K operations at 16 times the bf16
rate (the ratio on A100; 8192³ at an H200's 990 Tbf16 dense: 69 µs), or, for few tokens, reading N·K/8 bytes of weights
(8192×28672: 29 MB, 6 µs at 4.8 TB/s). Not measured on a GPU yet.

The first call of a tile compiles (about a second, later processes read the cache) and loads its kernel: make it before
capturing a CUDA graph, which does not allow loading.

Legend: T tokens, K in_features, N out_features.
"""

import ctypes
from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.ops.cuda.cache import kernel
from bitquest.ops.cuda.driver import DeviceLimits, DriverError, Function, load_driver
from bitquest.ops.cuda.hopper import aligned_rows
from bitquest.ops.cuda.nvrtc import CompilerMissingError, load_nvrtc

OUTPUTS = {torch.int32: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
OLDEST, NEWEST = 80, 90  # compute capabilities with 1-bit units; later ones emulate them by 8 integer products each
ONLY_AND = 90  # where XOR would take two AND products
_MAX_STAGES = 4
_RESERVED_BYTES = 1024  # of shared memory, by the system, per block


class Tile(NamedTuple):
    """What a block and a warp of it compute (rows of x, rows of w), and the blocks that share a multiprocessor."""

    block_m: int
    block_n: int
    warp_m: int
    warp_n: int
    blocks: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.block_m // self.warp_m * (self.block_n // self.warp_n) * 32


# The larger, the fewer bytes are moved per product: relative time per product, guessed from bytes, not tuned on a GPU.
TILES = {
    Tile(128, 256, 64, 64, 1): 1.0,
    Tile(128, 128, 64, 64, 2): 1.1,
    Tile(64, 64, 32, 32, 3): 1.6,
    Tile(16, 64, 16, 16, 4): 3.0,
}


class Launch(NamedTuple):
    """A tile and its ring: bytes of a row and stages in shared memory."""

    tile: Tile
    block_k: int
    stages: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block: the ring, and what the epilogue needs of each row of x and w."""
        tile = self.tile
        return self.stages * (tile.block_m + tile.block_n) * self.block_k + 8 * tile.block_m + 12 * tile.block_n

    def options(self, use_and: bool, out: int) -> tuple[str, ...]:
        """The macros of b1_mma.cu. `out` is a value of OUTPUTS."""
        macros = self.tile._asdict() | {"block_k": self.block_k, "stages": self.stages, "out": out}
        macros["min_blocks"] = macros.pop("blocks")
        return tuple(f"-D{name.upper()}={value}" for name, value in (macros | {"use_and": int(use_and)}).items())


class B1Weight(NamedTuple):
    """1-bit weights as the kernels read them: made once, at load, by `prepare_b1_weight`.

    bits: uint8 (N, ⌈K/8⌉), rows beginning on multiples of 16 bytes; sums: int32 (N,), Σ of the ±1 of each row.
    """

    bits: Tensor
    sums: Tensor


def availability() -> tuple[bool, str]:
    """Whether these kernels run on torch's current device, and why not: a sentence for `bitquest doctor`."""
    if not torch.cuda.is_available():
        return False, "torch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    reason = _refusal(10 * major + minor)
    if reason:
        return False, reason
    try:
        load_driver()
        compiler = load_nvrtc()
    except (CompilerMissingError, DriverError) as error:
        return False, str(error)
    version = ".".join(map(str, compiler.version))
    if 10 * major + minor not in compiler.architectures():
        return False, f"NVRTC {version} ({compiler.path}) cannot compile for compute capability {major}.{minor}"
    return True, f"1-bit products on tensor cores, compiled for sm_{major}{minor} by NVRTC {version}"


def _refusal(capability: int) -> str | None:
    name = f"{capability // 10}.{capability % 10}"
    if capability < OLDEST:
        return f"the 1-bit kernels need compute capability 8.0 (Ampere) or later, the device has {name}"
    if capability > NEWEST:
        return f"compute capability {name} has no 1-bit tensor cores: int8 is faster there"
    return None


@lru_cache(maxsize=4096)
def choose_launch(tokens: int, channels: int, limits: DeviceLimits) -> Launch:
    """The launch whose busiest multiprocessor has the least to do. Raises ConfigError where no ring fits."""

    def predicted(launch: Launch) -> float:
        tile = launch.tile
        tiles = -(-tokens // tile.block_m) * -(-channels // tile.block_n)
        return -(-tiles // limits.multiprocessors) * tile.block_m * tile.block_n * TILES[tile]

    fitting = [launch for tile in TILES if (launch := launch_of(tile, limits)) is not None]
    if not fitting:
        raise ConfigError(f"no 1-bit kernel fits {limits.shared_per_block} bytes of shared memory a block")
    return min(fitting, key=predicted)


def launch_of(tile: Tile, limits: DeviceLimits) -> Launch | None:
    """The deepest ring that lets the tile's blocks share a multiprocessor: rows of 128 bytes if three stages fit."""
    budget = min(limits.shared_per_block, limits.shared_per_multiprocessor // tile.blocks - _RESERVED_BYTES)
    for block_k, fewest in ((128, 3), (64, 2)):
        for stages in range(_MAX_STAGES, fewest - 1, -1):
            launch = Launch(tile, block_k, stages)
            if launch.shared_bytes <= budget:
                return launch
    return None


def prepare_b1_weight(packed: Tensor, width: int) -> B1Weight:
    """Packed 1-bit codes (N, ⌈K/8⌉) of a weight, uint8, as the kernels read them. Raises ConfigError."""
    _check_bits(packed, width, "w")
    bits = aligned_rows(packed)
    return B1Weight(bits, b1_row_sums(bits, width))


def b1_row_sums(bits: Tensor, width: int) -> Tensor:
    """Σ of the ±1 of each row, int32 (rows,), from packed 1-bit codes (rows, ⌈K/8⌉), uint8."""
    _check_bits(bits, width, "bits")
    device = _device(bits)
    sums = torch.empty(bits.shape[0], dtype=torch.int32, device=bits.device)
    if bits.shape[0]:
        bits = aligned_rows(bits)
        shape = (ctypes.c_int(bits.shape[0]), ctypes.c_int(width), ctypes.c_int64(bits.stride(0)))
        function = _function("b1_sums", f"sm_{_limits(device).capability}", (), 0, device)
        function.launch((-(-bits.shape[0] // 4), 1, 1), (128, 1, 1), (bits, sums, *shape))
    return sums


def b1_product(
    x_bits: Tensor, w_bits: Tensor | B1Weight, width: int, *, x_sums: Tensor | None = None, launch: Launch | None = None
) -> Tensor:
    """Σ_k a[t, k]·c[n, k] of ±1 as int32 (T, N), exact.

    x_bits (T, ⌈K/8⌉), w_bits (N, ⌈K/8⌉): packed 1-bit codes, uint8, spare bits zero; `width` is K. x_sums: Σa of each
    row of x, int32 (T,) or (T, 1), which quantization can give; taken from the bits where it is needed and missing.
    `launch` overrules the choice of tile. Raises ConfigError naming what these kernels cannot do.
    """
    return _multiply(x_bits, None, w_bits, None, width, None, torch.int32, x_sums, launch)


def b1_linear(
    x_bits: Tensor,
    x_step: Tensor,
    w_bits: Tensor | B1Weight,
    w_step: Tensor,
    width: int,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype,
    x_sums: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """y (T, N) = Δx[t]·Δw[n]/4 · Σ_k a[t, k]·c[n, k] + bias[n]: `b1_product` with the scales in its epilogue.

    Steps: float32 (T, 1) and (N, 1); group scales are refused (they would need a float sum every 128 bits: int8 is as
    fast). bias: (N,), any float type. The epilogue computes in float32, in the order of the definition, and rounds
    once to out_dtype: float32, bfloat16 or float16. Other arguments and errors: as b1_product.
    """
    if out_dtype not in OUTPUTS or out_dtype == torch.int32:
        raise ConfigError(f"the 1-bit kernels write float32, bfloat16 or float16, not {out_dtype}")
    return _multiply(x_bits, x_step, w_bits, w_step, width, bias, out_dtype, x_sums, launch)


def _multiply(
    x_bits: Tensor,
    x_step: Tensor | None,
    w_bits: Tensor | B1Weight,
    w_step: Tensor | None,
    width: int,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    x_sums: Tensor | None,
    launch: Launch | None,
) -> Tensor:
    w, w_sums = w_bits if isinstance(w_bits, B1Weight) else (w_bits, None)
    _check_bits(x_bits, width, "x")
    _check_bits(w, width, "w")
    tokens, channels = x_bits.shape[0], w.shape[0]
    _check_row_values(x_step, tokens, torch.float32, "the step of x")
    _check_row_values(w_step, channels, torch.float32, "the step of w")
    _check_row_values(x_sums, tokens, torch.int32, "the row sums of x")
    if bias is not None and bias.shape != (channels,):
        raise ConfigError(f"the bias has shape {tuple(bias.shape)}, not ({channels},)")
    device = _device(x_bits, x_step, w, w_sums, w_step, bias, x_sums)
    y = torch.empty(tokens, channels, dtype=out_dtype, device=x_bits.device)
    if y.numel() == 0:
        return y
    x, w = aligned_rows(x_bits), aligned_rows(w)
    limits = _limits(device)
    launch = launch or choose_launch(tokens, channels, limits)
    use_and = limits.capability >= ONLY_AND
    if use_and:
        x_sums = b1_row_sums(x, width) if x_sums is None else x_sums.reshape(-1).contiguous()
        w_sums = b1_row_sums(w, width) if w_sums is None else w_sums
    floats = [None if values is None else values.float().reshape(-1).contiguous() for values in (x_step, w_step, bias)]
    sizes = [ctypes.c_int(size) for size in (tokens, channels, width)]
    pitches = [ctypes.c_int64(rows.stride(0)) for rows in (x, w)]
    options = launch.options(use_and, OUTPUTS[out_dtype])
    function = _function("b1_mma", f"sm_{limits.capability}", options, launch.shared_bytes, device)
    tile = launch.tile
    blocks = -(-tokens // tile.block_m) * -(-channels // tile.block_n)
    sums = (x_sums, w_sums) if use_and else (None, None)
    function.launch((blocks, 1, 1), (tile.threads, 1, 1), (x, w, y, *floats, *sums, *sizes, *pitches))
    return y


def _check_bits(bits: Tensor, width: int, name: str) -> None:
    if not 0 < width < 2**24:
        raise ConfigError(f"K must lie in [1, 2^24), not {width}")
    if bits.dtype != torch.uint8 or bits.dim() != 2 or bits.shape[1] != (width + 7) // 8:
        raise ConfigError(
            f"1-bit codes of {name} are uint8 (rows, {(width + 7) // 8}) for K = {width}, "
            f"not {bits.dtype} {tuple(bits.shape)}"
        )


def _check_row_values(values: Tensor | None, rows: int, dtype: torch.dtype, name: str) -> None:
    if values is None:
        return
    if values.dim() == 2 and values.shape[1] > 1:
        raise ConfigError(f"the 1-bit kernels take one scale a row, and {name} has {values.shape[1]} groups")
    if values.dtype != dtype or values.shape not in ((rows,), (rows, 1)):
        raise ConfigError(f"{name} is {dtype} ({rows}, 1), not {values.dtype} {tuple(values.shape)}")


def _device(*tensors: Tensor | None) -> int:
    """The index of the one CUDA device of all tensors. Raises ConfigError where they disagree or it will not do."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1:
        raise ConfigError(f"the operands lie on several devices: {', '.join(sorted(map(str, devices)))}")
    device = devices.pop()
    if device.type != "cuda":
        raise ConfigError(f"the 1-bit kernels need a CUDA device; the operands are on {device}")
    index = torch.cuda.current_device() if device.index is None else device.index
    reason = _refusal(_limits(index).capability)
    if reason:
        raise ConfigError(reason)
    return index


@cache
def _limits(device: int) -> DeviceLimits:
    return load_driver().limits(device)


def _function(name: str, architecture: str, options: tuple[str, ...], shared_bytes: int, device: int) -> Function:
    return kernel(f"{name}.cu", name, architecture, options, shared_bytes, device)

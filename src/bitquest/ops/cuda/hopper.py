"""Products of 1-bit planes on Hopper's warpgroup tensor cores: which kernel, which tile, and the launch.

kernels/b1_wgmma.cu says how it works. An operand of b bits is b planes of bits (planes.py); 1 bit is one plane, the
packed codes themselves. For T×K times K×N in one bit the floor is 2·T·N·K operations at 16 times the bf16 rate (8192³
at an H200's 990 T: 69 µs; W2A2, four products: 278 µs). Not measured on a GPU yet, and its tiles are not tuned.

The first call of a tile compiles for sm_90a (about a second, later processes read the cache) and loads the kernel: make
it before capturing a CUDA graph, which does not allow loading. What is proven without a GPU, and how:
docs/decisions/warpgroup-products.md.
"""

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.ops.cuda.cache import kernel
from bitquest.ops.cuda.driver import Function, TensorMap, load_driver

ARCHITECTURE = "sm_90a"
CAPABILITY = 90
THREADS = 384  # a producer warpgroup and two consumers
SHARED_BYTES = 232_448  # that a block may have on compute capability 9.0
OUTPUTS = {torch.int32: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_STEP_BYTES = 128  # of each row, a step along K
_MAP_PROMOTION = 128


class Tile(NamedTuple):
    """How b1_wgmma.cu is built: columns and 64-row products of a consumer, stages, own tile per consumer, cluster."""

    columns: int
    rows_64: int
    stages: int
    pingpong: int
    cluster: int

    @property
    def rows(self) -> int:
        """Rows of x that a block loads at a time."""
        return 64 * self.rows_64 * (1 if self.pingpong else 2)


# Best first where all fit equally well. Not tuned on a GPU yet.
TILES = (Tile(192, 2, 5, 1, 2), Tile(192, 2, 3, 0, 2), Tile(128, 2, 6, 1, 2), Tile(128, 1, 8, 1, 2))
# Bytes fetched per product against the first tile's, roughly: what a smaller tile costs.
_COST = {TILES[0]: 1.0, TILES[1]: 1.15, TILES[2]: 1.15, TILES[3]: 1.4}


class Plan(NamedTuple):
    """One launch of b1_wgmma.cu."""

    options: tuple[str, ...]
    grid: int
    shared_bytes: int
    x_box: int  # rows of a copied box
    w_box: int
    steps: int
    tile_rows: int
    tile_columns: int


def plan(
    tokens: int, channels: int, width: int, planes: tuple[int, int], out: int, tile: Tile, multiprocessors: int
) -> Plan:
    """The launch of a tile: y (tokens, channels) from `planes` of (x, w), `out` a value of OUTPUTS."""
    macros = {
        "COLUMNS": tile.columns,
        "ROWS_64": tile.rows_64,
        "STAGES": tile.stages,
        "CLUSTER": tile.cluster,
        "PINGPONG": tile.pingpong,
        "X_PLANES": planes[0],
        "W_PLANES": planes[1],
        "OUT": out,
        "WHOLE": int(channels % 8 == 0),
    }
    tile_rows, tile_columns = -(-tokens // (tile.rows * tile.cluster)), -(-channels // tile.columns)
    clusters = min(tile_rows * tile_columns, multiprocessors // tile.cluster)
    stage = (tile.rows + tile.columns) * _STEP_BYTES
    edges = 4 * (3 * tile.columns + 2 * 64 * tile.rows_64)  # per consumer: what its rows and columns need
    shared = 1024 + tile.stages * (stage + 16) + 16 + 2 * edges  # 1024: to begin on a multiple of it
    assert shared <= SHARED_BYTES, f"{tile} takes {shared} bytes of shared memory"
    options = tuple(f"-D{name}={value}" for name, value in macros.items())
    steps = -(-width // (8 * _STEP_BYTES))
    return Plan(
        options,
        clusters * tile.cluster,
        shared,
        tile.rows,
        tile.columns // tile.cluster,
        steps,
        tile_rows,
        tile_columns,
    )


@lru_cache(maxsize=4096)
def choose_tile(tokens: int, channels: int, multiprocessors: int) -> Tile:
    """The tile whose rounds over the multiprocessors hold the least work. Rows of y that are no multiple of 8 long
    are stored element by element, which leaves the 192-column tiles no registers: they take narrower ones."""

    def predicted(tile: Tile) -> float:
        tiles = -(-tokens // (tile.rows * tile.cluster)) * -(-channels // tile.columns)
        rounds = -(-tiles // (multiprocessors // tile.cluster))
        return rounds * tile.rows * tile.columns * _COST[tile]

    return min((tile for tile in TILES if channels % 8 == 0 or tile.columns < 192), key=predicted)


class Work(ctypes.Structure):
    """`Work` of b1_wgmma.cu."""

    _fields_ = tuple(
        (name, ctypes.c_int) for name in ("tokens", "channels", "width", "steps", "tile_rows", "tile_columns")
    )


def refuses(device: torch.device) -> str | None:
    """Why these kernels do not run on a device, None if they do. Asks nothing of the device but its capability."""
    if device.type != "cuda":
        return f"the warpgroup kernels need a CUDA device, not {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor != CAPABILITY:
        return f"the warpgroup kernels are built for compute capability 9.0, not {major}.{minor}"
    return None


def check_device(*tensors: Tensor | None) -> torch.device:
    """The one device of all tensors. Raises ConfigError when it is not a Hopper GPU or they disagree."""
    devices = {tensor.device for tensor in tensors if tensor is not None}
    if len(devices) != 1:
        raise ConfigError(f"operands lie on several devices: {', '.join(sorted(map(str, devices)))}")
    device = devices.pop()
    reason = refuses(device)
    if reason is not None:
        raise ConfigError(reason)
    return device


def aligned_rows(rows: Tensor) -> Tensor:
    """The same bytes (…, rows, bytes) with rows that begin on multiples of 16 bytes, as the copy engine wants them.

    `rows` itself where it is so already; otherwise a copy, whose spare bytes are never read.
    """
    pitches = (*rows.stride()[:-1], rows.data_ptr())
    if rows.stride(-1) == 1 and not any(pitch % 16 for pitch in pitches):
        return rows
    made = rows.new_empty(*rows.shape[:-1], -(-rows.shape[-1] // 16) * 16)[..., : rows.shape[-1]]
    return made.copy_(rows)


_maps: dict[tuple[object, ...], TensorMap] = {}


def tensor_map(rows: Tensor, box_rows: int, box_bytes: int) -> TensorMap:
    """The copy engine's map of bytes (planes, rows, bytes), boxes of one plane, swizzled over box_bytes (64, 128).

    A map is an address and a shape: it is kept, and found again when an allocator hands out the same memory.
    """
    key = (rows.data_ptr(), rows.shape, rows.stride(), rows.device, box_rows, box_bytes)
    found = _maps.get(key)
    if found is None:
        if len(_maps) >= 4096:
            _maps.clear()
        driver = load_driver()
        box = (1, box_rows, box_bytes)
        found = driver.tensor_map(rows, box, swizzle=box_bytes, l2_promotion=_MAP_PROMOTION)
        _maps[key] = found
    return found


@lru_cache(maxsize=16)
def multiprocessors(device: int) -> int:
    """Multiprocessors of a CUDA device."""
    return load_driver().limits(device).multiprocessors


def loaded(name: str, options: tuple[str, ...], shared_bytes: int, device: torch.device) -> Function:
    """The kernel `name` of kernels/`name`.cu on a device."""
    assert device.index is not None
    return kernel(f"{name}.cu", name, ARCHITECTURE, options, shared_bytes, device.index)


def launch_planes(
    x_planes: Tensor,
    x_step: Tensor | None,
    x_sums: Tensor,
    w_planes: Tensor,
    w_step: Tensor | None,
    w_sums: Tensor,
    width: int,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """y (T, N) from planes (P, T, ⌈K/8⌉) and (Q, N, ⌈K/8⌉), uint8. Steps are None where out_dtype is int32."""
    _check(x_planes, x_step, x_sums, width, "x")
    _check(w_planes, w_step, w_sums, width, "w")
    if (
        out_dtype not in OUTPUTS
        or (out_dtype == torch.int32) != (x_step is None)
        or (x_step is None) != (w_step is None)
    ):
        raise ConfigError(
            f"the 1-bit product writes float32, bfloat16, float16, or int32 without steps, not {out_dtype}"
        )
    device = check_device(x_planes, x_step, x_sums, w_planes, w_step, w_sums, bias)
    tokens, channels = x_planes.shape[1], w_planes.shape[1]
    y = torch.empty(tokens, channels, dtype=out_dtype, device=device)
    if tokens == 0 or channels == 0:
        return y
    index = device.index if device.index is not None else torch.cuda.current_device()
    count = multiprocessors(index)
    tile = tile or choose_tile(tokens, channels, count)
    made = plan(tokens, channels, width, (x_planes.shape[0], w_planes.shape[0]), OUTPUTS[out_dtype], tile, count)
    x_planes, w_planes = aligned_rows(x_planes), aligned_rows(w_planes)
    floats = [None if values is None else values.reshape(-1).float().contiguous() for values in (x_step, w_step, bias)]
    sums = [values.reshape(-1).contiguous() for values in (x_sums, w_sums)]
    arguments = (
        tensor_map(x_planes, made.x_box, _STEP_BYTES),
        tensor_map(w_planes, made.w_box, _STEP_BYTES),
        y,
        *floats[:2],
        *sums,
        floats[2],
        Work(tokens, channels, width, made.steps, made.tile_rows, made.tile_columns),
    )
    function = loaded("b1_wgmma", made.options, made.shared_bytes, torch.device("cuda", index))
    function.launch((made.grid, 1, 1), (THREADS, 1, 1), arguments)
    return y


def _check(planes: Tensor, step: Tensor | None, sums: Tensor, width: int, name: str) -> None:
    rows = planes.shape[1] if planes.dim() == 3 else -1
    if planes.dtype != torch.uint8 or rows < 0 or planes.shape[0] not in (1, 2) or planes.shape[2] != -(-width // 8):
        raise ConfigError(
            f"planes of {name} are uint8 (1 or 2, rows, {-(-width // 8)}) for K = {width}, "
            f"not {planes.dtype} {tuple(planes.shape)}"
        )
    if not 0 < width < 2**24:
        raise ConfigError(f"K must lie in [1, 2^24), not {width}")
    if sums.dtype != torch.int32 or sums.numel() != rows:
        raise ConfigError(f"row sums of {name} are int32, one per row ({rows}), not {sums.dtype} {tuple(sums.shape)}")
    if step is not None and (step.dtype != torch.float32 or step.numel() != rows):
        raise ConfigError(f"steps of {name} are float32, one per row ({rows}), not {step.dtype} {tuple(step.shape)}")


def b1_product_hopper(x_bits: Tensor, x_sums: Tensor, w_bits: Tensor, w_sums: Tensor, width: int) -> Tensor:
    """Σ_k a[t, k]·c[n, k] of ±1 as int32 (T, N), exact.

    x_bits (T, ⌈K/8⌉), w_bits (N, ⌈K/8⌉): uint8, packed 1-bit codes, spare bits zero. x_sums, w_sums: int32, Σ of each
    row's ±1. `width` is K. Raises ConfigError where the kernel cannot run.
    """
    return launch_planes(x_bits[None], None, x_sums, w_bits[None], None, w_sums, width, None, torch.int32)


def b1_linear_hopper(
    x_bits: Tensor,
    x_step: Tensor,
    x_sums: Tensor,
    w_bits: Tensor,
    w_step: Tensor,
    w_sums: Tensor,
    width: int,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y (T, N) = Δ_x[t]·Δ_w[n]/4 · Σ a·c + bias, of ±1: `b1_product_hopper` with the scales in its epilogue.

    Steps: float32, one per row; bias (N,). out_dtype float32, bfloat16 or float16; the arithmetic is float32.
    """
    return launch_planes(x_bits[None], x_step, x_sums, w_bits[None], w_step, w_sums, width, bias, out_dtype)

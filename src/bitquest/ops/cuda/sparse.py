"""2:4 and 4:8-pair sparse int8 weights on Hopper's sparse tensor cores (kernels/s8_sparse_wgmma.cu).

The instruction keeps two of every four consecutive elements along K. In a group of 8 the pair pattern keeps two of four
pairs, so that among the four even elements, and among the four odd ones, exactly two are kept: with the order
0 2 4 6 1 3 5 7 in every group of 8, for both operands, the pairs are plain 2:4 (METHOD, "Sparse representations").

The floor is 2·T·N·K operations, dropped ones counted, at 4 times the bf16 rate (8192³ at an H200's 990 T: 278 µs). Not
measured on a GPU yet, and its tiles are not tuned. The first call of a tile compiles and loads, as in hopper.py.
"""

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.integers import IntegerForm
from bitquest.ops.cuda.hopper import (
    OUTPUTS,
    SHARED_BYTES,
    THREADS,
    Tile,
    aligned_rows,
    check_device,
    loaded,
    multiprocessors,
    tensor_map,
)

_STEP = 128  # elements along K of one step of the kernel
_WIDEST = 2**17  # K up to which 2·Σ + Σ of int8 products stays inside int32

# Tiles: columns are tokens, rows channels. Not tuned on a GPU yet.
TILES = (Tile(192, 2, 5, 0, 2), Tile(192, 2, 6, 1, 2), Tile(128, 1, 8, 1, 2))
_COST = {TILES[0]: 1.0, TILES[1]: 1.25, TILES[2]: 1.6}


class SparseWeight(NamedTuple):
    """A weight (N, K) of which at most two of every four elements are kept, as the kernel reads it.

    values: int8 (N, K/2), the kept factors, on rows of whole 16 bytes. places: int32 (⌈N/64⌉, ⌈K/128⌉, 2, 128), where
    they belong, in the order of the instruction's registers. sums: int32 (N,), Σ of the kept factors. pair: K is in
    the order of `pair_order`.
    """

    values: Tensor
    places: Tensor
    sums: Tensor
    width: int
    pair: bool


class SparsePlan(NamedTuple):
    """One launch of s8_sparse_wgmma.cu."""

    options: tuple[str, ...]
    grid: int
    shared_bytes: int
    x_box: int  # rows of a copied box
    w_box: int
    steps: int
    tile_rows: int
    tile_columns: int


def pair_order(width: int, device: torch.device | None = None) -> Tensor:
    """Which element of K stands at each place, int64 (K,): even ones before odd ones in every group of 8."""
    return torch.arange(width, device=device).view(-1, 4, 2).transpose(1, 2).reshape(-1)


def arrange_activation(x_a: Tensor, pair: bool) -> Tensor:
    """int8 factors (T, K) in the order of a weight's K: as they are for 2:4, in `pair_order` for pairs."""
    if not pair:
        return x_a
    return x_a.unflatten(-1, (-1, 4, 2)).transpose(-1, -2).flatten(-3)


def prepare_sparse_weight(factors: Tensor, kept: Tensor, pair: bool) -> SparseWeight:
    """Compress int8 factors (N, K) of which `kept` (bool, N × K) says which count. Made once per weight.

    pair: the pattern is of 4:8 in pairs. Raises ConfigError where more than two of four (reordered) elements are kept,
    or K is no multiple of 4 (2:4) or 8 (pairs).
    """
    rows, width = factors.shape
    span = 8 if pair else 4
    if factors.dtype != torch.int8 or kept.dtype != torch.bool or kept.shape != factors.shape or width % span:
        raise ConfigError(
            f"a sparse weight is int8 (N, K) and bool (N, K) with K a multiple of {span}, "
            f"not {factors.dtype} {tuple(factors.shape)} and {kept.dtype} {tuple(kept.shape)}"
        )
    groups = arrange_activation(kept, pair).reshape(rows, width // 4, 4)
    most = int(groups.sum(-1).max()) if groups.numel() else 0
    if most > 2:
        of_what = "elements of a parity" if pair else "elements"
        raise ConfigError(f"a sparse weight keeps two of every four {of_what}, not {most}")
    # The kept ones and, where fewer than two are, dropped ones beside them, whose factor is 0.
    chosen = torch.sort(groups.to(torch.int8), dim=-1, descending=True, stable=True).indices[..., :2].sort(-1).values
    dropped_as_zero = arrange_activation(factors * kept, pair).reshape(rows, width // 4, 4)
    values = dropped_as_zero.gather(-1, chosen).reshape(rows, width // 2)
    sums = values.sum(1, dtype=torch.int32)
    return SparseWeight(aligned_rows(values), _places(chosen[..., 0] | chosen[..., 1] << 2), sums, width, pair)


def _places(nibbles: Tensor) -> Tensor:
    """Four bits for every four elements, int64 (N, K/4), in the order of the registers (kernels/wgmma.cuh)."""
    rows, fours = nibbles.shape
    blocks, steps = -(-rows // 64), -(-4 * fours // _STEP)
    # Padding: places 0 and 1, since equal places are undefined to the hardware.
    whole = torch.nn.functional.pad(nibbles, (0, steps * _STEP // 4 - fours, 0, blocks * 64 - rows), value=0b0100)
    lane = torch.arange(8, device=nibbles.device) * 4
    words = (whole.unflatten(1, (-1, 8)) << lane).sum(-1)  # 32 elements a word
    words = words.view(blocks, 64, steps, 2, 2)  # block, row, step, half of the step, half of the product
    thread = torch.arange(128, device=nibbles.device)
    row = 16 * (thread // 32) + thread // 4 % 8 + 8 * (thread % 2)
    ordered = words[:, row, :, :, thread // 2 % 2]  # thread, block, step, half of the step
    ordered = ordered.permute(1, 2, 3, 0)
    return torch.where(ordered >= 2**31, ordered - 2**32, ordered).to(torch.int32).contiguous()


def sparse_plan(
    tokens: int, channels: int, width: int, eight_bits: bool, out: int, tile: Tile, multiprocessors: int
) -> SparsePlan:
    """The launch of a tile: y (tokens, channels), `out` a value of OUTPUTS."""
    macros = {
        "COLUMNS": tile.columns,
        "ROWS_64": tile.rows_64,
        "STAGES": tile.stages,
        "CLUSTER": tile.cluster,
        "PINGPONG": tile.pingpong,
        "EIGHT_BITS": int(eight_bits),
        "OUT": out,
        "WHOLE": int(channels % 8 == 0),
    }
    tile_rows, tile_columns = -(-channels // (tile.rows * tile.cluster)), -(-tokens // tile.columns)
    clusters = min(tile_rows * tile_columns, multiprocessors // tile.cluster)
    stage = tile.columns * _STEP + tile.rows * (_STEP // 2 + 16)  # x, the kept half of w, and its places
    edges = 4 * (tile.columns + 3 * 64 * tile.rows_64)
    shared = 1024 + tile.stages * (stage + 16) + 16 + 2 * edges
    assert shared <= SHARED_BYTES, f"{tile} takes {shared} bytes of shared memory"
    options = tuple(f"-D{name}={value}" for name, value in macros.items())
    x_box, steps = tile.columns // tile.cluster, -(-width // _STEP)
    return SparsePlan(options, clusters * tile.cluster, shared, x_box, tile.rows, steps, tile_rows, tile_columns)


@lru_cache(maxsize=4096)
def choose_sparse_tile(tokens: int, channels: int, multiprocessors: int) -> Tile:
    """The tile whose rounds over the multiprocessors hold the least work."""

    def predicted(tile: Tile) -> float:
        tiles = -(-channels // (tile.rows * tile.cluster)) * -(-tokens // tile.columns)
        return -(-tiles // (multiprocessors // tile.cluster)) * tile.rows * tile.columns * _COST[tile]

    return min(TILES, key=predicted)


class Work(ctypes.Structure):
    """`Work` of s8_sparse_wgmma.cu."""

    _fields_ = (
        ("tokens", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("steps", ctypes.c_int),
        ("tile_rows", ctypes.c_int),
        ("tile_columns", ctypes.c_int),
        ("unit", ctypes.c_float),
    )


def sparse_product(x_a: Tensor, weight: SparseWeight) -> Tensor:
    """Σ_k x_a[t, k]·w[n, k] over the kept elements as int32 (T, N), exact.

    x_a: int8 (T, K) in the weight's order of K (`arrange_activation`). Raises ConfigError where the kernel cannot run.
    """
    return _launch(x_a, None, weight, None, 1.0, False, None, torch.int32, None)


def sparse_linear(
    x_a: Tensor,
    x_step: Tensor,
    weight: SparseWeight,
    w_step: Tensor,
    x_form: IntegerForm,
    w_form: IntegerForm,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y (T, N) = Δ_x[t]·Δ_w[n]·units · Σ of the operands' integers + bias: `numerics.integers.integer_linear`.

    x_a: int8 (T, K), factors of x_form in the weight's order of K (`arrange_activation`). Steps: float32, one per row;
    bias (N,). out_dtype float32, bfloat16 or float16. Raises ConfigError where the kernel cannot run.
    """
    if w_form.offset or w_form.factor != 1:
        raise ConfigError("8-bit weights have no integer for a dropped element: they do not run sparse")
    unit = x_form.unit * w_form.unit
    if (x_form.factor, x_form.offset) not in ((1, 0), (2, 1)):
        raise ConfigError(f"activations of factor {x_form.factor} and offset {x_form.offset} do not run sparse")
    return _launch(x_a, x_step, weight, w_step, unit, x_form.offset == 1, bias, out_dtype, None)


def _launch(
    x_a: Tensor,
    x_step: Tensor | None,
    weight: SparseWeight,
    w_step: Tensor | None,
    unit: float,
    eight_bits: bool,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    tile: Tile | None,
) -> Tensor:
    tokens, channels = x_a.shape[0], weight.values.shape[0]
    if x_a.dtype != torch.int8 or x_a.dim() != 2 or x_a.shape[1] != weight.width:
        raise ConfigError(f"activations are int8 (T, {weight.width}), not {x_a.dtype} {tuple(x_a.shape)}")
    if not 0 < weight.width <= _WIDEST:
        raise ConfigError(f"sparse products are exact up to K = {_WIDEST}, not {weight.width}")
    if (
        out_dtype not in OUTPUTS
        or (out_dtype == torch.int32) != (x_step is None)
        or (x_step is None) != (w_step is None)
    ):
        raise ConfigError(
            f"the sparse product writes float32, bfloat16, float16, or int32 without steps, not {out_dtype}"
        )
    for name, step, rows in (("x", x_step, tokens), ("w", w_step, channels)):
        if step is not None and (step.dtype != torch.float32 or step.numel() != rows):
            found = f"{step.dtype} {tuple(step.shape)}"
            raise ConfigError(f"steps of {name} are float32, one per row ({rows}), not {found}")
    device = check_device(x_a, x_step, weight.values, weight.places, weight.sums, w_step, bias)
    y = torch.empty(tokens, channels, dtype=out_dtype, device=device)
    if tokens == 0 or channels == 0:
        return y
    index = device.index if device.index is not None else torch.cuda.current_device()
    count = multiprocessors(index)
    tile = tile or choose_sparse_tile(tokens, channels, count)
    made = sparse_plan(tokens, channels, weight.width, eight_bits, OUTPUTS[out_dtype], tile, count)
    floats = [None if values is None else values.reshape(-1).float().contiguous() for values in (x_step, w_step, bias)]
    arguments = (
        tensor_map(aligned_rows(x_a).unsqueeze(0), made.x_box, _STEP),
        tensor_map(weight.values.unsqueeze(0), made.w_box, _STEP // 2),
        weight.places,
        y,
        *floats[:2],
        weight.sums,
        floats[2],
        Work(tokens, channels, made.steps, made.tile_rows, made.tile_columns, unit),
    )
    function = loaded("s8_sparse_wgmma", made.options, made.shared_bytes, torch.device("cuda", index))
    function.launch((made.grid, 1, 1), (THREADS, 1, 1), arguments)
    return y

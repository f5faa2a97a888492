# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""How rows become tiles, and sums over the rows of a tile. Shared by the kernels that need whole rows.

A row of K elements is ⌈K / L⌉ chunks of L; a tile is BLOCKS chunks, those of ROWS whole rows (the rest idle). So a
product with the 128 × 128 matrix has 64 rows to work on even where one token's row fills the tile, and a row stays in
registers between its scale and its rounding. Programs stay and walk over the tiles: the matrix is built once.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.ops.triton.hadamard import MAX_BLOCK

MAX_WIDTH = 32768  # 256 chunks: 64 elements for each of 512 threads


class Tiles(NamedTuple):
    """A launch's cut of (T, K)."""

    length: int  # L, a power of two from 16 to 128
    blocks: int  # BLOCKS, a power of two
    rows: int  # ROWS of a tile
    warps: int
    stages: int  # tiles in flight, so that the next one loads while this one is rounded
    programs: int


def tiles(tokens: int, width: int, device: torch.device, parts: int, at_once: int = 64) -> Tiles:
    """The cut by rule: `at_once` chunks a tile, more only where a row is longer.

    parts: 16-bit parts that a value is rotated in. With one, a warp group of 4 warps holds 64 chunks at 64 elements a
    thread and copies the next tile meanwhile; with three it needs the registers of 8 warps, and loads as it goes.
    """
    length = row_length(width)
    chunks = -(-width // length)
    rows = max(1, min(at_once // chunks, tokens))
    blocks = max(16, triton.next_power_of_2(rows * chunks))
    elements = 64 if parts == 1 else 32
    warps = min(16, max(4, blocks * length // (elements * 32)))
    stages = 2 if parts == 1 and blocks <= 128 else 1
    if parts > 1 and blocks > 128 and _shared_bytes(device) < 227 * 1024:
        raise ConfigError(
            f"rows of {width} float32 values (or behind a norm or gate) need more shared memory than this GPU has; "
            f"up to {128 * length} fit"
        )
    return Tiles(length, blocks, rows, warps, stages, programs_for(-(-tokens // rows), warps, device))


def row_length(width: int) -> int:
    """L for rows of this width."""
    return int(min(MAX_BLOCK, max(16, triton.next_power_of_2(width))))


def programs_for(tiles_in_all: int, warps: int, device: torch.device) -> int:
    """As many programs as stay on the device at once, at 168 registers a thread, or fewer if there are fewer tiles."""
    return min(tiles_in_all, max(1, 12 // warps) * _multiprocessors(device))


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # the interpreter
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def parts(x: Tensor, block: int, behind_prologue: bool) -> int:
    """How many 16-bit parts a rotation takes a value in (hadamard.py)."""
    return 1 if block == 1 or (x.element_size() == 2 and not behind_prologue) else 3


def in_words(rows: Tensor | None, width: int, bits: int) -> Tensor | None:
    """Packed rows (T, ⌈K·bits/8⌉) as 32-bit words where every row is whole words, as grids.py reads and writes them."""
    return rows if rows is None or width % 32 or 8 % bits else rows.view(torch.int32)


@lru_cache(maxsize=16)
def _shared_bytes(device: torch.device) -> int:
    """Shared memory one program can have."""
    if device.type != "cuda":
        return 227 * 1024  # the interpreter has no limit
    properties: Any = torch.cuda.get_device_properties(device)  # torch's annotations leave this one out
    return int(properties.shared_memory_per_block_optin)


def check_rotation(width: int, block: int) -> None:
    """Raise ConfigError where the kernels cannot rotate rows of this width in blocks of this size."""
    if block < 1 or block & (block - 1) or block > MAX_BLOCK:
        raise ConfigError(f"the fused kernels rotate in blocks of 1 to {MAX_BLOCK}, a power of two, not {block}")
    if width % block:
        raise ConfigError(f"a rotation in blocks of {block} does not fit rows of width {width}")


def check_width(width: int) -> None:
    """Raise ConfigError where a row does not fit the registers of a program."""
    if not 1 <= width <= MAX_WIDTH:
        raise ConfigError(f"the fused kernels take rows of 1 to {MAX_WIDTH} elements, not {width}")


def as_rows(x: Tensor, what: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """x (T, K) with neighbours of a row side by side in memory, copied only if they are not."""
    if x.dim() != 2:
        raise ConfigError(f"{what} must be rows (T, K), not of shape {tuple(x.shape)}")
    if x.dtype not in dtypes:
        raise ConfigError(f"{what} must be one of {', '.join(str(d) for d in dtypes)}, not {x.dtype}")
    return x if x.stride(1) == 1 else x.contiguous()


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# --- device functions ----------------------------------------------------------------------------------------------


@triton.jit
def per_row(values, row_in_tile, ROWS: tl.constexpr, CHUNKS: tl.constexpr, MAXIMUM: tl.constexpr):
    """Sum (or maximum, of values ≥ 0) over each row of a tile: (BLOCKS, L) to (ROWS up to a power of two,)."""
    BLOCKS: tl.constexpr = values.shape[0]
    L: tl.constexpr = values.shape[1]
    if ROWS == 1 or ROWS * CHUNKS == BLOCKS:  # stays in the registers' layout, and for 16 chunks a row in one warp
        whole = tl.reshape(values, (ROWS, BLOCKS // ROWS * L))
        total = tl.max(whole, 1) if MAXIMUM else tl.sum(whole, 1)
    else:
        of_block = tl.max(values, 1) if MAXIMUM else tl.sum(values, 1)
        mine = row_in_tile[None, :] == tl.arange(0, triton.next_power_of_2(ROWS))[:, None]
        spread = tl.where(mine, of_block[None, :], tl.zeros_like(of_block)[None, :])
        total = tl.max(spread, 1) if MAXIMUM else tl.sum(spread, 1)
    return total


@triton.jit
def to_tile(row_values, row_in_tile, ROWS: tl.constexpr, CHUNKS: tl.constexpr, BLOCKS: tl.constexpr, L: tl.constexpr):
    """Each row's value for all its elements: (BLOCKS, L) or (BLOCKS, 1); 1 for idle blocks."""
    if ROWS == 1 or ROWS * CHUNKS == BLOCKS:
        WHOLE: tl.constexpr = BLOCKS // ROWS * L
        result = tl.reshape(tl.broadcast_to(row_values[:, None], (ROWS, WHOLE)), (BLOCKS, L))
    else:
        mine = row_in_tile[None, :] == tl.arange(0, triton.next_power_of_2(ROWS))[:, None]
        of_block = tl.sum(tl.where(mine, row_values[:, None], tl.zeros_like(row_values)[:, None]), 0)
        idle = row_in_tile >= triton.next_power_of_2(ROWS)
        result = tl.where(idle, 1.0, of_block)[:, None]
    return result

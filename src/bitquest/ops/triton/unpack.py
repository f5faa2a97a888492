# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Packed weights to int8 factors, for products of many tokens.

Weights stay packed on the device; where a product has enough tokens to be bound by arithmetic, its int8 operand is made
from them in a pass of its own: N·K·(b/8 + 1) bytes, 6 µs for 4096×4096 at 4 bits and 4.3 TB/s, against 139 µs of the
s8 product with 8192 tokens (predicted; not measured).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.grids import FP4, CodebookGrid, Grid
from bitquest.numerics.integers import integer_form
from bitquest.numerics.packing import packed_width
from bitquest.ops.triton.grids import integers, load_packed
from bitquest.ops.triton.tiles import in_words, row_length

_BLOCKS = 32


@triton.jit(do_not_specialize=["T"])
def _unpack_rows(
    packed_ptr, kept_ptr, out_ptr, T,
    K: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, TABLE: tl.constexpr, L: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (K + L - 1) // L
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    row = block // CHUNKS
    chunk = (block % CHUNKS).to(tl.int32)
    row_inside = row < T
    col = chunk[:, None] * L + tl.arange(0, L)[None, :]
    inside = row_inside[:, None] & (col < K)
    at = (row * K)[:, None] + col
    a = integers(load_packed(packed_ptr, row, chunk, row_inside, K, BITS, L), KIND, BITS, TABLE)
    if kept_ptr is not None:
        a = tl.where(tl.load(kept_ptr + at, mask=inside, other=0) != 0, a, 0)
    tl.store(out_ptr + at, a.to(tl.int8), mask=inside)


def unpack_factors(packed: Tensor, grid: Grid, width: int, kept: Tensor | None = None) -> Tensor:
    """int8 factors (N, K) of packed codes uint8 (N, ⌈K·bits/8⌉); 0 where `kept` (bool, N:M sparsity) is False.

    Raises ConfigError for a grid without integers.
    """
    form = integer_form(grid)
    if form is None:
        raise ConfigError(f"the levels of {grid} are no integers times a unit: there are no factors")
    rows = packed.shape[0]
    assert packed.shape == (rows, packed_width(width, grid.bits))
    assert packed.dtype == torch.uint8
    kind = "uniform" if not isinstance(grid, CodebookGrid) else "fp4" if grid.levels == FP4.levels else "codebook"
    out = torch.empty(rows, width, dtype=torch.int8, device=packed.device)
    if rows:
        length = row_length(width)
        _unpack_rows[(-(-rows * -(-width // length) // _BLOCKS),)](
            in_words(packed.contiguous(), width, grid.bits),
            None if kept is None else kept.contiguous().view(torch.uint8),
            out, rows, K=width, KIND=kind, BITS=grid.bits, TABLE=(form.table or ()) if kind == "codebook" else (),
            L=length, BLOCKS=_BLOCKS, num_warps=4,
        )  # fmt: skip
    return out

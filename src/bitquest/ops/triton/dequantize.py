# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Packed codes or integer factors back to values in rotated space: what the products of the backward pass read."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.grids import FP4, CodebookGrid, Grid
from bitquest.numerics.integers import integer_form
from bitquest.numerics.packing import packed_width
from bitquest.ops.triton.grids import levels, load_packed
from bitquest.ops.triton.hadamard import round_to
from bitquest.ops.triton.tiles import FLOATS, in_words, row_length


@triton.jit(do_not_specialize=["T"])
def _dequantize_rows(
    codes_ptr, step_ptr, step_stride, kept_ptr, y_ptr, T,
    K: tl.constexpr, STEPS: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr,
    FACTOR: tl.constexpr, OFFSET: tl.constexpr, L: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (K + L - 1) // L
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    row = block // CHUNKS
    chunk = (block % CHUNKS).to(tl.int32)
    row_inside = row < T
    col = chunk[:, None] * L + tl.arange(0, L)[None, :]
    inside = row_inside[:, None] & (col < K)
    at = (row * K)[:, None] + col
    if KIND == "factors":
        level = tl.load(codes_ptr + at, mask=inside, other=0).to(tl.float32) * FACTOR + OFFSET
    else:
        level = levels(load_packed(codes_ptr, row, chunk, row_inside, K, BITS, L), KIND, BITS, LEVELS)
    if STEPS == 1:
        y = level * tl.load(step_ptr + row * step_stride, mask=row_inside, other=0.0)[:, None]
    else:
        EACH: tl.constexpr = L * STEPS // K  # groups of 32, 64 or 128 elements: whole ones in a chunk
        SIZE: tl.constexpr = K // STEPS
        group = chunk[:, None] * EACH + tl.arange(0, EACH)[None, :]
        group_at = (row * step_stride)[:, None] + group
        step = tl.load(step_ptr + group_at, mask=row_inside[:, None] & (group < STEPS), other=0.0)
        y = tl.reshape(tl.reshape(level, (BLOCKS, EACH, SIZE)) * step[:, :, None], (BLOCKS, L))
    if kept_ptr is not None:
        y = tl.where(tl.load(kept_ptr + at, mask=inside, other=0) != 0, y, 0.0)
    tl.store(y_ptr + at, round_to(y, y_ptr.dtype.element_ty), mask=inside)


def dequantize_rows(
    codes: Tensor, step: Tensor, grid: Grid, width: int, *, dtype: torch.dtype, kept: Tensor | None = None
) -> Tensor:
    """Values (T, K) in rotated space, in `dtype`, rounded once from float32.

    codes: uint8 (T, ⌈K·bits/8⌉) packed, or int8 (T, K) factors. step: float32 (T, 1), (T, G) or (1, 1). kept: bool
    (T, K) under N:M sparsity; the others become 0. Raises ConfigError for other shapes, dtypes and grids.
    """
    tokens = codes.shape[0]
    constants = _constants(codes, grid, width)
    if dtype not in FLOATS:
        raise ConfigError(f"values are float32, bfloat16 or float16, not {dtype}")
    if step.dtype != torch.float32 or step.dim() != 2 or step.shape[0] not in (1, tokens):
        raise ConfigError(f"the step of {tokens} rows must be float32 (T, 1) or (T, G), not {tuple(step.shape)}")
    steps = step.shape[1]
    if steps > 1 and (width % steps or width // steps not in (32, 64, 128)):
        raise ConfigError(f"{steps} steps do not share out rows of width {width} in groups of 32, 64 or 128")
    if kept is not None and (kept.shape != (tokens, width) or kept.dtype != torch.bool):
        raise ConfigError(f"the kept mask must be bool {(tokens, width)}, not {kept.dtype} {tuple(kept.shape)}")
    y = torch.empty(tokens, width, dtype=dtype, device=codes.device)
    if tokens:
        length = row_length(width)
        blocks = 32
        step = step if step.stride(1) == 1 else step.contiguous()
        programs = -(-tokens * -(-width // length) // blocks)
        _dequantize_rows[(programs,)](
            codes.contiguous() if constants["KIND"] == "factors" else in_words(codes.contiguous(), width, grid.bits),
            step, 0 if step.shape[0] == 1 else step.stride(0),
            None if kept is None else kept.contiguous().view(torch.uint8), y, tokens,
            K=width, STEPS=steps, L=length, BLOCKS=blocks, num_warps=4, **constants,
        )  # fmt: skip
    return y


def _constants(codes: Tensor, grid: Grid, width: int) -> dict[str, Any]:
    if codes.dim() != 2 or codes.dtype not in (torch.int8, torch.uint8):
        raise ConfigError(f"codes are packed uint8 or int8 factors in rows, not {codes.dtype} {tuple(codes.shape)}")
    if codes.dtype == torch.int8:
        form = integer_form(grid)
        if form is None:
            raise ConfigError(f"the levels of {grid} are no integers times a unit: there are no factors")
        kind, factor, offset, wanted = "factors", form.factor * form.unit, form.offset * form.unit, width
    else:
        kind = "uniform" if not isinstance(grid, CodebookGrid) else "fp4" if grid.levels == FP4.levels else "codebook"
        factor, offset, wanted = 1.0, 0.0, packed_width(width, grid.bits)
    if codes.shape[1] != wanted:
        raise ConfigError(f"rows of {width} elements are {wanted} bytes wide here, not {codes.shape[1]}")
    table = grid.levels if kind == "codebook" else ()
    return {"KIND": kind, "BITS": grid.bits, "LEVELS": table, "FACTOR": factor, "OFFSET": offset}

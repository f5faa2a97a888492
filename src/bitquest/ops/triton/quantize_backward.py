# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""(G ⊙ M)Hᵀ in one pass, and on through RMSNorm or SwiGLU where they were fused in front of the quantizer.

G is the gradient with respect to the quantized rows, in rotated space; M is one bit an element (estimators.py). H is
symmetric, so the rotation is the forward one. Every kernel reads G once and writes gradients of what the forward pass
read; through a norm the whole row stays in registers for its one sum, and the gradient of the norm's weight adds up in
registers over all rows of a program, one partial sum a program, which one `sum` of torch joins (always the same way).

RMSNorm: y = x·r·w, r = 1/√(mean x² + ε):   ∂x = r·(w·∂y − x·r·mean(x·r·w·∂y)),  ∂w = Σ_rows ∂y·x·r.
SwiGLU:  y = silu(g)·u, σ = sigmoid(g):     ∂g = ∂y·u·σ·(1 + g·(1 − σ)),         ∂u = ∂y·g·σ.
Legend: T rows, K elements of a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.packing import packed_width
from bitquest.ops.rows import Prologue, RMSNorm
from bitquest.ops.triton.grids import load_packed
from bitquest.ops.triton.hadamard import rotate, round_to, signs
from bitquest.ops.triton.quantize import fused
from bitquest.ops.triton.quantize_kernels import inverse_rms
from bitquest.ops.triton.tiles import (
    FLOATS,
    as_rows,
    check_rotation,
    check_width,
    in_words,
    parts,
    per_row,
    programs_for,
    row_length,
    tiles,
    to_tile,
)


@triton.jit
def _masked(g_ptr, g_stride, mask_ptr, row, chunk, row_inside, inside, K: tl.constexpr, L: tl.constexpr):
    """G ⊙ M (BLOCKS, L) in G's dtype: a bfloat16 stays one, so that its rotation is one product."""
    col = chunk[:, None] * L + tl.arange(0, L)[None, :]
    g = tl.load(g_ptr + (row * g_stride)[:, None] + col, mask=inside, other=0.0)
    if mask_ptr is not None:
        m = load_packed(mask_ptr, row, chunk, row_inside, K, 1, L)
        g = tl.where(m != 0, g, tl.zeros_like(g))
    return g


@triton.jit(do_not_specialize=["T"])
def _mask_rotate(
    g_ptr, g_stride, mask_ptr, y_ptr, gate_ptr, gate_stride, up_ptr, up_stride, d_up_ptr, T,
    K: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr, L: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """y = (G ⊙ M)Hᵀ; with a gate, y is the gradient of the gate and d_up that of what it multiplies."""
    CHUNKS: tl.constexpr = (K + L - 1) // L
    DOT: tl.constexpr = tl.float16 if g_ptr.dtype.element_ty == tl.float16 else tl.bfloat16
    if BLOCK > 1:
        matrix = signs(L, BLOCK, DOT)
    else:
        matrix = 0
    total = T.to(tl.int64) * CHUNKS
    for tile in range(tl.program_id(0), tl.cdiv(total, BLOCKS), tl.num_programs(0)):
        block = tile * BLOCKS + tl.arange(0, BLOCKS)
        row = block // CHUNKS
        chunk = (block % CHUNKS).to(tl.int32)
        row_inside = row < T
        col = chunk[:, None] * L + tl.arange(0, L)[None, :]
        inside = row_inside[:, None]
        if K % L != 0:
            inside = inside & (col < K)
        g = _masked(g_ptr, g_stride, mask_ptr, row, chunk, row_inside, inside, K, L)
        y = rotate(g, matrix, BLOCK, SCALE)
        at = (row * K)[:, None] + col
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + (row * gate_stride)[:, None] + col, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(up_ptr + (row * up_stride)[:, None] + col, mask=inside, other=0.0).to(tl.float32)
            sigmoid = 1.0 / (1.0 + tl.exp(-gate))
            tl.store(d_up_ptr + at, round_to(y * (gate * sigmoid), d_up_ptr.dtype.element_ty), mask=inside)
            y = y * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        tl.store(y_ptr + at, round_to(y, y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T"])
def _through_rms_norm(
    g_ptr, g_stride, mask_ptr, x_ptr, x_stride, weight_ptr, d_x_ptr, d_weight_ptr, T,
    K: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr, EPS: tl.constexpr,
    L: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (K + L - 1) // L
    DOT: tl.constexpr = tl.float16 if g_ptr.dtype.element_ty == tl.float16 else tl.bfloat16
    if BLOCK > 1:
        matrix = signs(L, BLOCK, DOT)
    else:
        matrix = 0
    block = tl.arange(0, BLOCKS)
    row_in_tile = block // CHUNKS
    chunk = block % CHUNKS
    col = chunk[:, None] * L + tl.arange(0, L)[None, :]
    weight = tl.load(weight_ptr + col, mask=col < K, other=0.0)
    d_weight = tl.zeros((BLOCKS, L), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0)):
        row = tile * ROWS + row_in_tile
        row_inside = (row_in_tile < ROWS) & (row < T)
        row = row.to(tl.int64)
        inside = row_inside[:, None]
        if K % L != 0:
            inside = inside & (col < K)
        g = _masked(g_ptr, g_stride, mask_ptr, row, chunk, row_inside, inside, K, L)
        d_y = rotate(g, matrix, BLOCK, SCALE)
        x = tl.load(x_ptr + (row * x_stride)[:, None] + col, mask=inside, other=0.0).to(tl.float32)
        inverse = inverse_rms(x, row_in_tile, EPS, K, ROWS)
        normal = x * inverse
        d_weight += d_y * normal
        d_normal = d_y * weight.to(tl.float32)
        mean = per_row(d_normal * normal, row_in_tile, ROWS, CHUNKS, False) / K
        d_x = inverse * (d_normal - normal * to_tile(mean, row_in_tile, ROWS, CHUNKS, BLOCKS, L))
        tl.store(d_x_ptr + (row * K)[:, None] + col, round_to(d_x, d_x_ptr.dtype.element_ty), mask=inside)
    partial = tl.program_id(0) * ROWS + row_in_tile
    tl.store(d_weight_ptr + (partial.to(tl.int64) * K)[:, None] + col, d_weight,
             mask=(row_in_tile < ROWS)[:, None] & (col < K))  # fmt: skip


# --- launchers -----------------------------------------------------------------------------------------------------


def _checked(gradient: Tensor, mask: Tensor | None, block: int) -> tuple[Tensor, Tensor | None]:
    gradient = as_rows(gradient, "the gradient", FLOATS)
    tokens, width = gradient.shape
    check_rotation(width, block)
    if mask is None or (not mask.numel() and tokens):
        return gradient, None  # every element passes
    wanted = (tokens, packed_width(width, 1))
    if mask.dtype != torch.uint8 or tuple(mask.shape) != wanted:
        raise ConfigError(f"the trust mask must be uint8 bits {wanted}, not {mask.dtype} {tuple(mask.shape)}")
    return gradient, in_words(mask.contiguous(), width, 1)


def _rotate_back(
    gradient: Tensor, mask: Tensor | None, block: int, y: Tensor, gate: Tensor | None, up: Tensor | None,
    d_up: Tensor | None,
) -> None:  # fmt: skip
    tokens, width = gradient.shape
    if not tokens:
        return
    blocks = 64
    warps = 4 if parts(gradient, block, False) == 1 and gate is None else 8
    length = row_length(width)
    count = -(-tokens * -(-width // length) // blocks)
    _mask_rotate[(programs_for(count, warps, gradient.device),)](
        gradient, gradient.stride(0), mask, y,
        gate, 0 if gate is None else gate.stride(0), up, 0 if up is None else up.stride(0), d_up, tokens,
        K=width, BLOCK=block, SCALE=block**-0.5, L=length, BLOCKS=blocks, num_warps=warps, num_stages=2,
    )  # fmt: skip


def mask_rotate(gradient: Tensor, mask: Tensor | None, block: int, *, dtype: torch.dtype | None = None) -> Tensor:
    """(G ⊙ M)Hᵀ (T, K) in `dtype`, by default the gradient's, computed in float32.

    gradient: (T, K), float32, bfloat16 or float16, rows of any stride. mask: uint8 (T, ⌈K/8⌉) bits; None or empty if
    every element passes. block: 1 to 128. Raises ConfigError for other shapes, dtypes and blocks.
    """
    gradient, mask = _checked(gradient, mask, block)
    dtype = gradient.dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise ConfigError(f"gradients are float32, bfloat16 or float16, not {dtype}")
    y = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    _rotate_back(gradient, mask, block, y, None, None, None)
    return y


def swiglu_backward(
    gradient: Tensor, mask: Tensor | None, gate: Tensor, up: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up (T, K), in their dtypes, of rows silu(gate)·up that were rotated and quantized.

    gradient and mask as in `mask_rotate`, with the same errors.
    """
    gradient, mask = _checked(gradient, mask, block)
    gate, up = as_rows(gate, "the gate", FLOATS), as_rows(up, "the up projection", FLOATS)
    if not gate.shape == up.shape == gradient.shape:
        raise ConfigError(f"gate, up and gradient differ: {[tuple(t.shape) for t in (gate, up, gradient)]}")
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    d_up = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    _rotate_back(gradient, mask, block, d_gate, gate, up, d_up)
    return d_gate, d_up


def rms_norm_backward(
    gradient: Tensor, mask: Tensor | None, x: Tensor, weight: Tensor, eps: float, block: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x (T, K) and weight (K,), in their dtypes, of rows x/rms(x)·weight that were rotated and quantized.

    gradient and mask as in `mask_rotate`, with the same errors, and rows no longer than `quantize_rows` takes.
    """
    gradient, mask = _checked(gradient, mask, block)
    x = as_rows(x, "x", FLOATS)
    tokens, width = x.shape
    check_width(width)
    if x.shape != gradient.shape:
        raise ConfigError(f"x and its gradient differ: {tuple(x.shape)} and {tuple(gradient.shape)}")
    other = fused(RMSNorm(weight, eps), x.shape)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not tokens:
        return d_x, torch.zeros_like(weight)
    cut = tiles(tokens, width, x.device, parts=3)
    d_weight = torch.empty(cut.programs * cut.rows, width, dtype=torch.float32, device=x.device)
    _through_rms_norm[(cut.programs,)](
        gradient, gradient.stride(0), mask, x, x.stride(0), other.other, d_x, d_weight, tokens,
        K=width, BLOCK=block, SCALE=block**-0.5, EPS=other.eps,
        L=cut.length, BLOCKS=cut.blocks, ROWS=cut.rows, num_warps=cut.warps, num_stages=1,
    )  # fmt: skip
    return d_x, d_weight.sum(0).to(weight.dtype)


def prologue_backward(
    gradient: Tensor, mask: Tensor | None, x: Tensor, prologue: Prologue, block: int
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the prologue's other operand, in their dtypes, from that of the quantized rows."""
    if isinstance(prologue, RMSNorm):
        return rms_norm_backward(gradient, mask, x, prologue.weight, prologue.eps, block)
    return swiglu_backward(gradient, mask, x, prologue.up, block)

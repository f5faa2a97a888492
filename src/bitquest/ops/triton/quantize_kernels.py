# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Kernels of quantize.py, which says what they do and why. Device functions: hadamard.py, grids.py, tiles.py.

Pointers and strides come first; what follows is fixed at compilation, K among it, of which a model has two or three.
Programs walk over tiles of whole rows (tiles.py); `row_in_tile` and `chunk` (BLOCKS,) say whose a block is.
"""

import triton
import triton.language as tl

from bitquest.ops.triton.grids import biased_codes, in_steps, integers, store_packed, trusted
from bitquest.ops.triton.hadamard import rotate, rotate_unscaled, round_to, signs
from bitquest.ops.triton.tiles import per_row, to_tile


@triton.jit
def inverse_rms(v, row_in_tile, EPS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr):
    """1/rms of each row of v (BLOCKS, L), for all its elements."""
    CHUNKS: tl.constexpr = (K + v.shape[1] - 1) // v.shape[1]
    mean = per_row(v * v, row_in_tile, ROWS, CHUNKS, False) / K
    return to_tile(tl.div_rn(1.0, tl.sqrt_rn(mean + EPS)), row_in_tile, ROWS, CHUNKS, v.shape[0], v.shape[1])


@triton.jit
def prepared(x, col, up_ptr, up_offset, inside, row_in_tile, PROLOGUE: tl.constexpr, EPS: tl.constexpr,
             K: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """What is rotated: x, or in float32 x/rms(x)·weight or silu(x)·up. Zero outside the rows."""
    if PROLOGUE == "rms_norm":
        v = x.to(tl.float32)
        inverse = inverse_rms(v, row_in_tile, EPS, K, ROWS)
        weight = tl.load(up_ptr + col, mask=inside, other=0.0)
        result = v * inverse * weight.to(tl.float32)
    elif PROLOGUE == "swiglu":
        v = x.to(tl.float32)
        up = tl.load(up_ptr + up_offset, mask=inside, other=0.0).to(tl.float32)
        result = v / (1.0 + tl.exp(-v)) * up
    else:
        result = x
    return result


@triton.jit
def _step_of(total, BLOCK: tl.constexpr, COUNT: tl.constexpr, RULE: tl.constexpr, MULTIPLIER: tl.constexpr,
             MAX_LEVEL: tl.constexpr):  # fmt: skip
    """Δ = (α·σ + 1e-8)/max_level from the sum of squares, the sum or the maximum of √BLOCK·x_h."""
    if RULE == "gaussian_mse":
        clip = tl.div_rn(tl.sqrt_rn(total * (1 / BLOCK)), COUNT**0.5) * MULTIPLIER
    elif RULE == "absmean":
        clip = tl.div_rn(total * BLOCK**-0.5, COUNT * 1.0)
    else:
        clip = total * BLOCK**-0.5
    return tl.div_rn(clip + 1e-8, MAX_LEVEL)


@triton.jit
def _magnitude(x, RULE: tl.constexpr):
    return x * x if RULE == "gaussian_mse" else tl.abs(x)


@triton.jit(do_not_specialize=["T"])
def quantize_rows_kernel(
    x_ptr, x_stride, other_ptr, other_stride, given_ptr, given_stride, given_step_stride,
    factors_ptr, packed_ptr, step_ptr, mask_ptr, sums_ptr, T,
    K: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
    PROLOGUE: tl.constexpr, EPS: tl.constexpr, RULE: tl.constexpr, MULTIPLIER: tl.constexpr, MAX_LEVEL: tl.constexpr,
    KIND: tl.constexpr, BITS: tl.constexpr, BIAS: tl.constexpr, MIDDLES: tl.constexpr, TABLE: tl.constexpr,
    LEVELS: tl.constexpr, LIMITS: tl.constexpr, L: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (K + L - 1) // L
    POWER: tl.constexpr = triton.next_power_of_2(ROWS)
    DOT: tl.constexpr = tl.float16 if PROLOGUE == "" and x_ptr.dtype.element_ty == tl.float16 else tl.bfloat16
    if BLOCK > 1:
        matrix = signs(L, BLOCK, DOT)
    else:
        matrix = 0
    block = tl.arange(0, BLOCKS)
    row_in_tile = block // CHUNKS
    chunk = block % CHUNKS
    col = chunk[:, None] * L + tl.arange(0, L)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0)):
        row = tile * ROWS + row_in_tile
        row_inside = (row_in_tile < ROWS) & (row < T)
        row = row.to(tl.int64)
        inside = row_inside[:, None]
        if K % L != 0:
            inside = inside & (col < K)
        x = tl.load(x_ptr + (row * x_stride)[:, None] + col, mask=inside, other=0.0)
        up_offset = (row * other_stride)[:, None] + col
        x = prepared(x, col, other_ptr, up_offset, inside, row_in_tile, PROLOGUE, EPS, K, ROWS)
        x_h = rotate_unscaled(x, matrix, BLOCK)  # √BLOCK·x_h: the steps below are made as much longer

        if GROUP > 0:
            EACH: tl.constexpr = L // GROUP
            STEPS: tl.constexpr = K // GROUP
            group = chunk[:, None] * EACH + tl.arange(0, EACH)[None, :]
            step_at = (row * STEPS)[:, None] + group
            step_inside = row_inside[:, None] & (group < STEPS)
            if given_ptr is not None:
                given_at = (row * given_stride)[:, None] + group * given_step_stride
                step = tl.load(given_ptr + given_at, mask=step_inside, other=1.0)
            else:
                parts = tl.reshape(_magnitude(x_h, RULE), (BLOCKS, EACH, GROUP))
                total = tl.max(parts, 2) if RULE == "absmax" else tl.sum(parts, 2)
                step = _step_of(total, BLOCK, GROUP, RULE, MULTIPLIER, MAX_LEVEL)
                tl.store(step_ptr + step_at, step, mask=step_inside)
            step = step * BLOCK**0.5
            inverse = tl.div_rn(1.0, step)
            delta = tl.reshape(tl.broadcast_to(step[:, :, None], (BLOCKS, EACH, GROUP)), (BLOCKS, L))
            inverse = tl.reshape(tl.broadcast_to(inverse[:, :, None], (BLOCKS, EACH, GROUP)), (BLOCKS, L))
        else:
            own = tl.arange(0, POWER)
            own_row = (tile * ROWS + own).to(tl.int64)
            own_inside = (own < ROWS) & (own_row < T)
            if given_ptr is not None:
                step = tl.load(given_ptr + own_row * given_stride, mask=own_inside, other=1.0)
            else:
                total = per_row(_magnitude(x_h, RULE), row_in_tile, ROWS, CHUNKS, RULE == "absmax")
                step = _step_of(total, BLOCK, K, RULE, MULTIPLIER, MAX_LEVEL)
                tl.store(step_ptr + own_row, step, mask=own_inside)
            step = step * BLOCK**0.5
            delta = to_tile(step, row_in_tile, ROWS, CHUNKS, BLOCKS, L)
            inverse = to_tile(tl.div_rn(1.0, step), row_in_tile, ROWS, CHUNKS, BLOCKS, L)

        t = in_steps(x_h, delta, inverse, given_ptr is not None)
        u = biased_codes(t, KIND, BITS, MIDDLES)
        if packed_ptr is not None:
            store_packed(packed_ptr, row, chunk, row_inside, u, K, BITS, BIAS, L)
        if mask_ptr is not None:
            m = trusted(t, u - BIAS, KIND, BITS, LEVELS, LIMITS)
            store_packed(mask_ptr, row, chunk, row_inside, m.to(tl.int32), K, 1, 0, L)
        if factors_ptr is not None or sums_ptr is not None:
            a = integers(u - BIAS, KIND, BITS, TABLE)
            if factors_ptr is not None:
                tl.store(factors_ptr + (row * K)[:, None] + col, a.to(tl.int8), mask=inside)
            if sums_ptr is not None:
                a = tl.where(inside, a, 0)
                if GROUP > 0:
                    total = tl.sum(tl.reshape(a, (BLOCKS, EACH, GROUP)), 2)
                    tl.store(sums_ptr + step_at, total, mask=step_inside)
                else:
                    tl.store(sums_ptr + own_row, per_row(a, row_in_tile, ROWS, CHUNKS, False), mask=own_inside)


@triton.jit(do_not_specialize=["T"])
def rotate_rows_kernel(
    x_ptr, x_stride, other_ptr, other_stride, y_ptr, T,
    K: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr, PROLOGUE: tl.constexpr, EPS: tl.constexpr,
    L: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    CHUNKS: tl.constexpr = (K + L - 1) // L
    DOT: tl.constexpr = tl.float16 if PROLOGUE == "" and x_ptr.dtype.element_ty == tl.float16 else tl.bfloat16
    if BLOCK > 1:
        matrix = signs(L, BLOCK, DOT)
    else:
        matrix = 0
    block = tl.arange(0, BLOCKS)
    row_in_tile = block // CHUNKS
    col = (block % CHUNKS)[:, None] * L + tl.arange(0, L)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(T, ROWS), tl.num_programs(0)):
        row = tile * ROWS + row_in_tile
        inside = ((row_in_tile < ROWS) & (row < T))[:, None]
        row = row.to(tl.int64)
        if K % L != 0:
            inside = inside & (col < K)
        x = tl.load(x_ptr + (row * x_stride)[:, None] + col, mask=inside, other=0.0)
        up_offset = (row * other_stride)[:, None] + col
        x = prepared(x, col, other_ptr, up_offset, inside, row_in_tile, PROLOGUE, EPS, K, ROWS)
        y = round_to(rotate(x, matrix, BLOCK, SCALE), y_ptr.dtype.element_ty)
        tl.store(y_ptr + (row * K)[:, None] + col, y, mask=inside)

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Kernels of the s8 product, launched by int8_linear.py: tiles, integer dots, and the epilogue that scales them.

T tokens, K in_features, N out_features. Pointers and lengths come first, then what is fixed at compilation: K
among it, of which a model has two or three.
x_step, w_step: float32; x_sums, w_sums: int32; bias: any float; each may be None where the constants say so.
"""

import triton
import triton.language as tl


@triton.jit
def _tile_origin(T, N, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First token and channel of this program's tile: GROUP rows of tiles share a stripe of weights in the L2."""
    program = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    first = program // (GROUP * tiles_n) * GROUP
    rows = min(tl.cdiv(T, BLOCK_T) - first, GROUP)
    within = program % (GROUP * tiles_n)
    return (first + within % rows) * BLOCK_T, within // rows * BLOCK_N


@triton.jit
def _row_starts(a, first, count, stride, BLOCK: tl.constexpr):
    """Pointers to the rows of a tile. Rows past the end are read from the last one and never stored."""
    rows = tl.minimum(first + tl.arange(0, BLOCK), count - 1)
    return a + rows.to(tl.int64)[:, None] * stride


@triton.jit
def _corrected(dot, x_sum, w_sum, constant, FACTOR: tl.constexpr, X_TERM: tl.constexpr, W_TERM: tl.constexpr,
               WIDE: tl.constexpr):  # fmt: skip
    """FACTOR·Σab + X_TERM·Σa + W_TERM·Σb + constant, the exact integer rounded once to float32.

    dot int32 (BLOCK_T, BLOCK_N), x_sum (BLOCK_T,), w_sum (BLOCK_N,). WIDE: the total may not fit int32.
    """
    if not X_TERM and not W_TERM:
        tl.static_assert(FACTOR == 1)
        return dot.to(tl.float32)
    correction = constant
    if X_TERM:
        correction = correction + x_sum[:, None] * X_TERM
    if W_TERM:
        correction = correction + w_sum[None, :] * W_TERM
    if not WIDE:
        return (dot * FACTOR + correction).to(tl.float32)
    # total = FACTOR·high + low, and high does fit. Of `high` the upper 20 bits and the rest are exact floats each.
    high = dot + (correction >> (FACTOR // 2))  # FACTOR is 1, 2 or 4
    low = correction & (FACTOR - 1)
    return (high >> 12).to(tl.float32) * (4096 * FACTOR) + ((high & 4095) * FACTOR + low).to(tl.float32)


@triton.jit
def _store(out, value, t0, n0, T, N, bias, HAS_BIAS: tl.constexpr, STORE_DESCRIPTOR: tl.constexpr,
           BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    rt, rn = t0 + tl.arange(0, BLOCK_T), n0 + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        value = value + tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
    if STORE_DESCRIPTOR:
        out.store([t0, n0], value.to(out.dtype))
    else:
        inside = (rt < T)[:, None] & (rn < N)[None, :]
        tl.store(out + rt.to(tl.int64)[:, None] * N + rn[None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def rows_kernel(x, w, out, x_step, w_step, x_sums, w_sums, bias, T, N, x_stride, w_stride, constant,
                K: tl.constexpr, UNIT: tl.constexpr, FACTOR: tl.constexpr, X_TERM: tl.constexpr, W_TERM: tl.constexpr,
                WIDE: tl.constexpr, SCALED: tl.constexpr, HAS_BIAS: tl.constexpr, DESCRIPTORS: tl.constexpr,
                STORE_DESCRIPTOR: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                GROUP: tl.constexpr):  # fmt: skip
    """One dot over all of K. x, w: int8 pointers or descriptors of (BLOCK_T, BLOCK_K) and (BLOCK_N, BLOCK_K) tiles."""
    t0, n0 = _tile_origin(T, N, BLOCK_T, BLOCK_N, GROUP)
    dot = tl.zeros((BLOCK_T, BLOCK_N), tl.int32)
    if DESCRIPTORS:
        for k in tl.range(0, K, BLOCK_K):
            dot = tl.dot(x.load([t0, k]), w.load([n0, k]).T, dot, out_dtype=tl.int32)
    else:
        rk = tl.arange(0, BLOCK_K)[None, :]
        x_at = _row_starts(x, t0, T, x_stride, BLOCK_T) + rk
        w_at = _row_starts(w, n0, N, w_stride, BLOCK_N) + rk
        for k in tl.range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                x_tile, w_tile = tl.load(x_at), tl.load(w_at)
            else:
                x_tile = tl.load(x_at, mask=rk < K - k, other=0)
                w_tile = tl.load(w_at, mask=rk < K - k, other=0)
            dot = tl.dot(x_tile, w_tile.T, dot, out_dtype=tl.int32)
            x_at += BLOCK_K
            w_at += BLOCK_K
    if SCALED:
        rt, rn = t0 + tl.arange(0, BLOCK_T), n0 + tl.arange(0, BLOCK_N)
        x_sum = tl.load(x_sums + rt, mask=rt < T, other=0) if X_TERM else 0
        w_sum = tl.load(w_sums + rn, mask=rn < N, other=0) if W_TERM else 0
        value = _corrected(dot, x_sum, w_sum, constant, FACTOR, X_TERM, W_TERM, WIDE)
        value *= (tl.load(x_step + rt, mask=rt < T, other=0.0) * UNIT)[:, None]
        value *= tl.load(w_step + rn, mask=rn < N, other=0.0)[None, :]
        _store(out, value, t0, n0, T, N, bias, HAS_BIAS, STORE_DESCRIPTOR, BLOCK_T, BLOCK_N)
    else:
        _store(out, dot, t0, n0, T, N, bias, False, STORE_DESCRIPTOR, BLOCK_T, BLOCK_N)


@triton.jit
def groups_kernel(x, w, out, x_step, w_step, x_sums, w_sums, bias, T, N, x_stride, w_stride, constant,
                  K: tl.constexpr, X_EVERY: tl.constexpr, W_EVERY: tl.constexpr, UNIT: tl.constexpr,
                  FACTOR: tl.constexpr, X_TERM: tl.constexpr, W_TERM: tl.constexpr, HAS_BIAS: tl.constexpr,
                  DESCRIPTORS: tl.constexpr, STORE_DESCRIPTOR: tl.constexpr, BLOCK_T: tl.constexpr,
                  BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """One dot per scale group of BLOCK_K elements, summed in float32; K is a multiple of BLOCK_K.

    X_EVERY, W_EVERY: groups that share one step of x or w. Sums are (T, G) and (N, G), for every group.
    """
    t0, n0 = _tile_origin(T, N, BLOCK_T, BLOCK_N, GROUP)
    # Past the ends the last row is read again, so that nothing in the loop needs a mask; it is not stored.
    rt = tl.minimum(t0 + tl.arange(0, BLOCK_T), T - 1).to(tl.int64)
    rn = tl.minimum(n0 + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
    groups: tl.constexpr = K // BLOCK_K
    x_steps, w_steps = x_step + rt * (groups // X_EVERY), w_step + rn * (groups // W_EVERY)
    if not DESCRIPTORS:
        rk = tl.arange(0, BLOCK_K)[None, :]
        x_at, w_at = x + rt[:, None] * x_stride + rk, w + rn[:, None] * w_stride + rk
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for g in tl.range(groups):
        if DESCRIPTORS:
            x_tile, w_tile = x.load([t0, g * BLOCK_K]), w.load([n0, g * BLOCK_K])
        else:
            x_tile, w_tile = tl.load(x_at), tl.load(w_at)
            x_at += BLOCK_K
            w_at += BLOCK_K
        dot = tl.dot(x_tile, w_tile.T, out_dtype=tl.int32)
        x_sum = tl.load(x_sums + rt * groups + g) if X_TERM else 0
        w_sum = tl.load(w_sums + rn * groups + g) if W_TERM else 0
        value = _corrected(dot, x_sum, w_sum, constant, FACTOR, X_TERM, W_TERM, False)
        value *= (tl.load(x_steps + g // X_EVERY) * UNIT)[:, None]
        total += value * tl.load(w_steps + g // W_EVERY)[None, :]
    _store(out, total, t0, n0, T, N, bias, HAS_BIAS, STORE_DESCRIPTOR, BLOCK_T, BLOCK_N)

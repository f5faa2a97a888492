# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
# ruff: noqa: RUF005 - Triton knows no unpacking inside of tuples
"""A small batch of int8 activations against packed weights on the tensor cores, unpacked between memory and product.

A tile of packed bytes goes by asynchronous copies to shared memory and from there, still packed, to the registers of
the multiplication, where each field of the bytes is cut out (one or two instructions for four weights) and multiplied
with its run of the activations. Weights are the rows of the product, tokens its columns: 8 of them cost as much as 1.
"""

import triton
import triton.language as tl

from bitquest.ops.triton.few_bit_parts import field_of_bytes, whole


@triton.jit
def _x_tile(x_ptr, t, T, column, last, digit: tl.constexpr, k: tl.constexpr, DIGITS: tl.constexpr,
            RUN: tl.constexpr, P: tl.constexpr):  # fmt: skip
    """int8 (bytes, tokens) of field k."""
    rows = (t.to(tl.int64) * DIGITS + digit) * (P * RUN) + k * RUN
    return tl.load(x_ptr + rows[None, :] + column[:, None], mask=(t < T)[None, :] & (column < last)[:, None], other=0)


@triton.jit
def _scaled(sums, x_step_ptr, x_sums_ptr, w_step_ptr, w_sums_ptr, t, n, inside, unit, SIZE: tl.constexpr,
            GROUPS: tl.constexpr, X_RATIO: tl.constexpr, W_RATIO: tl.constexpr, FORM: tl.constexpr,
            DIGITS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """float32 (channels, tokens) of the integers of one group, whose steps and sums the pointers are at."""
    t, n = t.to(tl.int64), n.to(tl.int64)
    x_sum = ()
    for d in tl.static_range(DIGITS):
        if FORM[1] == 0:
            x_sum = x_sum + (0,)
        else:
            x_sum = x_sum + (tl.load(x_sums_ptr + (t * DIGITS + d) * GROUPS)[None, :],)
    w_sum = 0
    if FORM[4] != 0:
        w_sum = tl.load(w_sums_ptr + n * GROUPS, mask=inside, other=0)[:, None]
    value = whole(sums, x_sum, w_sum, SIZE, FORM, DIGITS, WIDE)
    x_step = tl.load(x_step_ptr + t * (GROUPS // X_RATIO)) * unit
    return value * x_step[None, :] * tl.load(w_step_ptr + n * (GROUPS // W_RATIO), mask=inside, other=0.0)[:, None]


@triton.jit
def small_batch(w_ptr, x_ptr, out_ptr, x_step_ptr, x_sums_ptr, w_step_ptr, w_sums_ptr, bias_ptr, T, N, unit,
                steps_a_split, K: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, GROUPS: tl.constexpr,
                X_RATIO: tl.constexpr, W_RATIO: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr,
                VALUES: tl.constexpr, FORM: tl.constexpr, BT: tl.constexpr, DIGITS: tl.constexpr, BN: tl.constexpr,
                BB: tl.constexpr, STAGES: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr,
                ASM: tl.constexpr):  # fmt: skip
    """out (T, N), or its parts, as few_bit_kernels.few_tokens; BT tokens a program. With groups, BB bytes are one."""
    P: tl.constexpr = 8 // BITS
    GROUPED: tl.constexpr = GROUPS > 1
    SIZE: tl.constexpr = K // GROUPS
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    first = tl.program_id(2) * steps_a_split * BB
    last = tl.minimum(first + steps_a_split * BB, WIDTH)
    inside = n < N
    safe = tl.where(t < T, t, 0)
    w_rows = tl.where(inside, n, 0).to(tl.int64)[:, None]

    sums = ()
    for _ in tl.static_range(DIGITS):
        sums = sums + (tl.zeros((BN, BT), tl.int32),)
    value = tl.zeros((BN, BT), tl.float32)
    for at in tl.range(first, last, BB, num_stages=STAGES):
        column = at + tl.arange(0, BB)
        there = inside[:, None] & (column < last)[None, :]
        w = tl.load(w_ptr + w_rows * WIDTH + column[None, :], mask=there, other=0)
        if GROUPED:
            sums = ()
            for _ in tl.static_range(DIGITS):
                sums = sums + (tl.zeros((BN, BT), tl.int32),)
        for k in tl.static_range(P):
            v = field_of_bytes(w, k, BITS, FIELDS, VALUES, ASM)
            made = ()
            for d in tl.static_range(DIGITS):
                x = _x_tile(x_ptr, t, T, column, last, d, k, DIGITS, RUN, P)
                made = made + (tl.dot(v, x, sums[d], out_dtype=tl.int32),)
            sums = made
        if GROUPED:
            g = at // BB
            value += _scaled(sums, x_step_ptr + g // X_RATIO, x_sums_ptr + g, w_step_ptr + g // W_RATIO,
                             w_sums_ptr + g, safe, n, inside, unit, SIZE, GROUPS, X_RATIO, W_RATIO, FORM, DIGITS,
                             False)  # fmt: skip

    at = t.to(tl.int64)[None, :] * N + n[:, None]
    there = inside[:, None] & (t < T)[None, :]
    part = tl.program_id(2).to(tl.int64) * T * N
    if GROUPED and SPLIT > 1:
        tl.store(out_ptr + part + at, value, mask=there)
    elif SPLIT > 1:
        for d in tl.static_range(DIGITS):
            place = (t.to(tl.int64) * DIGITS + d)[None, :] * N + n[:, None]
            tl.store(out_ptr + part * DIGITS + place, sums[d], mask=there)
    else:
        if not GROUPED:
            value = _scaled(sums, x_step_ptr, x_sums_ptr, w_step_ptr, w_sums_ptr, safe, n, inside, unit, K, 1, 1, 1,
                            FORM, DIGITS, True)  # fmt: skip
        if HAS_BIAS:
            value += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)[:, None]
        tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=there)

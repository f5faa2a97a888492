# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"
# ruff: noqa: RUF005 - Triton knows no unpacking inside of tuples
"""A few columns of int8 activations against packed weights: matrix × vector, four weights an instruction.

A program covers BN rows, a warp 128 words (512 bytes) of a row at a time, a thread 16 bytes of BN / (number of warps)
rows, which share the activations that it holds; the next tile of weights is in flight while one is used. Columns are
tokens, or the digits of one token (few_bit_arrange.py). Sums are exact integers: whole rows in int32, otherwise one
integer for each scale group. Where programs share rows (SPLIT) each stores its part and `add_parts` adds the parts in
order: no atomics, so that the result is the same every time.
"""

import triton
import triton.language as tl

from bitquest.ops.triton.few_bit_parts import differing, dot4, field_of_words, store_row, whole, words


@triton.jit
def _zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr):
    made = ()
    for _ in tl.static_range(COUNT):
        made = made + (tl.zeros((ROWS, COLUMNS), TYPE),)
    return made


@triton.jit
def _times(sums, w, x_rows, column, live, RUN: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr,
           VALUES: tl.constexpr, POPCOUNT: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """sums + weights × activations: a tuple with one int32 (rows, words) for each row of x. POPCOUNT: xor and count."""
    for k in tl.static_range(1 if POPCOUNT else 8 // BITS):
        v = w if POPCOUNT else field_of_words(w, k, BITS, FIELDS, VALUES, ASM)
        made = ()
        for c in tl.static_range(len(sums)):
            x = tl.load(x_rows[c] + k * (RUN // 4) + column, mask=live, other=0)[None, :]
            made = made + ((differing(v, x, sums[c], ASM) if POPCOUNT else dot4(v, x, sums[c], ASM)),)
        sums = made
    return sums


@triton.jit
def _group_sums(a, SPAN: tl.constexpr):
    """(rows, words) to (rows, groups of SPAN words)."""
    return tl.sum(tl.reshape(a, (a.shape[0], a.shape[1] // SPAN, SPAN)), axis=2)


@triton.jit
def _scaled_groups(totals, sums, first, n, inside, row, t0, T, x_step_ptr, x_sums_ptr, w_step_ptr, w_sums_ptr,
                   unit, GROUPS: tl.constexpr, SIZE: tl.constexpr, SPAN: tl.constexpr, FORM: tl.constexpr,
                   DIGITS: tl.constexpr, X_RATIO: tl.constexpr, W_RATIO: tl.constexpr,
                   POPCOUNT: tl.constexpr):  # fmt: skip
    """totals + the integers of the groups of one tile, each times its steps: float32 (rows, groups) for each token."""
    g = first // SPAN + tl.arange(0, sums[0].shape[1] // SPAN)
    known = g < GROUPS
    there = inside[:, None] & known[None, :]
    w_row = n.to(tl.int64)[:, None]
    w_step = tl.load(w_step_ptr + w_row * (GROUPS // W_RATIO) + (g // W_RATIO)[None, :], mask=there, other=0.0)
    w_sum = 0
    if FORM[4] != 0:
        w_sum = tl.load(w_sums_ptr + w_row * GROUPS + g[None, :], mask=there, other=0)
    made = ()
    for c in tl.static_range(len(totals)):
        a = ()
        x_sum = ()
        for d in tl.static_range(DIGITS):
            a = a + (_group_sums(sums[c * DIGITS + d], SPAN),)
            if POPCOUNT:
                x_sum = x_sum + (tl.full((1, 1), SIZE, tl.int32),)
            elif FORM[1] == 0:
                x_sum = x_sum + (0,)
            else:
                at = x_sums_ptr + row[c * DIGITS + d] * GROUPS + g
                x_sum = x_sum + (tl.load(at, mask=known, other=0)[None, :],)
        t = tl.minimum(t0 + c, T - 1).to(tl.int64)
        x_step = tl.load(x_step_ptr + t * (GROUPS // X_RATIO) + g // X_RATIO, mask=known, other=0.0) * unit
        made = made + (totals[c] + whole(a, x_sum, w_sum, SIZE, FORM, DIGITS, False) * x_step[None, :] * w_step,)
    return made


@triton.jit
def few_tokens(w_ptr, x_ptr, out_ptr, x_step_ptr, x_sums_ptr, w_step_ptr, w_sums_ptr, bias_ptr, T, N, unit,
               steps_a_split, K: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr, GROUPS: tl.constexpr,
               X_RATIO: tl.constexpr, W_RATIO: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr,
               VALUES: tl.constexpr, FORM: tl.constexpr, TOKENS: tl.constexpr, DIGITS: tl.constexpr, BN: tl.constexpr,
               BW: tl.constexpr, ALIGNED: tl.constexpr, AHEAD: tl.constexpr, SPLIT: tl.constexpr,
               HAS_BIAS: tl.constexpr, POPCOUNT: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """out (T, N), or its parts: int32 (SPLIT, T·DIGITS, N) of whole rows, float32 (SPLIT, T, N) of groups.

    WIDTH: bytes of a packed row. RUN: bytes of a run of x (few_bit_arrange.py), whose columns are TOKENS·DIGITS ≤ 4.
    x_sums int32 (T·DIGITS, GROUPS), x_step (T, GROUPS/X_RATIO), w_step (N, GROUPS/W_RATIO), w_sums (N, GROUPS).
    """
    SIZE: tl.constexpr = K // GROUPS
    SPAN: tl.constexpr = SIZE * BITS // 32  # words of a group
    GROUPED: tl.constexpr = GROUPS > 1
    P: tl.constexpr = 1 if POPCOUNT else 8 // BITS
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    t0 = tl.program_id(1) * TOKENS
    first = tl.program_id(2) * steps_a_split * BW
    last = tl.minimum(first + steps_a_split * BW, (WIDTH + 3) // 4)
    inside = n < N
    w_rows = tl.where(inside, n, 0).to(tl.int64)[:, None]
    x_rows = ()
    row = ()
    for c in tl.static_range(TOKENS * DIGITS):
        # The last block of tokens reads its last row again rather than what lies behind.
        row = row + (tl.minimum(t0 * DIGITS + c, T * DIGITS - 1).to(tl.int64),)
        x_rows = x_rows + (x_ptr + row[c] * (P * RUN // 4),)

    sums = _zeros(TOKENS * DIGITS, BN, BW, tl.int32)
    totals = _zeros(TOKENS, BN, BW // SPAN if GROUPED else 1, tl.float32)
    if AHEAD:
        w = words(w_ptr, w_rows, first + tl.arange(0, BW), inside, last, WIDTH, ALIGNED)
    for at in range(first, last, BW):
        column = at + tl.arange(0, BW)
        if AHEAD:
            ahead = words(w_ptr, w_rows, column + BW, inside, last, WIDTH, ALIGNED)
        else:
            w = words(w_ptr, w_rows, column, inside, last, WIDTH, ALIGNED)
        if GROUPED:
            sums = _zeros(TOKENS * DIGITS, BN, BW, tl.int32)
        sums = _times(sums, w, x_rows, column, column < last, RUN, BITS, FIELDS, VALUES, POPCOUNT, ASM)
        if GROUPED:
            totals = _scaled_groups(totals, sums, at, n, inside, row, t0, T, x_step_ptr, x_sums_ptr, w_step_ptr,
                                    w_sums_ptr, unit, GROUPS, SIZE, SPAN, FORM, DIGITS, X_RATIO, W_RATIO,
                                    POPCOUNT)  # fmt: skip
        if AHEAD:
            w = ahead

    for c in tl.static_range(TOKENS):
        if GROUPED:
            value = tl.sum(totals[c], axis=1)
            if SPLIT > 1:
                place = (tl.program_id(2) * T + t0 + c).to(tl.int64) * N
                tl.store(out_ptr + place + n, value, mask=inside & (t0 + c < T))
            else:
                store_row(out_ptr, bias_ptr, value, t0 + c, n, T, N, HAS_BIAS)
        else:
            a = ()
            for d in tl.static_range(DIGITS):
                a = a + (tl.sum(sums[c * DIGITS + d], axis=1),)
            if SPLIT > 1:
                for d in tl.static_range(DIGITS):
                    place = ((tl.program_id(2) * T + t0 + c) * DIGITS + d).to(tl.int64) * N
                    tl.store(out_ptr + place + n, a[d], mask=inside & (t0 + c < T))
            else:
                value = scaled_row(a, x_step_ptr, x_sums_ptr, w_step_ptr, w_sums_ptr, unit, t0 + c, n, T, N, K, FORM,
                                   DIGITS, POPCOUNT)  # fmt: skip
                store_row(out_ptr, bias_ptr, value, t0 + c, n, T, N, HAS_BIAS)


@triton.jit
def scaled_row(a, x_step_ptr, x_sums_ptr, w_step_ptr, w_sums_ptr, unit, t, n, T, N, K: tl.constexpr,
               FORM: tl.constexpr, DIGITS: tl.constexpr, POPCOUNT: tl.constexpr):  # fmt: skip
    """Channels n of token t from the integers of whole rows, a tuple of int32 (channels,)."""
    t = tl.minimum(t, T - 1).to(tl.int64)
    x_sum = ()
    for d in tl.static_range(DIGITS):
        if POPCOUNT:
            x_sum = x_sum + (tl.full((1,), K, tl.int32),)
        elif FORM[1] == 0:
            x_sum = x_sum + (0,)
        else:
            x_sum = x_sum + (tl.load(x_sums_ptr + t * DIGITS + d),)
    w_sum = 0
    if FORM[4] != 0:
        w_sum = tl.load(w_sums_ptr + n, mask=n < N, other=0)
    value = whole(a, x_sum, w_sum, K, FORM, DIGITS, True)
    return value * (tl.load(x_step_ptr + t) * unit) * tl.load(w_step_ptr + n, mask=n < N, other=0.0)


@triton.jit
def add_parts(parts_ptr, out_ptr, x_step_ptr, x_sums_ptr, w_step_ptr, w_sums_ptr, bias_ptr, T, N, unit,
              K: tl.constexpr, GROUPED: tl.constexpr, FORM: tl.constexpr, DIGITS: tl.constexpr, BN: tl.constexpr,
              SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, POPCOUNT: tl.constexpr):  # fmt: skip
    """out (T, N) from the parts of `few_tokens` or `small_batch`, added in order."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    t = tl.program_id(1)
    ROWS: tl.constexpr = 1 if GROUPED else DIGITS
    sums = ()
    for d in tl.static_range(ROWS):
        place = parts_ptr + (t * ROWS + d).to(tl.int64) * N + n
        total = tl.load(place, mask=n < N, other=0)
        for s in tl.static_range(1, SPLIT):
            total += tl.load(place + (T * ROWS * s).to(tl.int64) * N, mask=n < N, other=0)
        sums = sums + (total,)
    if GROUPED:
        value = sums[0]
    else:
        value = scaled_row(sums, x_step_ptr, x_sums_ptr, w_step_ptr, w_sums_ptr, unit, t, n, T, N, K, FORM, DIGITS,
                           POPCOUNT)  # fmt: skip
    store_row(out_ptr, bias_ptr, value, t, n, T, N, HAS_BIAS)


@triton.jit
def weight_sums(w_ptr, out_ptr, N, K: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr,
                FIELDS: tl.constexpr, VALUES: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
                DOWN: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, ALIGNED: tl.constexpr,
                ASM: tl.constexpr):  # fmt: skip
    """out int32 (N, GROUPS): Σ of SCALE·v/2^DOWN + SHIFT over each group of a row."""
    SIZE: tl.constexpr = K // GROUPS
    SPAN: tl.constexpr = SIZE * BITS // 32
    P: tl.constexpr = 8 // BITS
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < N
    rows = tl.where(inside, n, 0).to(tl.int64)[:, None]
    sums = tl.zeros((BN, BW), tl.int32)
    for at in range(0, (WIDTH + 3) // 4, BW):
        column = at + tl.arange(0, BW)
        if GROUPS > 1:
            sums = tl.zeros((BN, BW), tl.int32)
        w = words(w_ptr, rows, column, inside, (WIDTH + 3) // 4, WIDTH, ALIGNED)
        for k in tl.static_range(P):
            ones = tl.zeros((BW,), tl.int32)
            for i in tl.static_range(4):
                ones |= tl.where((column * 4 + i) * P + k < K, 1 << (8 * i), 0)
            sums = dot4(field_of_words(w, k, BITS, FIELDS, VALUES, ASM), ones[None, :], sums, ASM)
        if GROUPS > 1:
            g = at // SPAN + tl.arange(0, BW // SPAN)[None, :]
            total = (_group_sums(sums, SPAN) >> DOWN) * SCALE + SHIFT * SIZE
            tl.store(out_ptr + n.to(tl.int64)[:, None] * GROUPS + g, total, mask=inside[:, None] & (g < GROUPS))
    if GROUPS == 1:
        tl.store(out_ptr + n, (tl.sum(sums, axis=1) >> DOWN) * SCALE + SHIFT * K, mask=inside)

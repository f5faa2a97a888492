# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""From values in units of the step to integers, mask bits and packed bytes: device functions of the kernels.

Shapes: B rows of a tile, L elements each. u = c + 2^(bits−1) is the unsigned code. The order of operations is that of
numerics/grids.py, so that codes differ from the reference's only where the rotation's rounding crosses a threshold.
"""

import triton
import triton.language as tl

# 1.5·2^23: adding it makes the bits of a float32 0x4B400000 + round(y), half to even, for |y| < 2^22.
_MAGIC = tl.constexpr(12582912.0)


@triton.jit
def in_steps(x, step, inverse, GIVEN: tl.constexpr):
    """x/Δ, rounded as a true division.

    For steps of the scale rules, which are far from the ends of float32, by one correction of the product with the
    correctly rounded inverse (Markstein), at three operations instead of about ten.
    """
    if GIVEN:
        t = tl.div_rn(x, step)
    else:
        guess = x * inverse
        t = tl.fma(tl.fma(guess, -step, x), inverse, guess)
    return t


# KIND is "uniform", "fp4" (E2M1 in a few operations) or "codebook" (one comparison a threshold). LEVELS, MIDDLES and
# TABLE are a codebook's levels, the thresholds between them and the integers of its levels; nobody else reads them.


def bias(kind: str, bits: int) -> int:
    """What `biased_codes` are too large by. It is subtracted where a word is joined, not from every code."""
    if kind == "codebook" or (kind == "uniform" and bits == 1):
        return 0
    return 0x4B400000 - (7 if kind == "fp4" else 2 ** (bits - 1) - 1)


@triton.jit
def biased_codes(t, KIND: tl.constexpr, BITS: tl.constexpr, MIDDLES: tl.constexpr):
    """u + bias(KIND, BITS) as int32 of t = x/Δ. NaN becomes some code."""
    if KIND == "fp4":
        # E2M1's thresholds ¼, ¾, 1¼, 1¾, 2½, 3½, 5 become ½, 1½, … 6½; ties go to the lower level, also below 0.
        a = tl.abs(t)
        place = tl.minimum(tl.minimum(a * 2.0, a + 2.0), tl.minimum(a * 0.5 + 4.0, 7.0))
        place = tl.ceil(tl.where(t < 0, -place, place) - 0.5)
        u = (place + _MAGIC).to(tl.int32, bitcast=True)
    elif KIND == "codebook":
        u = tl.zeros(t.shape, tl.int32)
        for i in tl.static_range(len(MIDDLES)):
            u += (t > MIDDLES[i]).to(tl.int32)
    elif BITS == 1:
        u = (t > 0).to(tl.int32)
    else:
        half: tl.constexpr = 2 ** (BITS - 1)
        y = tl.minimum(tl.maximum(t + 0.5, 1.0 - half), half * 1.0)
        u = (y + _MAGIC).to(tl.int32, bitcast=True)
    return u


@triton.jit
def _fp4_doubled(u):
    """2·level of E2M1: 0, 1, 2, 3, 4, 6, 8, 12 with a sign."""
    m = tl.abs(u - 7)
    a = tl.maximum(m, tl.maximum(2 * m - 4, 4 * m - 16))
    return tl.where(u < 7, -a, a)


@triton.jit
def integers(u, KIND: tl.constexpr, BITS: tl.constexpr, TABLE: tl.constexpr):
    """The factors `a` (int32) of IntegerForm."""
    if KIND == "fp4":
        a = _fp4_doubled(u)
    elif KIND == "codebook":
        a = tl.zeros(u.shape, tl.int32) + TABLE[0]
        for i in tl.static_range(1, len(TABLE)):
            a = tl.where(u >= i, TABLE[i], a)
    elif BITS == 8:
        a = u - 128
    else:
        a = 2 * u + (1 - 2**BITS)
    return a


@triton.jit
def levels(u, KIND: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr):
    """Levels (float32, units of Δ)."""
    if KIND == "fp4":
        q = _fp4_doubled(u).to(tl.float32) * 0.5
    elif KIND == "codebook":
        q = tl.zeros(u.shape, tl.float32) + LEVELS[0]
        for i in tl.static_range(1, len(LEVELS)):
            q = tl.where(u >= i, LEVELS[i], q)
    else:
        q = u.to(tl.float32) + (0.5 - 2 ** (BITS - 1))
    return q


@triton.jit
def trusted(t, u, KIND: tl.constexpr, BITS: tl.constexpr, LEVELS: tl.constexpr, LIMITS: tl.constexpr):
    """M (bool): LIMITS is (low, high) for x/Δ, or (threshold,) for |x_q − x_h|/Δ. NaN is outside."""
    if len(LIMITS) == 1:
        m = tl.abs(levels(u, KIND, BITS, LEVELS) - t) <= LIMITS[0]
    elif LIMITS[0] == -LIMITS[1]:
        m = tl.abs(t) <= LIMITS[1]
    else:
        m = (t >= LIMITS[0]) & (t <= LIMITS[1])
    return m


@triton.jit
def _joined(u, BITS: tl.constexpr, CODES: tl.constexpr, BIAS: tl.constexpr, dtype: tl.constexpr):
    """(B, L / CODES) of `dtype`: CODES consecutive codes of BITS bits in one number, the first lowest.

    A multiplication and addition for each code, and one subtraction of all their biases.
    """
    B: tl.constexpr = u.shape[0]
    L: tl.constexpr = u.shape[1]
    one = tl.full((CODES,), 1, dtype)
    weights = (one << (tl.arange(0, CODES) * BITS).to(dtype))[None, None, :]
    parts = tl.reshape(u, (B, L // CODES, CODES))
    if BITS == 1:
        words = tl.sum(tl.where(parts != 0, weights, tl.zeros_like(weights)), 2).to(dtype)
    else:
        words = tl.sum(parts.to(dtype) * weights, 2).to(dtype)
        words -= (BIAS * ((2 ** (BITS * CODES) - 1) // (2**BITS - 1))) % 2**32
    return words


@triton.jit
def store_packed(
    pointer, row, chunk, row_inside, u, K: tl.constexpr, BITS: tl.constexpr, BIAS: tl.constexpr, L: tl.constexpr
):
    """Write codes u (B, L), BIAS too large, of elements chunk·L … of rows `row` as numerics/packing.py does.

    pointer: int32 where K is a multiple of 32 (whole words a row, and a quarter of the stores), else uint8.
    row, chunk, row_inside: (B,), row as int64.
    """
    if K % L != 0:  # spare bits are zero
        u = tl.where(chunk[:, None] * L + tl.arange(0, L)[None, :] < K, u, BIAS)
    if 8 % BITS == 0:
        CODES: tl.constexpr = (32 if K % 32 == 0 else 8) // BITS
        WORDS: tl.constexpr = (K + CODES - 1) // CODES
        words = _joined(u, BITS, CODES, BIAS, tl.uint32)
        at = chunk[:, None] * (L // CODES) + tl.arange(0, L // CODES)[None, :]
        target = pointer + (row * WORDS)[:, None] + at
        tl.store(target, words.to(pointer.dtype.element_ty), mask=row_inside[:, None] & (at < WORDS))
    else:  # eight codes are BITS whole bytes
        words = _joined(u - BIAS, BITS, 8, 0, tl.uint64)
        byte = tl.arange(0, 8)
        bytes_ = (words[:, :, None] >> (byte * 8).to(tl.uint64)[None, None, :]) & 255
        first = (chunk[:, None] * (L // 8) + tl.arange(0, L // 8)[None, :]) * BITS
        at = first[:, :, None] + byte[None, None, :]
        WIDTH: tl.constexpr = (K * BITS + 7) // 8
        inside = row_inside[:, None, None] & (byte < BITS)[None, None, :] & (at < WIDTH)
        tl.store(pointer + (row * WIDTH)[:, None, None] + at, bytes_.to(tl.uint8), mask=inside)


@triton.jit
def load_packed(pointer, row, chunk, row_inside, K: tl.constexpr, BITS: tl.constexpr, L: tl.constexpr):
    """u (B, L) as int32 of what `store_packed` wrote, 0 outside the rows."""
    B: tl.constexpr = row.shape[0]
    if 8 % BITS == 0:
        CODES: tl.constexpr = (32 if K % 32 == 0 else 8) // BITS
        WORDS: tl.constexpr = (K + CODES - 1) // CODES
        at = chunk[:, None] * (L // CODES) + tl.arange(0, L // CODES)[None, :]
        inside = row_inside[:, None] & (at < WORDS)
        words = tl.load(pointer + (row * WORDS)[:, None] + at, mask=inside, other=0).to(tl.uint32)
        shifts = (tl.arange(0, CODES) * BITS).to(tl.uint32)
        u = tl.reshape((words[:, :, None] >> shifts[None, None, :]) & (2**BITS - 1), (B, L)).to(tl.int32)
    else:
        WIDTH: tl.constexpr = (K * BITS + 7) // 8
        bit = (chunk[:, None] * L + tl.arange(0, L)[None, :]) * BITS
        at = bit >> 3
        first = pointer + (row * WIDTH)[:, None] + at
        inside = row_inside[:, None] & (at < WIDTH)
        low = tl.load(first, mask=inside, other=0).to(tl.int32)
        high = tl.load(first + 1, mask=inside & (at + 1 < WIDTH), other=0).to(tl.int32)
        u = ((low | (high << 8)) >> (bit & 7)) & (2**BITS - 1)
    return u

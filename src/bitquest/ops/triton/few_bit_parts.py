# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""What the few-bit kernels share: reading words, cutting fields out of them, multiplying by four, and the last scaling.

ASM: inline PTX, which Triton's interpreter cannot run; without it the same in plain operations.
VALUES, FIELDS: of few_bit_forms.WeightForm.
FORM: (scale, shift, down, x factor, x offset, w factor, w offset): levels are Σ over a scale group of
(scale·v/2^down + shift)·(x factor·a + x offset) with v from few_bit_forms.WeightForm and a the activations' integers.
"""

import triton
import triton.language as tl


@triton.jit
def words(w_ptr, rows, column, inside, last, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """int32 (rows, words) of packed rows of WIDTH bytes; zero from word `last` on and outside of the matrix.

    ALIGNED: w_ptr points to whole words and so does every row; else the word is put together from bytes.
    """
    if ALIGNED:
        there = inside[:, None] & (column < last)[None, :]
        at = w_ptr + rows * (WIDTH // 4) + column[None, :]
        word = tl.load(at, mask=there, other=0, eviction_policy="evict_first")
    else:
        word = tl.zeros((rows.shape[0], column.shape[0]), tl.int32)
        for i in tl.static_range(4):
            byte = column * 4 + i
            there = inside[:, None] & ((column < last) & (byte < WIDTH))[None, :]
            word |= tl.load(w_ptr + rows * WIDTH + byte[None, :], mask=there, other=0).to(tl.int32) << (8 * i)
    return word


@triton.jit
def _value(u, VALUES: tl.constexpr):
    """What `fields` gives for a code u, in plain operations."""
    if len(VALUES) == 2:
        value = u * VALUES[1] + VALUES[0]
    else:
        value = u * 0
        for i in tl.static_range(len(VALUES)):
            value = tl.where(u == i, VALUES[i], value)
    return value


@triton.jit
def field_of_words(w, k: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr, VALUES: tl.constexpr,
                   ASM: tl.constexpr):  # fmt: skip
    """Field k of each byte of int32 words as four signed bytes of an int32."""
    if ASM:
        v = tl.inline_asm_elementwise(FIELDS[k], "=r,r", [w], dtype=tl.int32, is_pure=True, pack=1)
    else:
        v = tl.zeros_like(w)
        for i in tl.static_range(4):
            u = (w >> (8 * i + k * BITS)) & (2**BITS - 1)
            v |= (_value(u, VALUES) & 255) << (8 * i)
    return v


@triton.jit
def field_of_bytes(w, k: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr, VALUES: tl.constexpr,
                   ASM: tl.constexpr):  # fmt: skip
    """Field k of int8 bytes as int8, four bytes at a time."""
    if ASM:
        v = tl.inline_asm_elementwise(FIELDS[k], "=r,r", [w], dtype=tl.int8, is_pure=True, pack=4)
    else:
        v = _value((w.to(tl.int32) >> (k * BITS)) & (2**BITS - 1), VALUES).to(tl.int8)
    return v


@triton.jit
def dot4(v, x, a, ASM: tl.constexpr):
    """a + Σ of the products of four signed bytes, all int32."""
    if ASM:
        total = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [v, x, a], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        total = a
        for i in tl.static_range(4):
            total += ((v << (24 - 8 * i)) >> 24) * ((x << (24 - 8 * i)) >> 24)
    return total


@triton.jit
def differing(w, x, a, ASM: tl.constexpr):
    """a + the number of bits in which w and x differ, all int32."""
    v = w ^ x
    if ASM:
        count = tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [v], dtype=tl.int32, is_pure=True, pack=1)
    else:
        v = v - ((v >> 1) & 0x55555555)
        v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
        v = (v + (v >> 4)) & 0x0F0F0F0F
        v += v >> 8
        count = (v + (v >> 16)) & 63
    return a + count


@triton.jit
def whole(a, x_sum, w_sum, SIZE: tl.constexpr, FORM: tl.constexpr, DIGITS: tl.constexpr, WIDE: tl.constexpr):
    """The exact integer Σ of SIZE products of levels, in float32, from tuples of one or three digits.

    a: int32 (…), Σ v·a. x_sum: int32, Σ a, used where FORM has a shift. w_sum: int32, Σ of the weight's integers, used
    where x has an offset.
    WIDE: in int64, else in float32 where digits are put together and in int32 where there is one.
    """
    total = _affine(a[0], x_sum[0], FORM, WIDE)
    if DIGITS == 3:
        middle, low = _affine(a[1], x_sum[1], FORM, WIDE), _affine(a[2], x_sum[2], FORM, WIDE)
        if WIDE:
            value = ((total << 16) + (middle << 8) + low).to(tl.float32)
        else:
            value = total.to(tl.float32) * 65536.0 + (middle.to(tl.float32) * 256.0 + low.to(tl.float32))
    else:
        if FORM[4] != 0:
            total = total * FORM[3] + (w_sum.to(total.dtype) * FORM[5] + FORM[6] * SIZE) * FORM[4]
        value = total.to(tl.float32)
    return value


@triton.jit
def _affine(a, x_sum, FORM: tl.constexpr, WIDE: tl.constexpr):
    a = a >> FORM[2]  # exact: every product is a multiple of 2^down
    if WIDE:
        a = a.to(tl.int64)
    if FORM[1] != 0:
        a = a * FORM[0] + x_sum.to(a.dtype) * FORM[1]
    elif FORM[0] != 1:
        a = a * FORM[0]
    return a


@triton.jit
def store_row(out_ptr, bias_ptr, value, t, n, T, N, HAS_BIAS: tl.constexpr):
    """Add the bias and store the channels n of token t."""
    there = n < N
    if HAS_BIAS:
        value += tl.load(bias_ptr + n, mask=there, other=0.0).to(tl.float32)
    tl.store(out_ptr + t.to(tl.int64) * N + n, value.to(out_ptr.dtype.element_ty), mask=there & (t < T))

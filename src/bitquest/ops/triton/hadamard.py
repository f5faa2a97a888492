# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The block-Hadamard rotation as a product with a matrix of ±1 on tensor cores, and rounding to 16 bits.

A tile is (BLOCKS, L): L = 128 consecutive elements to a row of it, less only where a row of the operand is shorter. A
rotation in blocks of 2 to L is I ⊗ H_block on it, so that one shape of product serves every block size.

Why it is exact: ±1 and a bfloat16 (float16) multiply without rounding, tensor cores add in float32, and 1/√block comes
after, in float32. A float32 value is the sum of three bfloat16 numbers of 8 bits each: its upper 16 bits, the upper 16
bits of what they leave, and the rest. The differences are exact, and 3 × 8 bits hold the 24 of a float32. So three
products, the smallest part first, lose nothing that one float32 product would have kept.
"""

import triton
import triton.language as tl

# Decided when triton is imported, as @triton.jit itself decides.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

MAX_BLOCK = 128


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 x as `dtype`, rounded half to even (the interpreter would cut a bfloat16's bits off)."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        result = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result


@triton.jit
def signs(L: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    """Sylvester's matrices along the diagonal of (L, L): ±1 by the parity of i AND j, 0 between blocks.

    Written as bits, since a matrix is made by every program: 0x6996 holds the parities of 0 … 15.
    """
    i = tl.arange(0, L)[:, None]
    j = tl.arange(0, L)[None, :]
    common = i & j & (BLOCK - 1)
    common ^= common >> 4
    sign = (0x6996 << (15 - (common & 15))) & 0x8000
    bits = sign | (0x3C00 if dtype == tl.float16 else 0x3F80)
    if BLOCK < L:
        bits = tl.where((i // BLOCK) == (j // BLOCK), bits, 0)
    return bits.to(tl.uint16).to(dtype, bitcast=True)


@triton.jit
def _product(a, b):
    if INTERPRETED:  # which multiplies the bits of a bfloat16 as integers
        c = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        c = tl.dot(a, b)
    return c


@triton.jit
def _once(x):
    """x, computed by one thread for each element.

    Without this the compiler moves what made x behind the exchange of values between threads that a product needs,
    where every value is held by several threads: SiLU is computed twice and registers spill.
    """
    if INTERPRETED:
        y = x
    else:
        y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.float32, is_pure=False, pack=1)
    return y


@triton.jit
def _upper(x):
    """The upper 16 bits of float32 x, a bfloat16, and what is left of x: both exact."""
    bits = x.to(tl.uint32, bitcast=True)
    upper = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return upper, x - (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def rotate_unscaled(x, matrix, BLOCK: tl.constexpr):
    """√BLOCK·xH (BLOCKS, L) in float32 of x in float32, or in the 16-bit dtype of the matrix."""
    if BLOCK == 1:
        y = x.to(tl.float32)
    elif x.dtype == tl.float32:
        high, rest = _upper(_once(x))
        middle, rest = _upper(rest)
        low, rest = _upper(rest)
        # Doubled before they are added, lest the compiler chain the products: chained ones it lays out for attention,
        # and half of the warps then repeat the other half's work.
        y = _product(low, matrix) * 2.0
        y += _product(middle, matrix) * 2.0
        y = (y + _product(high, matrix) * 2.0) * 0.5
    else:
        y = _product(x, matrix)
    return y


@triton.jit
def rotate(x, matrix, BLOCK: tl.constexpr, SCALE: tl.constexpr):
    """xH (BLOCKS, L) in float32. SCALE: 1/√BLOCK."""
    y = rotate_unscaled(x, matrix, BLOCK)
    if BLOCK > 1:
        y = y * SCALE
    return y

"""What the few-bit kernels need to know about a weight grid: how the bits of a byte become signed 8-bit integers.

A byte of packed weights holds P = 8/bits codes. Field k of every byte of a 32-bit word is cut out at once, so that four
weights cost one or two instructions. The field is moved to the top of its byte and its top bit is flipped: the signed
byte is then c·2^(8−bits), and with the bit below the field set it is (2c + 1)·2^(7−bits), the odd integer itself. Where
there is no such bit (8 bits), or the levels have another middle (ternary), the affine rest is settled at the end with
the sums of the activations. Other grids of up to 4 bits look 16 integers up by byte permutation.
"""

from dataclasses import dataclass
from functools import lru_cache

from bitquest.errors import ConfigError
from bitquest.numerics.grids import Grid, UniformGrid
from bitquest.numerics.integers import IntegerForm, integer_form

WIDTHS = (1, 2, 4, 8)


@dataclass(frozen=True)
class WeightForm:
    """How packed bits become integers: a level is unit·(scale·v/2^down + shift), v the signed byte of `fields`.

    values: v of u = 0 and its increase with u, or all 4 or 16 values of v where it is looked up.
    fields: PTX per field of a byte, from a word of packed bytes ($1) to the four values v ($0).
    """

    form: IntegerForm
    scale: int
    shift: int
    down: int
    values: tuple[int, ...]
    fields: tuple[str, ...]

    @property
    def bits(self) -> int:
        return self.form.bits


@lru_cache(maxsize=64)
def weight_form(grid: Grid) -> WeightForm:
    """The form of a grid; ConfigError for a width or a codebook that these kernels cannot read."""
    form = integer_form(grid)
    if grid.bits not in WIDTHS:
        raise ConfigError(f"the few-bit kernels read weights of 1, 2, 4 or 8 bits, not {grid.bits}")
    if form is None:
        raise ConfigError(f"the levels of {grid} are no small multiples of a common unit: no integer product")
    half, down = 2 ** (grid.bits - 1), 8 - grid.bits
    even = tuple(_shifted(grid.bits, k, 0x80) for k in range(8 // grid.bits))
    if isinstance(grid, UniformGrid) and grid.bits < 8:
        odd = tuple(_shifted(grid.bits, k, 0x80 | 1 << (down - 1)) for k in range(8 // grid.bits))
        return WeightForm(form, 1, 0, down - 1, (1 - 2**grid.bits << down - 1, 2**down), odd)
    if isinstance(grid, UniformGrid):
        return WeightForm(form, 2, 1, 0, (-128, 1), even)
    assert form.table is not None
    gaps = {b - a for a, b in zip(form.table, form.table[1:], strict=False)}
    if len(gaps) == 1:  # evenly spaced, as ternary: a = gap·u + a₀ = gap·c + (a₀ + gap·half)
        gap = gaps.pop()
        return WeightForm(form, gap, form.table[0] + gap * half, down, (-128, 2**down), even)
    if grid.bits > 4:
        raise ConfigError(f"the few-bit kernels look up at most 16 levels; {grid} has {len(grid.levels)}")
    table = form.table + (0,) * (2**grid.bits - len(form.table))
    looked_up = tuple(_looked_up(grid.bits, k, table) for k in range(8 // grid.bits))
    return WeightForm(form, 1, 0, 0, table, looked_up)


def _shifted(bits: int, k: int, flip: int) -> str:
    """Field k moved to the top of each byte, and the bits `flip` of the byte flipped."""
    mask = (2**8 - 2 ** (8 - bits)) * 0x01010101
    left = 8 - bits - k * bits
    # 0x6A: (a & b) ^ c. A left shift can run as a multiplication, beside the logic unit, which a right shift cannot.
    return f"{{ .reg .b32 t; shl.b32 t, $1, {left}; lop3.b32 $0, t, {mask:#x}, {flip * 0x01010101:#x}, 0x6A; }}"


def _looked_up(bits: int, k: int, table: tuple[int, ...]) -> str:
    """Field k of each byte, replaced by its table entry: four indices are gathered into one selector of `prmt`."""
    mask = (2**bits - 1) * 0x01010101
    t = [sum((a & 0xFF) << (8 * j) for j, a in enumerate(table[i : i + 4])) for i in range(0, 16, 4)]
    gather = f"shr.u32 v, $1, {k * bits}; and.b32 v, v, {mask:#x}; shr.u32 s, v, 4; or.b32 s, s, v;" + (
        " prmt.b32 s, s, 0, 0x4420;"  # bytes 0 and 2 hold two indices each: u0 | u1 << 4, u2 | u3 << 4
    )
    if bits <= 2:
        return f"{{ .reg .b32 v, s; {gather} prmt.b32 $0, {t[0]:#x}, {t[1]:#x}, s; }}"
    # A selector has three bits and a flag, so the fourth bit of the index chooses between two lookups.
    return (
        f"{{ .reg .b32 v, s, l, h; {gather} and.b32 s, s, 0x7777;"
        f" prmt.b32 l, {t[0]:#x}, {t[1]:#x}, s; prmt.b32 h, {t[2]:#x}, {t[3]:#x}, s;"
        " shl.b32 v, v, 4; prmt.b32 v, v, 0, 0xBA98; lop3.b32 $0, v, h, l, 0xCA; }"  # 0xCA: v ? h : l
    )

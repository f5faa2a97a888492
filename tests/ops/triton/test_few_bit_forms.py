"""The PTX that cuts fields out of words, worked out here by a small emulator, since the interpreter cannot run it."""

import re

import pytest

from bitquest.numerics.grids import FP4, TERNARY, CodebookGrid, UniformGrid
from bitquest.numerics.integers import integer_form

pytest.importorskip("triton")

from bitquest.ops.triton.few_bit_forms import weight_form

ALL = (*(UniformGrid(bits) for bits in (1, 2, 4, 8)), TERNARY, FP4, CodebookGrid("lopsided", (-1.0, -0.25, 0.5, 2.0)))
WORD = 2**32 - 1


def run_ptx(code: str, word: int) -> int:
    """$0 after the instructions of one field, from $1 = word."""
    registers = {"$1": word}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0) & WORD

    for line in re.sub(r"\.reg[^;]*;", "", code.strip("{} ")).split(";"):
        if not line.strip():
            continue
        operation, operands = line.split(maxsplit=1)
        target, *names = (name.strip() for name in operands.split(","))
        a, b, *rest = (value(name) for name in names)
        match operation:
            case "shl.b32":
                made = a << b
            case "shr.u32":
                made = a >> b
            case "and.b32":
                made = a & b
            case "or.b32":
                made = a | b
            case "lop3.b32":
                c, table = rest
                bits = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1 for i in range(32))
                made = sum((table >> index & 1) << i for i, index in enumerate(bits))
            case "prmt.b32":
                made = permuted(a | b << 32, rest[0])
            case _:
                raise AssertionError(f"not emulated: {operation}")
        registers[target] = made & WORD
    return registers["$0"]


def permuted(pair: int, selector: int) -> int:
    """prmt: each nibble of the selector picks a byte of the pair, or with its highest bit eight times its sign."""
    result = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = pair >> 8 * (nibble & 7) & 255
        if nibble & 8:
            byte = 255 * (byte >> 7)
        result |= byte << 8 * i
    return result


@pytest.mark.parametrize("grid", ALL, ids=str)
def test_fields_become_the_integers_of_the_grid(grid: UniformGrid | CodebookGrid) -> None:
    form, levels = weight_form(grid), integer_form(grid)
    assert levels is not None
    for word in (*(u * 0x01010101 for u in range(256)), 0x1B2E8D74, 0xE4D18B27, 0xFF00A55A, 0x0123CDEF):
        for k, code in enumerate(form.fields):
            made = run_ptx(code, word)
            for i in range(4):
                u = word >> (8 * i + k * grid.bits) & (2**grid.bits - 1)
                if u >= len(grid.levels):
                    continue  # no code of this grid
                v = (made >> 8 * i & 255 ^ 128) - 128
                plain = form.values[0] + u * form.values[1] if len(form.values) == 2 else form.values[u]
                assert v == plain, (hex(word), k, i)
                assert v % 2**form.down == 0
                assert (form.scale * (v >> form.down) + form.shift) * levels.unit == grid.levels[u]

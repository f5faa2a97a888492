"""Products whose partial sums are as large as they can be: where narrow sums overflow or saturate, it shows here.

Random codes stay far from these bounds, so that other tests pass where these fail.
"""

import itertools

import pytest
import torch

from bitquest.numerics.grids import UniformGrid
from bitquest.numerics.integers import integer_form, integer_product
from bitquest.ops import native_linear
from bitquest.ops.rows import QuantizedRows

PAIRS = [
    *itertools.product((1, 2), range(1, 9)),
    *((bits, bits) for bits in range(3, 9)),
    (4, 8),
    (7, 8),
    (8, 1),
    (8, 4),
]


@pytest.mark.parametrize(("w_bits", "x_bits"), PAIRS)
def test_the_largest_and_smallest_sums_are_exact(isa: str, w_bits: int, x_bits: int):
    """Every pairing of lowest and highest codes, in rows longer than 16-bit sums of any kernel last."""
    w_form, x_form = integer_form(UniformGrid(w_bits)), integer_form(UniformGrid(x_bits))
    assert w_form is not None
    assert x_form is not None
    for width, tokens in ((9000, 9), (65003, 2)):
        codes = torch.full((5, width), 2 ** (w_bits - 1) - 1, dtype=torch.int8)
        codes[1] = -(2 ** (w_bits - 1))
        codes[2, ::2], codes[3, : width // 2] = codes[1, 0], codes[1, 0]
        x_codes = torch.full((tokens, width), 2 ** (x_bits - 1) - 1, dtype=torch.int8)
        x_codes[1::2] = -(2 ** (x_bits - 1))
        w_a, x_a = w_form.of_codes(codes), x_form.of_codes(x_codes)
        step = torch.ones(5, 1)
        prepared = native_linear.prepare(step, w_form, x_form, width, factors=w_a)
        rows = QuantizedRows(x_a, None, torch.ones(tokens, 1), None, None)
        made = native_linear.product(prepared, rows, 5, width, x_form, 1)
        assert torch.equal(made[:, 0], integer_product(x_a, w_a)), (width, tokens)


@pytest.mark.parametrize("width", [9000, 40000])  # 8 bits times 8 bits would need more than 31 bits from 33026 on
@pytest.mark.parametrize("w_bits", range(1, 9))
def test_floats_at_the_ends_of_their_digits(isa: str, w_bits: int, width: int):
    """Weight-only rows whose digits are as large as they can be."""
    form = integer_form(UniformGrid(w_bits))
    assert form is not None
    codes = torch.full((5, width), 2 ** (w_bits - 1) - 1, dtype=torch.int8)
    codes[1] = -(2 ** (w_bits - 1))
    x = torch.empty(4, width)
    for row, digits in enumerate(((127, 127, 126), (-128, -128, -126), (-128, -128, 126), (127, 127, -126))):
        low, middle, high = digits
        x[row] = (low + 256 * middle + 65536 * high) / 8355000
        x[row, 0] = 1.0  # the scale of the row's digits
    factors = form.of_codes(codes)
    prepared = native_linear.prepare(torch.ones(5, 1), form, None, width, factors=factors)
    made = native_linear.linear(prepared, x, 5, width)
    levels = (factors.double() * form.factor + form.offset) * form.unit
    torch.testing.assert_close(made.double(), x.double() @ levels.T, rtol=2e-6, atol=0)

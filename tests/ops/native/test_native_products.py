"""The products of the native engine against numerics: every width, odd shapes, every instruction set of this machine.

Integers must be equal; outputs agree with a float64 reference to float32 rounding; threads do not change a bit.
"""

import ctypes
import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.grids import FP4, TERNARY, Grid, UniformGrid
from bitquest.numerics.integers import IntegerForm, integer_form, integer_linear, integer_product
from bitquest.numerics.packing import pack
from bitquest.ops import native, native_abi, native_linear
from bitquest.ops.rows import QuantizedRows

pytestmark = pytest.mark.skipif(not native.availability()[0], reason="the native engine is not built here")

ROWS = (1, 2, 3, 7, 33, 96, 130)
CHANNELS = (1, 5, 17, 64, 129)
WIDTHS = (1, 8, 31, 128, 200, 288, 1000)
SHAPES = [
    *((tokens, channels, 200) for tokens, channels in zip(ROWS, itertools.cycle(CHANNELS), strict=False)),
    *((tokens, 17, width) for tokens, width in zip(itertools.cycle((1, 3, 14)), WIDTHS, strict=False)),
    (1, 129, 288),
    (130, 129, 31),
    (13, 333, 600),  # many tokens and channels: tables, where they are used
]
FORMATS: dict[str, Grid] = {**{f"{bits}": UniformGrid(bits) for bits in range(1, 9)}, "ternary": TERNARY, "fp4": FP4}
PAIRS = [
    *(("1", str(bits)) for bits in range(1, 9)),
    *(("2", str(bits)) for bits in range(1, 9)),
    *((str(bits), str(bits)) for bits in range(3, 9)),
    *((str(bits), "8") for bits in (3, 4, 5, 6, 7)),
    *((weight, "1") for weight in ("4", "8", "ternary")),
    *((name, name) for name in ("ternary", "fp4")),
    ("ternary", "8"),
    ("1", "fp4"),
    ("8", "4"),
]


@dataclass
class Operand:
    """Integers and steps of an operand, and the levels they stand for in float64."""

    form: IntegerForm
    codes: Tensor
    factors: Tensor
    step: Tensor
    kept: Tensor | None

    @property
    def levels(self) -> Tensor:
        integers = self.factors.double() * self.form.factor + self.form.offset
        groups = self.step.shape[1]
        return integers * self.step.double().repeat_interleave(integers.shape[1] // groups, 1) * self.form.unit

    def packed(self) -> Tensor:
        return pack(self.codes, self.form.bits)

    def rows(self, packed_only: bool = False) -> QuantizedRows:
        return QuantizedRows(
            None if packed_only else self.factors,
            self.packed() if self.form.bits == 1 else None,
            self.step,
            None,
            None,
        )


def operand(name: str, rows: int, width: int, groups: int = 1, keep: tuple[int, int] | None = None) -> Operand:
    """Random codes of a format, and with `keep` = (n, m) only n of every m consecutive ones."""
    grid = FORMATS[name]
    form = integer_form(grid)
    assert form is not None
    codes = torch.randint(0, len(grid.levels), (rows, width)).sub_(2 ** (form.bits - 1)).to(torch.int8)
    kept = None
    if keep is not None:
        order = torch.rand(rows, width // keep[1], keep[1]).argsort(-1)
        kept = (order < keep[0]).flatten(1)
    step = (torch.rand(rows, groups) + 0.5) / 2**form.bits
    return Operand(form, codes, form.of_codes(codes, kept), step, kept)


@pytest.fixture(params=native.isas() if native.availability()[0] else ("none",))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """The library on one instruction set: a copy of its own, because a library chooses once."""
    name = str(request.param)
    monkeypatch.setenv("BITQUEST_ISA", name)
    own = tmp_path / "_native.so"
    shutil.copy(native_abi.LIBRARY, own)
    monkeypatch.setattr(native_abi, "LIBRARY", own)
    native_abi.open_library.cache_clear()
    found = native.library()
    assert found.bq_isa().decode() == name
    yield name
    native_abi.open_library.cache_clear()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the wrappers allocate is full of garbage, so that an element nobody wrote shows."""
    torch.manual_seed(0)
    empty = torch.empty

    def garbage(*size: Any, **options: Any) -> Tensor:
        made: Tensor = empty(*size, **options)
        return made.fill_(float("nan") if made.is_floating_point() else 0x5A)

    monkeypatch.setattr(torch, "empty", garbage)


def prepared(w: Operand, x_form: IntegerForm | None, from_factors: bool = False) -> Tensor:
    source = {"factors": w.factors} if from_factors else {"packed": w.packed()}
    return native_linear.prepare(w.step, w.form, x_form, w.codes.shape[1], kept=w.kept, **source)


def close(y: Tensor, x_levels: Tensor, w_levels: Tensor, bias: Tensor | None = None, rounding: float = 2e-6) -> None:
    """y equals the float64 product but for `rounding` of the sum of magnitudes, or of 2^-8 for bfloat16."""
    expected = x_levels @ w_levels.T
    if bias is not None:
        expected += bias.double()
    slack = rounding * (x_levels.abs() @ w_levels.abs().T + 1e-30)
    if y.dtype != torch.float32:
        slack += expected.abs() * (2**-8 if y.dtype == torch.bfloat16 else 2**-10)
    assert not y.isnan().any()
    worst = ((y.double() - expected).abs() - slack).max()
    assert worst <= 0, f"off by {worst} beyond rounding"


@pytest.mark.parametrize(("weight", "activation"), PAIRS)
def test_integers_are_exact(isa: str, weight: str, activation: str) -> None:
    for index, (tokens, channels, width) in enumerate(SHAPES):
        w, x = operand(weight, channels, width), operand(activation, tokens, width)
        made = prepared(w, x.form, from_factors=index % 3 == 2)
        rows = x.rows(packed_only=x.form.bits == 1 and index % 2 == 0)
        y = native_linear.product(made, rows, channels, width, x.form, 1)
        assert torch.equal(y[:, 0], integer_product(x.factors, w.factors)), (tokens, channels, width)


@pytest.mark.parametrize(("weight", "activation"), PAIRS)
def test_outputs_are_the_products_of_the_levels(isa: str, weight: str, activation: str) -> None:
    for tokens, channels, width in ((1, 5, 31), (2, 64, 200), (3, 17, 128), (14, 33, 288), (96, 33, 64)):
        w, x = operand(weight, channels, width), operand(activation, tokens, width)
        made = prepared(w, x.form)
        bias = torch.randn(channels)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            y = native_linear.linear(made, x.rows(), channels, width, x.form, bias, dtype)
            assert y.dtype == dtype
            close(y, x.levels, w.levels, bias)
        y = native_linear.linear(made, x.rows(), channels, width, x.form)
        torch.testing.assert_close(y, integer_linear(x.factors, x.step, w.factors, w.step, x.form, w.form))


@pytest.mark.parametrize(("x_size", "w_size"), [(32, 32), (64, 64), (128, 128), (0, 64), (64, 0), (32, 128), (40, 40)])
@pytest.mark.parametrize("pair", [("1", "1"), ("2", "2"), ("1", "4"), ("4", "4"), ("1", "8"), ("8", "8"), ("3", "fp4")])
def test_scale_groups(isa: str, pair: tuple[str, str], x_size: int, w_size: int) -> None:
    width = 640
    w_groups, x_groups = (width // size if size else 1 for size in (w_size, x_size))
    for tokens, channels in ((1, 33), (3, 16), (17, 50), (8, 260)):
        w, x = operand(pair[0], channels, width, w_groups), operand(pair[1], tokens, width, x_groups)
        made = prepared(w, x.form)
        groups = max(x_groups, w_groups)
        y = native_linear.product(made, x.rows(), channels, width, x.form, groups)
        for g in range(groups):
            part = slice(g * width // groups, (g + 1) * width // groups)
            expected = integer_product(x.factors[:, part].contiguous(), w.factors[:, part].contiguous())
            assert torch.equal(y[:, g], expected), g
        close(native_linear.linear(made, x.rows(), channels, width, x.form), x.levels, w.levels)


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7])
def test_sparse_weights(isa: str, bits: int, pattern: tuple[int, int]) -> None:
    for (tokens, channels, width), x_bits in itertools.product(((1, 17, 64), (5, 33, 200)), (bits, 8)):
        w, x = operand(str(bits), channels, width, keep=pattern), operand(str(x_bits), tokens, width)
        for from_factors in (False, True):
            made = prepared(w, x.form, from_factors)
            y = native_linear.product(made, x.rows(), channels, width, x.form, 1)
            assert torch.equal(y[:, 0], integer_product(x.factors, w.factors))
            close(native_linear.linear(made, x.rows(), channels, width, x.form), x.levels, w.levels)


@pytest.mark.parametrize("weight", [*FORMATS])
@pytest.mark.parametrize("groups", [1, 5])
def test_weight_only(isa: str, weight: str, groups: int) -> None:
    for tokens, channels, width in ((1, 17, 200), (2, 64, 320), (5, 33, 1000), (33, 17, 160), (7, 300, 60)):
        w, x = operand(weight, channels, width, groups), torch.randn(tokens, width + 3)[:, :width]
        x[0, 3] = 60.0  # an outlier
        y = native_linear.linear(prepared(w, None), x, channels, width)
        close(y, x.double(), w.levels)


def test_weight_only_of_zeros_and_of_what_is_not_finite(isa: str) -> None:
    w = operand("4", 17, 64)
    x = torch.randn(4, 64)
    x[0], x[1, 5], x[2, 7] = 0, float("nan"), float("inf")
    y = native_linear.linear(prepared(w, None), x, 17, 64)
    assert (y[0] == 0).all()
    assert not y[1:3].isfinite().any()
    close(y[3:], x[3:].double(), w.levels)


@pytest.mark.parametrize("pair", [("1", "1"), ("2", "2"), ("4", "4"), ("1", "8"), ("8", "8"), ("4", "16")])
def test_threads_give_the_same_bits(isa: str, pair: tuple[str, str]) -> None:
    """Shapes large enough that threads are used at all."""
    before = torch.get_num_threads()
    for tokens, channels, groups in ((1, 900, 1), (13, 129, 5), (40, 64, 1)):
        w = operand(pair[0], channels, 640, groups)
        x = None if pair[1] == "16" else operand(pair[1], tokens, 640, groups)
        rows = torch.randn(tokens, 640) if x is None else x.rows()
        form = None if x is None else x.form
        results = []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(native_linear.linear(prepared(w, form), rows, channels, 640, form))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("pair", [("1", "1"), ("1", "4"), ("1", "7"), ("1", "8"), ("2", "2"), ("4", "8"), ("8", "8")])
def test_the_largest_sums_fit(isa: str, pair: tuple[str, str]) -> None:
    """Every element at an end of its grid: the bounds that let kernels add up in few bits."""
    for x_end, w_end in itertools.product((0, -1), repeat=2):
        w, x = operand(pair[0], 257, 1280), operand(pair[1], 13, 1280)
        for part, end in ((w, w_end), (x, x_end)):
            part.codes.fill_(2 ** (part.form.bits - 1) * (-1 if end == 0 else 1) + end)
            part.factors.copy_(part.form.of_codes(part.codes))
        y = native_linear.product(prepared(w, x.form), x.rows(), 257, 1280, x.form, 1)
        assert torch.equal(y[:, 0], integer_product(x.factors, w.factors))


def test_dots_beyond_31_bits(isa: str) -> None:
    """The widest 8-bit row: each of 40000 products is 255 * 255."""
    w, x = operand("8", 17, 40000), operand("8", 2, 40000)
    for part in (w, x):
        part.codes.fill_(127)
        part.factors.fill_(127)
    x.factors[1] = -128
    y = native_linear.linear(prepared(w, x.form), x.rows(), 17, 40000, x.form)
    close(y, x.levels, w.levels)


def test_no_rows(isa: str) -> None:
    w, x = operand("4", 5, 64), operand("4", 0, 64)
    assert native_linear.linear(prepared(w, x.form), x.rows(), 5, 64, x.form).shape == (0, 5)


@pytest.mark.parametrize(("weight", "activation"), [*PAIRS, ("2", None), ("8", None), ("4", None)])
def test_codes_and_factors_are_laid_out_alike(isa: str, weight: str, activation: str | None) -> None:
    x_form = None if activation is None else integer_form(FORMATS[activation])
    for channels, width, groups in ((5, 64, 1), (17, 31, 1), (3, 200, 1), (33, 128, 4), (2, 96, 2), (18, 80, 5)):
        w = operand(weight, channels, width, groups)
        made = [prepared(w, x_form, from_factors=way) for way in (False, True)]
        assert torch.equal(*made), (channels, width, groups)


def test_a_factor_off_the_grid_is_refused(isa: str) -> None:
    if isa == "portable":
        pytest.skip("takes any int8")
    w = operand("2", 5, 64)
    w.factors[3, 7] = 2
    with pytest.raises(ConfigError):
        prepared(w, integer_form(UniformGrid(4)), from_factors=True)


def test_outputs_and_sources_stay_inside_their_arrays(isa: str) -> None:
    """Arrays inside larger ones: what lies around them is neither read into the result nor written."""
    w, x = operand("4", 17, 31), operand("4", 5, 31)
    made = prepared(w, x.form)
    c, held = native_linear._activation(x.rows(), 31, x.form)
    field = torch.full((9, 40), 7.0)
    out = field[2:7, 11:28]
    to = native_abi.COutput(out=out.data_ptr(), channels=17, stride=40, dtype=native_abi.FLOAT32, threads=2)
    code = native.library().bq_linear(made.data_ptr(), made.numel(), ctypes.byref(c), ctypes.byref(to))
    assert code == 0
    del held
    close(out.contiguous(), x.levels, w.levels)
    around = torch.ones_like(field, dtype=torch.bool)
    around[2:7, 11:28] = False
    assert (field[around] == 7).all()

"""Exact integer arithmetic: the products of METHOD against int64."""

import os
import subprocess
import sys

import pytest
import torch

from bitquest.numerics import (
    ALL_GRIDS,
    FP4,
    FP8,
    TERNARY,
    CodebookGrid,
    NofM,
    NoRotation,
    PerGroup,
    Quantizer,
    UniformGrid,
    dequantize,
    encode,
    integer_form,
    integer_linear,
    integers,
    lloyd_max_grid,
    weight_only_linear,
)
from bitquest.numerics.integers import integer_product

GRIDS = [grid for grid in ALL_GRIDS if integer_form(grid) is not None]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_level_is_its_integer(grid: object) -> None:
    form = integer_form(grid)  # type: ignore[arg-type]
    assert form is not None
    lowest = -(2 ** (grid.bits - 1))  # type: ignore[attr-defined]
    codes = torch.arange(lowest, lowest + len(grid.levels), dtype=torch.int8)  # type: ignore[attr-defined]
    a = form.of_codes(codes)
    assert a.dtype == torch.int8
    integers = form.factor * a.double() + form.offset
    assert torch.equal(form.unit * integers, torch.tensor(grid.levels, dtype=torch.float64))  # type: ignore[attr-defined]
    assert int(integers.abs().max()) <= form.largest


def test_forms_of_method() -> None:
    assert sorted({abs(a) for a in integer_form(FP4).table}) == [0, 1, 2, 3, 4, 6, 8, 12]  # type: ignore[union-attr,arg-type]
    assert integer_form(TERNARY).table == (-1, 0, 1)  # type: ignore[union-attr]
    assert [g for g in ALL_GRIDS if g not in GRIDS] == [lloyd_max_grid(3), FP8]  # no small multiples of a common unit
    assert integer_form(CodebookGrid("nf", (-1.0, -0.333, 0.4, 1.0))) is None


@pytest.mark.parametrize("w_grid", GRIDS, ids=str)
@pytest.mark.parametrize("x_grid", GRIDS, ids=str)
@pytest.mark.parametrize("groups", [(None, None), (32, 64), (None, 32), (64, None)], ids=str)
def test_integer_linear_is_exact(x_grid: object, w_grid: object, groups: tuple) -> None:
    def spec(grid: object, size: int | None) -> Quantizer:
        return Quantizer(grid, PerGroup(size)) if size else Quantizer(grid)  # type: ignore[arg-type]

    x_spec, w_spec = spec(x_grid, groups[0]), spec(w_grid, groups[1])
    x = encode(torch.randn(5, 192), x_spec, NoRotation())
    w = encode(torch.randn(7, 192), w_spec, NoRotation())
    x_form, w_form = integer_form(x_spec.grid), integer_form(w_spec.grid)
    assert x_form is not None
    assert w_form is not None
    got = integer_linear(x_form.of_codes(x.codes), x.step, w_form.of_codes(w.codes), w.step, x_form, w_form)
    x_values = dequantize(x.codes, x.step, x_spec.grid).double()
    w_values = dequantize(w.codes, w.step, w_spec.grid).double()
    expected = x_values @ w_values.T
    assert float((got - expected).abs().max()) <= 2e-6 * float(
        x_values.abs().double() @ w_values.abs().T.double() @ torch.ones(7).double() @ torch.ones(5).double() / 35
    )
    alone = weight_only_linear(x_values.float(), w_form.of_codes(w.codes), w.step, w_form)
    assert torch.allclose(alone.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 31, 64])
@pytest.mark.parametrize("channels", [1, 2, 3, 33])
def test_products_of_every_shape(tokens: int, width: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randint(-128, 128, (tokens, width), generator=generator, dtype=torch.int8)
    wide = torch.randint(-128, 128, (channels, width + 7), generator=generator, dtype=torch.int8)
    for w in (wide[:, :width].contiguous(), wide[:, 5 : 5 + width]):
        assert torch.equal(integer_product(x, w).long(), x.long() @ w.long().t())


def test_autocast_does_not_reach_the_weight_only_product() -> None:
    grid = UniformGrid(4)
    form, x = integer_form(grid), torch.randn(5, 64)
    w = encode(torch.randn(7, 64), Quantizer(grid), NoRotation())
    assert form is not None
    exact = weight_only_linear(x, form.of_codes(w.codes), w.step, form)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(weight_only_linear(x, form.of_codes(w.codes), w.step, form), exact)


def test_unit_steps_give_the_integer_itself() -> None:
    """Widest case, 8 × 8 bits, K = 20000: the accumulator passes 2^31 before it is scaled."""
    codes = torch.full((1, 20000), 127, dtype=torch.int8)
    form = integer_form(UniformGrid(8))
    assert form is not None
    got = integer_linear(codes, torch.ones(1, 1), codes, torch.ones(1, 1), form, form)
    assert float(got) == pytest.approx(255 * 255 * 20000 / 4, rel=1e-7)
    assert 255 * 255 * 40000 > 2**31
    wide = torch.full((1, 40000), 127, dtype=torch.int8)
    got = integer_linear(wide, torch.ones(1, 1), wide, torch.ones(1, 1), form, form)
    assert float(got) == pytest.approx(255 * 255 * 40000 / 4, rel=1e-7)


@pytest.mark.parametrize("bits", range(1, 8))
def test_sparse_integers_carry_the_mask(bits: int) -> None:
    spec = Quantizer(UniformGrid(bits), sparsity=NofM(2, 4, pair=True))
    codes, step, kept = encode(torch.randn(6, 64), spec, NoRotation())
    assert kept is not None
    form = integer_form(spec.grid)
    assert form is not None
    integers = form.of_codes(codes, kept)
    assert int((integers != 0).sum()) == 6 * 32
    assert torch.equal(integers.float() * form.unit * step, dequantize(codes, step, spec.grid, kept))


def test_one_bit_identities() -> None:
    """±1 vectors: dot = K − 2·popcount(a XOR w) = K − 2Σa − 2Σw + 4·popcount(a AND w)."""
    generator = torch.Generator().manual_seed(0)
    a, w = (torch.randint(0, 2, (77,), generator=generator) for _ in range(2))
    dot = int(((2 * a - 1) * (2 * w - 1)).sum())
    assert dot == 77 - 2 * int((a ^ w).sum())
    assert dot == 77 - 2 * int(a.sum()) - 2 * int(w.sum()) + 4 * int((a & w).sum())


@pytest.mark.parametrize("width", [1, 31, 1024, 1025, 3000])
def test_a_processor_whose_int8_product_saturates_takes_another(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randint(-128, 128, (5, width), generator=generator, dtype=torch.int8)
    w = torch.randint(-128, 128, (7, width), generator=generator, dtype=torch.int8)
    x[0], w[0], w[1] = -128, -128, 127
    monkeypatch.setattr(integers, "_torch_is_exact", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    assert torch.equal(integers.integer_product(x, w), (x.to(torch.int64) @ w.to(torch.int64).t()).to(torch.int32))


def test_a_saturating_product_is_found_out() -> None:
    code = (
        "import torch; from bitquest.numerics import integers; print(integers._torch_is_exact());"
        "x, w = (torch.randint(-128, 128, (9, 256), dtype=torch.int8) for _ in range(2));"
        "assert torch.equal(integers.integer_product(x, w), (x.int() @ w.int().t()))"
    )
    for isa in ("AVX2", "AVX512_CORE"):
        environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

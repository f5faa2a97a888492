"""Number formats against their definitions: Lloyd-Max tables, FP8, and the block scales of MXFP4 and NVFP4."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.nn import Scheme
from bitquest.numerics import (
    FP4,
    FP8,
    NoRotation,
    PerGroup,
    PerRow,
    PowerOfTwo,
    Quantizer,
    TwoLevel,
    encode,
    fake_quantize,
    gaussian_mse,
    lloyd_max_grid,
    lloyd_max_levels,
)

PLAIN = NoRotation()


def parts(name: str) -> tuple[Quantizer, Quantizer]:
    scheme = Scheme.parse(name)
    assert scheme.weight is not None
    assert scheme.activation is not None
    return scheme.weight, scheme.activation


# --- Lloyd-Max -------------------------------------------------------------------------------------------------------


# Max, Quantizing for Minimum Distortion, IRE Trans. Inf. Theory 6 (1960), table I: output levels and error for N(0, 1).
MAX_1960 = {
    1: ([0.7980], 0.3634),
    2: ([0.4528, 1.510], 0.1175),
    3: ([0.2451, 0.7560, 1.344, 2.152], 0.03454),
    4: ([0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
    5: ([0.06590, 0.1981, 0.3314, 0.4668, 0.6050, 0.7473, 0.8947, 1.049, 1.212, 1.387, 1.577, 1.788, 2.029, 2.319,
         2.692, 3.263], 0.002499),
}  # fmt: skip


@pytest.mark.parametrize("bits", MAX_1960)
def test_lloyd_max_agrees_with_the_published_table(bits: int) -> None:
    positive, error = MAX_1960[bits]
    levels = lloyd_max_levels(bits)
    assert levels == tuple(-level for level in reversed(levels))
    assert levels[2 ** (bits - 1) :] == pytest.approx(positive, rel=1.5e-3)
    assert gaussian_mse(levels, 1.0) == pytest.approx(error, rel=3e-3)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_lloyd_max_level_is_the_mean_of_its_cell(bits: int) -> None:
    levels = lloyd_max_levels(bits)
    assert len(levels) == 2**bits
    bounds = [-math.inf, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]
    for level, low, high in zip(levels, bounds, bounds[1:], strict=False):
        mass = (math.erf(high / 2**0.5) - math.erf(low / 2**0.5)) / 2
        moment = (math.exp(-low * low / 2) - math.exp(-high * high / 2)) / math.sqrt(2 * math.pi)
        assert level == pytest.approx(moment / mass, abs=1e-6 / mass**0.5)
    assert lloyd_max_grid(bits).clip_multiplier == pytest.approx(levels[-1], rel=1e-6)


def test_lloyd_max_beats_the_uniform_grid() -> None:
    x = torch.randn(200, 512, generator=torch.Generator().manual_seed(0))
    for bits, ideal in ((2, 0.11748), (3, 0.034548), (4, 0.009501)):
        lloyd = fake_quantize(x, parts(f"w{bits}a{bits}-lloyd")[0], PLAIN)
        uniform = fake_quantize(x, parts(f"w{bits}a{bits}")[0], PLAIN)
        assert float((lloyd - x).square().mean()) == pytest.approx(ideal, rel=0.02)
        if bits > 1:
            assert float((lloyd - x).square().mean()) < float((uniform - x).square().mean())


# --- FP8 -------------------------------------------------------------------------------------------------------------


def test_fp8_has_the_finite_values_of_e4m3() -> None:
    patterns = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    assert FP8.levels == tuple(patterns[patterns.isfinite()].unique().tolist())
    assert (len(FP8.levels), FP8.levels[-1], FP8.bits) == (253, 448.0, 8)


def test_fp8_scales_a_row_to_its_largest_magnitude() -> None:
    weight, activation = parts("w8a8-fp8")
    assert weight.granularity == activation.granularity == PerRow()
    x = torch.randn(7, 96, generator=torch.Generator().manual_seed(0))
    scale = x.abs().amax(1, keepdim=True) / 448
    expected = (x / scale).to(torch.float8_e4m3fn).to(torch.float32) * scale
    torch.testing.assert_close(fake_quantize(x, weight, PLAIN), expected, rtol=1e-5, atol=1e-6)


# --- MXFP4 -----------------------------------------------------------------------------------------------------------

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def nearest_e2m1(value: float) -> float:
    return math.copysign(min(E2M1, key=lambda level: abs(level - abs(value))), value)


@pytest.mark.parametrize(
    ("largest", "scale", "became"),
    [(5.0, 1.0, 4.0), (7.9, 1.0, 6.0), (8.0, 2.0, 8.0), (4.0, 1.0, 4.0), (3.99, 0.5, 3.0), (0.3, 0.0625, 0.25)],
)
def test_mxfp4_by_hand(largest: float, scale: float, became: float) -> None:
    """OCP MX v1.0, section 6.3: X = 2^(⌊log2 max⌋ − 2); what exceeds 6X is clipped to it."""
    x = torch.zeros(1, 64)
    x[0, 3], x[0, 40] = -largest, 1.0
    codes, step, _ = encode(x, parts("w4a4-norot-mxfp4")[0], PLAIN)
    assert step.tolist() == [[scale, 0.25]]
    values = fake_quantize(x, parts("w4a4-norot-mxfp4")[0], PLAIN)
    expected = {5.0: [-4.0, -6.0], 7.9: [-6.0]}.get(largest, [-became])
    assert float(values[0, 3]) in expected
    assert float(values[0, 40]) == 1.0
    assert int((codes != 0).sum()) >= 2


def test_mxfp4_by_its_definition() -> None:
    weight, activation = parts("w4a4-norot-mxfp4-ste")
    assert weight == activation
    assert weight.granularity == PerGroup(32)
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)) * 3
    got = fake_quantize(x, weight, PLAIN)
    for row in range(5):
        for start in range(0, 96, 32):
            block = x[row, start : start + 32].tolist()
            scale = 2.0 ** (math.floor(math.log2(max(map(abs, block)))) - 2)
            assert got[row, start : start + 32].tolist() == [nearest_e2m1(v / scale) * scale for v in block]


def test_power_of_two_scales_at_the_ends_of_float32() -> None:
    x = torch.zeros(5, 32)
    x[1, 0], x[2, 0], x[3, 0], x[4, 0] = 1e-38, 3e38, float("nan"), float("inf")
    step = encode(x, Quantizer(FP4, PerGroup(32), PowerOfTwo()), PLAIN).step.flatten()
    assert step[:3].tolist() == [2.0**-126, 2.0**-126, 2.0**125]
    assert bool(torch.frexp(step[:3]).mantissa.eq(0.5).all())
    assert step[3:].isfinite().tolist() == [False, False]
    assert bool((fake_quantize(x[:1], Quantizer(FP4, PerGroup(32), PowerOfTwo()), PLAIN) == 0).all())


# --- NVFP4 -----------------------------------------------------------------------------------------------------------


def nvfp4(x: Tensor, shared: Tensor) -> Tensor:
    """arXiv 2509.25149: block scale E4M3(max|block|/6/s), s = max|x|/(6·448) over what shares it; x in blocks of 16."""
    s = (shared.double() / (6 * 448)).unsqueeze(-1)
    blocks = x.double().unflatten(-1, (-1, 16))
    factor = (blocks.abs().amax(-1, keepdim=True) / 6 / s).float().to(torch.float8_e4m3fn).double()
    levels = torch.tensor(sorted({*E2M1, *(-v for v in E2M1)}), dtype=torch.float64)
    t = blocks / (factor * s)
    return (levels[(t.unsqueeze(-1) - levels).abs().argmin(-1)] * factor * s).flatten(-2)


def test_nvfp4_by_its_definition() -> None:
    """One float32 scale for a weight tensor, one for each token of an activation; E4M3 factors for blocks of 16."""
    weight, activation = parts("w4a4-norot-nvfp4")
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 6).unsqueeze(1)
    whole, rows = x.abs().amax().reshape(1, 1), x.abs().amax(1, keepdim=True)
    torch.testing.assert_close(fake_quantize(x, weight, PLAIN).double(), nvfp4(x, whole), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(fake_quantize(x, activation, PLAIN).double(), nvfp4(x, rows), rtol=1e-5, atol=1e-7)


def test_a_token_of_nvfp4_does_not_see_later_ones() -> None:
    _, activation = parts("w4a4-nvfp4")
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    changed = torch.cat([x[:2], x[2:] * 1000])
    before, after = (fake_quantize(t, activation, PLAIN) for t in (x, changed))
    assert torch.equal(before[:2], after[:2])
    assert not torch.equal(before[2:], after[2:])


def test_small_blocks_of_nvfp4_keep_a_step() -> None:
    """The smallest E4M3 factor is 2^−9: below, a block's scale would be zero and its values divided by it."""
    x = torch.full((1, 32), 1e-9)
    x[0, 0] = 1000.0
    for shared in ("tensor", "row"):
        quantizer = Quantizer(FP4, PerGroup(16), TwoLevel(shared))
        values = fake_quantize(x, quantizer, PLAIN)
        assert bool(values.isfinite().all())
        assert float(encode(x, quantizer, PLAIN).step[0, 1]) == pytest.approx(1000 / 2688 / 512)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoLevel("layer"), "a 'tensor' or a 'row', not 'layer'"),
        (lambda: Quantizer(FP4, PerRow(), TwoLevel()), r"take PerGroup\(size\)"),
        (lambda: Scheme(activation=Quantizer(FP4, PerGroup(16), TwoLevel("tensor"))), r"TwoLevel\('row'\)"),
        (lambda: lloyd_max_grid(9), "1 to 8 bits"),
    ],
)
def test_formats_that_are_none(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]

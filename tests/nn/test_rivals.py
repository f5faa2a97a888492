"""What the papers of other methods say, from their own formulas in float64, against the schemes of their names."""

import math

import pytest
import torch
from torch import Tensor, nn

from bitquest.errors import ConfigError
from bitquest.nn import PackedLinear, QuantizedLinear, Scheme, quantize_
from bitquest.nn.quantizer import ActivationQuantizer, WeightQuantizer, regularized_clips
from bitquest.numerics import (
    TERNARY,
    AbsMax,
    Learned,
    NoRotation,
    PerTensor,
    Quantizer,
    StraightThrough,
    UniformGrid,
    encode,
    fake_quantize,
    integer_grid,
)
from bitquest.numerics.fake_quant import fit_offset
from bitquest.ops.backend import BackendError
from bitquest.training.config import OptimizerSection
from bitquest.training.optim import make_optimizer

PLAIN = NoRotation()


def weight(name: str) -> Quantizer:
    spec = Scheme.parse(name).weight
    assert spec is not None
    return spec


def activation(name: str) -> Quantizer:
    spec = Scheme.parse(name).activation
    assert spec is not None
    return spec


def tensor(*values: float) -> Tensor:
    return torch.tensor([values])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(x: Tensor, spec: Quantizer, step: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Those of x and of the step."""
    x, step = x.clone().requires_grad_(), step.clone().requires_grad_()
    fake_quantize(x, spec, PLAIN, step).backward(gradient)
    assert x.grad is not None
    assert step.grad is not None
    return x.grad, step.grad


# --- straight-through ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w1a1-norot-ste", "w2a2-norot-ste", "w4a4-norot-mxfp4-ste"])
def test_straight_through_passes_everything(name: str) -> None:
    x = (normal(4, 64) * 5).requires_grad_()
    fake_quantize(x, weight(name), PLAIN).sum().backward()
    assert x.grad is not None
    assert bool((x.grad == 1).all())


# --- LSQ -------------------------------------------------------------------------------------------------------------


def test_lsq_at_three_bits_by_hand() -> None:
    """1902.08153: Q_N = 4, Q_P = 3 (section 2), eq. 1 and 2 forward, eq. 3 and 5 backward, g = 1/√(N·Q_P)."""
    spec = weight("w3a3-norot-lsq")
    assert spec.grid.levels == (-4, -3, -2, -1, 0, 1, 2, 3)
    x, s, g = tensor(-9.0, -0.7, 0.2, 1.3, 2.6, 4.0), torch.tensor([[1.0]]), tensor(1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
    assert fake_quantize(x, spec, PLAIN, s).tolist() == [[-4, -1, 0, 1, 3, 3]]
    d_x, d_s = gradients(x, spec, s, g)
    assert d_x.tolist() == [[0, 10, 100, 1000, 10000, 0]]
    each = [-4, -1 + 0.7, 0 - 0.2, 1 - 1.3, 3 - 2.6, 3]
    expected = sum(a * 10.0**i for i, a in enumerate(each)) / math.sqrt(6 * 3)
    assert float(d_s) == pytest.approx(expected, rel=1e-5)


def test_lsq_starts_at_twice_the_mean_magnitude() -> None:
    """Section 2.1: 2⟨|v|⟩/√Q_P; one step per layer in the paper (`-tensor`), one per row here."""
    w = normal(5, 64)
    for bits in (2, 4, 8):
        per_row = WeightQuantizer(weight(f"w{bits}a{bits}-norot-lsq"), w, PLAIN).effective_step()
        whole = WeightQuantizer(weight(f"w{bits}a{bits}-tensor-norot-lsq"), w, PLAIN).effective_step()
        q_p = 2 ** (bits - 1) - 1
        assert per_row is not None
        assert whole is not None
        torch.testing.assert_close(per_row, 2 * w.abs().mean(1, keepdim=True) / q_p**0.5)
        torch.testing.assert_close(whole, (2 * w.abs().mean() / q_p**0.5).reshape(1, 1))


def test_lsq_counts_the_features_of_an_activation() -> None:
    """Section 2.2: N_F features for activations, not the elements of a batch."""
    spec, x = activation("w4a4-norot-lsq"), normal(7, 64)
    step, gradient = torch.tensor([[0.4]]), normal(7, 64, seed=1)
    _, got = gradients(x, spec, step, gradient)
    t = x.double() / 0.4
    inside = (t > -8) & (t < 7)
    each = torch.where(inside, torch.round(t) - t, t.clamp(-8, 7))
    assert float(got) == pytest.approx(float((gradient * each).sum()) / math.sqrt(64 * 7), rel=1e-4)


@pytest.mark.parametrize("name", ["w1a1-norot-lsq", "w1a1-tensor-norot-lsq", "w1a1-norot-lsq+", "w1a1-lsq"])
def test_lsq_at_one_bit_divides_by_nothing(name: str) -> None:
    """Q_P = 0 in the paper's signed grid; here ±Δ/2, which starts at the best binary fit ±mean|v|."""
    made, x = quantize_(nn.Linear(64, 8), name), normal(6, 64)
    y = made(x)
    y.square().sum().backward()
    assert bool(y.isfinite().all())
    assert all(bool(p.grad.isfinite().all()) for p in made.parameters() if p.grad is not None)
    assert sum(p.grad is not None for p in made.parameters()) == len(list(made.parameters()))
    if name == "w1a1-norot-lsq":
        values = made.quantized_weight()  # type: ignore[operator]
        torch.testing.assert_close(values.abs(), made.weight.abs().mean(1, keepdim=True).expand(8, 64))  # type: ignore[operator,union-attr]


def test_what_a_module_holds_moves_alike_at_every_width() -> None:
    """Adam moves parameters by about the learning rate: √Q_P·Δ starts at 2⟨|v|⟩, whatever the width."""
    w = normal(5, 64)
    for bits in (1, 2, 4, 8):
        step = WeightQuantizer(weight(f"w{bits}a{bits}-norot-lsq"), w, PLAIN).step
        assert step is not None
        torch.testing.assert_close(step.detach(), 2 * w.abs().mean(1, keepdim=True))


# --- LSQ+ ------------------------------------------------------------------------------------------------------------


def test_lsq_plus_gradients_of_step_and_offset() -> None:
    """2004.09576, eq. 5 and 6: outside the levels n or p and 1, inside round(t) − t and 0, with t = (x − β)/s."""
    made = ActivationQuantizer(activation("w2a2-norot-lsq+"))
    assert made.step is not None
    assert made.offset is not None
    s, beta = 0.5, 0.3
    with torch.no_grad():
        made.step.fill_(s * made.unit)
        made.offset.fill_(beta)
    x, g = normal(3, 32).requires_grad_(), normal(3, 32, seed=1)
    y = made(x, PLAIN)
    y.backward(g)
    t = (x.detach().double() - beta) / s
    inside = (t >= -2) & (t <= 1)
    q = torch.round(t).clamp(-2, 1)
    torch.testing.assert_close(y.detach().double(), q * s + beta, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, g * inside)
    assert made.offset.grad is not None
    assert made.step.grad is not None
    assert float(made.offset.grad) == pytest.approx(float((g * ~inside).sum()), abs=1e-4)
    expected = float((g * (q - t * inside)).sum()) / math.sqrt(32 * 1) / made.unit
    assert float(made.step.grad) == pytest.approx(expected, rel=1e-4)


def test_lsq_plus_weights_start_at_three_standard_deviations() -> None:
    """Eq. 10 of section 3.2: max(|μ − 3σ|, |μ + 3σ|)/2^(b−1)."""
    w = normal(5, 256) + 0.4
    got = WeightQuantizer(weight("w4a4-norot-lsq+"), w, PLAIN).effective_step()
    mean, sigma = w.mean(1, keepdim=True), w.std(1, correction=0, keepdim=True)
    expected = torch.maximum((mean - 3 * sigma).abs(), (mean + 3 * sigma).abs()) / 8
    assert got is not None
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_lsq_plus_activations_start_at_the_least_error(bits: int) -> None:
    """argmin over (s, β) of ‖x̄·s + β − x‖²: as good as a search over both, on values that only an offset fits."""
    x = torch.nn.functional.gelu(normal(40, 50)) + 1
    spec = activation(f"w{bits}a{bits}-norot-lsq+")
    step, offset = fit_offset(x, spec)

    def error(s: float, beta: float) -> float:
        values = x.double().flatten()
        return float((spec.grid.nearest_((values - beta) / s) * s + beta - values).square().mean())

    searched = min(
        error(s, b) for s in torch.linspace(0.05, 3, 30).tolist() for b in torch.linspace(0.5, 3, 30).tolist()
    )
    assert error(float(step), float(offset)) <= searched * 1.05
    without = encode(x, spec, PLAIN).step
    assert error(float(step), float(offset)) < error(float(without), 0.0)


def test_lsq_plus_rotates_before_it_shifts() -> None:
    torch.manual_seed(0)
    made, x = quantize_(nn.Linear(64, 8), "w4a4-lsq+"), normal(6, 64) + 1
    with torch.no_grad():
        y = made(x)
        error = y - nn.functional.linear(x, made.weight, made.bias)  # type: ignore[arg-type]
    assert float(error.norm() / y.norm()) < 0.3
    codes = made.encode_input(x)  # type: ignore[operator]
    assert int(codes.codes.min()) >= -8
    assert int(codes.codes.max()) <= 7


def test_lsq_plus_is_not_packed_and_says_why() -> None:
    made = quantize_(nn.Linear(64, 8), "w4a4-norot-lsq+")
    made(normal(6, 64))
    with pytest.raises(ConfigError, match=r"LSQ\+\) have no packed form.*train with lsq"):
        PackedLinear.of(made)  # type: ignore[arg-type]


# --- PACT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_only_clipped_elements_reach_pacts_clip(bits: int) -> None:
    """1805.06085, eq. 3, two-sided: ∂x_q/∂α is 0 within (−α, α) and the sign of x beyond; ∂x_q/∂x is 1 and 0."""
    made = ActivationQuantizer(activation(f"w{bits}a{bits}-norot-pact"))
    assert made.step is not None
    with torch.no_grad():
        made.step.fill_(1.5)  # the parameter is α
    x, g = tensor(-4.0, -0.9, 0.25, 1.25, 1.75, 9.0).requires_grad_(), tensor(1.0, 10.0, 100.0, 1e3, 1e4, 1e5)
    y = made(x, PLAIN)
    y.backward(g)
    levels = 2**bits - 1  # eq. 2, over the 2α between both clips
    expected = torch.round((x.detach().double().clamp(-1.5, 1.5) + 1.5) * levels / 3) * 3 / levels - 1.5
    torch.testing.assert_close(y.detach().double(), expected, rtol=1e-6, atol=1e-6)
    assert made.step.grad is not None
    assert float(made.step.grad) == pytest.approx(-1 + 1e4 + 1e5)
    assert x.grad is not None
    assert x.grad.tolist() == [[0, 10, 100, 1000, 0, 0]]


def test_pact_has_the_weights_of_dorefa() -> None:
    """1606.06160, eq. 9: 2·round((2^k − 1)(w̃/2 + ½))/(2^k − 1) − 1 with w̃ = tanh(w)/max|tanh(w)|, in w's own scale."""
    w = normal(16, 64) * 0.02
    for bits in (2, 4, 8):
        got = fake_quantize(w, weight(f"w{bits}a{bits}-norot-pact"), PLAIN).double()
        n, peak = 2**bits - 1, w.double().abs().max()
        without_tanh = (2 * torch.round(n * (w.double() / peak / 2 + 0.5)) / n - 1) * peak
        assert float((got - without_tanh).abs().max()) < 2e-6 * float(peak)
        bent = w.double().tanh()
        with_tanh = (2 * torch.round(n * (bent / bent.abs().max() / 2 + 0.5)) / n - 1) * peak
        differ = ((got - with_tanh).abs() > 1e-6).double().mean()
        assert float(differ) < 0.06  # the tanh moves few of such small weights across a threshold
    one_bit = fake_quantize(w, weight("w1a1-norot-pact"), PLAIN)
    torch.testing.assert_close(one_bit, torch.where(w > 0, 1.0, -1.0) * w.abs().mean())
    w.requires_grad_()
    fake_quantize(w, weight("w4a4-norot-pact"), PLAIN).sum().backward()
    assert w.grad is not None
    assert bool((w.grad == 1).all())


def test_weight_decay_reaches_pacts_clip_and_no_other_step() -> None:
    """Section 3: an L2 penalty on α."""

    def decaying(name: str) -> bool:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        quantize_(model, name)
        steps = {id(p) for n, p in model.named_parameters() if n.endswith("activation_quantizer.step")}
        assert len(steps) == 2
        groups = make_optimizer(model, OptimizerSection(weight_decay=0.1)).param_groups
        found = [{id(p) for p in group["params"]} for group in groups if group["weight_decay"]]
        return any(steps <= ids for ids in found)

    assert decaying("w4a4-norot-pact")
    assert not decaying("w4a4-norot-lsq")
    assert regularized_clips(quantize_(nn.Sequential(nn.Linear(64, 8)), "w4a4-pact")) == {"0.activation_quantizer.step"}


# --- ParetoQ ---------------------------------------------------------------------------------------------------------


def stretched(w: Tensor, alpha: float, levels: int) -> Tensor:
    """2502.02631, eq. of SEQ: α·(⌊Clip(w/α, −1, 1)·k/2 − ½⌉ + ½)·2/k; at three levels the halves fall away."""
    shift = 0.5 if levels % 2 == 0 else 0.0
    inside = (w.double() / alpha).clamp(-1 + 1e-9, 1 - 1e-9)
    return alpha * (torch.round(inside * levels / 2 - shift) + shift) * 2 / levels


@pytest.mark.parametrize(("name", "k"), [("w2a2-norot-paretoq", 4), ("w2a2-ternary-norot-paretoq", 3)])
def test_seq_forward_and_backward(name: str, k: int) -> None:
    spec, alpha = weight(name), 0.8
    w, g = normal(1, 200), normal(1, 200, seed=1)
    step = torch.tensor([[2 * alpha / k]])
    expected = stretched(w, alpha, k)
    torch.testing.assert_close(fake_quantize(w, spec, PLAIN, step).double(), expected, rtol=1e-6, atol=1e-6)
    d_w, d_step = gradients(w, spec, step, g)
    inside = w.abs() < alpha
    assert torch.equal(d_w, g * inside)
    by_alpha = float((g * (expected / alpha - w.double() / alpha * inside)).sum())
    largest = 1.5 if k == 4 else 1.0
    assert float(d_step) == pytest.approx(by_alpha * k / 2 / math.sqrt(200 * largest), rel=1e-4)


def test_elastic_binarization() -> None:
    """N_bit = 1: α·Sign(w), ∂/∂α = Sign(w), ∂/∂w = 1 for |w| < α; starts at mean|w| per row."""
    spec, alpha = weight("w1a16-norot-paretoq"), 0.8
    w, g = normal(1, 200), normal(1, 200, seed=1)
    step = torch.tensor([[2 * alpha]])
    torch.testing.assert_close(fake_quantize(w, spec, PLAIN, step), alpha * w.sign())
    d_w, d_step = gradients(w, spec, step, g)
    assert torch.equal(d_w, g * (w.abs() < alpha))
    assert float(d_step) == pytest.approx(float((g * w.sign()).sum()) / 2 / math.sqrt(200 * 0.5), rel=1e-4)
    start = WeightQuantizer(spec, normal(4, 64), PLAIN).effective_step()
    assert start is not None
    torch.testing.assert_close(start / 2, normal(4, 64).abs().mean(1, keepdim=True))


def test_where_paretoq_starts() -> None:
    """SEQ: α at the row's largest magnitude; from 3 bits on LSQ's grid, its largest level at it."""
    w = normal(4, 64)
    peak = w.abs().amax(1, keepdim=True)
    for name, per_peak in (("w2a16", 2 / 4), ("w2a16-ternary", 2 / 3), ("w3a16", 1 / 3), ("w4a16", 1 / 7)):
        start = WeightQuantizer(weight(f"{name}-norot-paretoq"), w, PLAIN).effective_step()
        assert start is not None
        torch.testing.assert_close(start, peak * per_peak)
    assert weight("w3a16-norot-paretoq").grid == integer_grid(3)


def test_activations_of_paretoq_have_one_step_per_layer() -> None:
    spec = activation("w2a2-norot-paretoq")
    assert spec.granularity == PerTensor()
    assert spec.grid == UniformGrid(2)


# --- BitNet b1.58 ----------------------------------------------------------------------------------------------------


def test_bitnet_by_its_formulas() -> None:
    """2402.17764, eq. 1 to 3: RoundClip(W/γ, −1, 1) with γ = mean|W|; activations on [−127, 127] per token."""
    scheme = Scheme.parse("w2a8-norot-bitnet")
    w, x = normal(16, 64) * 0.02, normal(5, 64)
    gamma = w.double().abs().mean()
    expected = torch.round(w.double() / gamma).clamp(-1, 1) * gamma
    assert scheme.weight is not None
    torch.testing.assert_close(fake_quantize(w, scheme.weight, PLAIN).double(), expected, rtol=1e-5, atol=0)
    peak = x.double().abs().amax(1, keepdim=True)
    expected = torch.round(x.double() * 127 / peak) * peak / 127
    assert scheme.activation is not None
    torch.testing.assert_close(fake_quantize(x, scheme.activation, PLAIN).double(), expected, rtol=1e-5, atol=1e-6)
    zero = fake_quantize(torch.zeros(1, 64), scheme.activation, PLAIN)
    assert bool((zero == 0).all())  # unlike QuEST's grid, this one has a zero
    for spec in (scheme.weight, scheme.activation):
        assert spec.estimator == StraightThrough()
    assert scheme.weight.grid == TERNARY
    assert (len(scheme.activation.grid.levels), scheme.activation.scale) == (255, AbsMax())


# --- what every engine makes of every rival --------------------------------------------------------------------------

LEARNED_REASON = "a learned step needs the rounding errors"
# The name, and what the native engine says to training and to running it: None where it does both exactly.
ALL_RIVALS: list[tuple[str, str | None, str | None]] = [
    ("w1a1-norot-ste", None, None),
    ("w2a8-norot-bitnet", None, None),
    ("w1a1-norot-lsq", LEARNED_REASON, None),
    ("w4a4-tensor-norot-lsq", LEARNED_REASON, None),
    ("w8a8-norot-lsq", "whose grids have integers", "whose grid has integers"),
    ("w2a2-norot-lsq+", LEARNED_REASON, "no packed form"),
    ("w4a4-norot-pact", LEARNED_REASON, None),
    ("w1a1-norot-paretoq", LEARNED_REASON, None),
    ("w2a2-norot-paretoq", LEARNED_REASON, None),
    ("w2a2-ternary-norot-paretoq", LEARNED_REASON, None),
    ("w3a3-norot-paretoq", LEARNED_REASON, None),
    ("w2a2-lloyd", "whose grids have integers", "whose grid has integers"),
    ("w8a8-fp8", "whose grids have integers", "whose grid has integers"),
    ("w4a4-fp4", None, None),
    ("w4a4-mxfp4", "PowerOfTwo scales are not computed", "PowerOfTwo scales are not computed"),
    ("w4a4-nvfp4", "TwoLevel scales are not computed", "TwoLevel scales are not computed"),
    ("w4a16-mxfp4", "needs a weight and an activation", None),
    ("w4a16-nvfp4", "needs a weight and an activation", None),
    ("w4a4-2:4", None, None),
    ("w4a4-4:8", None, None),
    ("w4a4-2:4-norot-lsq", LEARNED_REASON, None),
    ("w4a16", "needs a weight and an activation", None),
    ("w2a8", None, None),
    ("w4a4-g64", None, None),
]


def trained(name: str, backend: str) -> tuple[QuantizedLinear, Tensor, Tensor, Tensor | None]:
    """A layer, its input and output, and the gradient of its weight."""
    torch.manual_seed(0)
    made = quantize_(nn.Linear(128, 48), name, backend=backend)
    assert isinstance(made, QuantizedLinear)
    x = normal(20, 128)
    y = made(x)
    y.square().sum().backward()
    return made, x, y.detach(), made.weight.grad


@pytest.mark.parametrize(("name", "training", "running"), ALL_RIVALS)
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_engines_are_exact_or_refuse(backend: str, name: str, training: str | None, running: str | None) -> None:
    reference, x, y, gradient = trained(name, "torch")
    refused = None
    try:
        _, _, got, d_weight = trained(name, backend)
    except BackendError as error:
        refused = str(error)
        if "not available" in refused:
            pytest.skip(refused)
    if refused is None:
        assert backend == "auto" or training is None
        assert d_weight is not None
        assert gradient is not None
        assert float((got - y).norm() / y.norm()) < 2e-6
        assert float((d_weight - gradient).norm() / gradient.norm()) < 2e-6
    else:
        assert backend == "native"
        assert training is not None
        assert training in refused
    refused = None
    try:
        packed = PackedLinear.of(reference, backend)
    except ConfigError as error:
        refused = str(error)
    if refused is None:
        assert backend == "auto" or running is None
        assert float((packed(x) - y).norm() / y.norm()) < 2e-6
    else:
        assert backend == "native" or running == "no packed form"
        assert running is not None
        assert running in refused


# --- names and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w4a4-lsq-pact", "more than one estimator or method"),
        ("w4a4-lsq-clip", "more than one estimator or method"),
        ("w1a8-norot-bitnet", "ternary weights.*write w2"),
        ("w2a2-norot-bitnet", "8-bit activations: write a8"),
        ("w4a4-fp4-paretoq", "grids of its own"),
        ("w4a4-mxfp4-g64", "mxfp4 has blocks and scales of its own, which g64 would replace"),
        ("w4a4-nvfp4-lsq", "nvfp4 has blocks and scales of its own, which lsq would replace"),
        ("w8a8-mxfp4", "so write w4"),
        ("w4a8-fp8", "so write w8"),
        ("w16a4-tensor", "-tensor is of quantized weights"),
        ("w4a4-tensor-g64", "more than one group size"),
        ("w4a4-lsqq", "did you mean 'lsq'"),
        ("w4a4-nvfp5", "did you mean 'nvfp4'"),
    ],
)
def test_names_that_make_no_rival(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scheme.parse(name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Learned("nowhere"), "starts at gaussian, lsq"),
        (lambda: Learned(gradient="steep"), "'steep'"),
        (lambda: Learned(offset=1), "1"),  # type: ignore[arg-type]
        (lambda: Scheme(weight=Quantizer(scale=Learned(offset=True))), "offset is for activations"),
        (lambda: Quantizer.from_json(Quantizer().to_json() | {"scale": {"kind": "learned", "start": 3}}), "scale rule"),
        (lambda: integer_grid(1), "no positive level"),
        (lambda: integer_grid(9), "2 to 8"),
    ],
)
def test_parts_that_make_no_rival(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]


def test_a_learned_step_without_fields_is_read_as_before() -> None:
    fields = Quantizer(scale=Learned()).to_json()
    assert fields["scale"] == {"kind": "learned"}
    assert Quantizer.from_json(fields).scale == Learned("gaussian", "lsq", offset=False)
    made = ActivationQuantizer(Quantizer(granularity=PerTensor(), scale=Learned()))
    assert made.unit == 1.0

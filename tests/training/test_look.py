"""One look: every figure against a formula written out in float64, on every backend, and no trace left behind."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import bitquest as bq
from bitquest.errors import ConfigError
from bitquest.models import Llama, LlamaConfig
from bitquest.models.fuse import fuse_
from bitquest.nn import Scheme
from bitquest.numerics import Learned, PerTensor, Quantizer, StraightThrough, Trust, UniformGrid
from bitquest.numerics.grids import FP4, TERNARY
from bitquest.training.look import (
    cosine,
    excess_kurtosis,
    gaussian_masked_share,
    gaussian_optimum,
    input_look,
    look_at,
    weight_look,
)
from bitquest.training.step import next_token_loss

CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=16,
)


def llama(scheme, backend="torch"):
    """A model whose weights have a few outliers, and whose norms differ from one."""
    model = Llama(CONFIG).init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "layers" in name:
                parameter.mul_(2 + torch.randn(parameter.shape, generator=generator).abs() ** 3)
            elif parameter.ndim == 1:
                parameter.mul_(0.5 + torch.rand(parameter.shape, generator=generator))
    return bq.quantize_(model, scheme, backend=backend)


@pytest.fixture
def windows():
    return torch.randint(0, 40, (3, 13), generator=torch.Generator().manual_seed(2))


def gradients(model, windows):
    """∂L/∂h of every block's output and ∂L/∂W of every layer, by a plain backward pass, in float64 NumPy."""
    outputs = []

    def keep(block, arguments, h):
        h.retain_grad()
        outputs.append(h)

    hooks = [block.register_forward_hook(keep) for block in model.model.layers]
    next_token_loss(model, windows).backward()
    for hook in hooks:
        hook.remove()
    weights = {
        n: m.weight.grad.double().numpy() for n, m in model.named_modules() if type(m).__name__.endswith("Linear")
    }
    model.zero_grad()
    return [h.grad.double().numpy() for h in outputs], weights


def angle(a, b):
    a, b = np.concatenate([x.ravel() for x in a]), np.concatenate([x.ravel() for x in b])
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("scheme", ["w1a1", "w2a2-norot", "w4a4-ste", "w3a16", "w4a4-2:4"])
def test_alignment_is_the_cosine_with_the_plain_models_gradients(windows, scheme):
    model = llama(scheme)
    plain = llama("none")
    look = look_at(model, windows)
    outputs, weights = gradients(model, windows)
    plain_outputs, plain_weights = gradients(plain, windows)
    assert len(look.blocks) == 2
    for number, block in enumerate(look.blocks):
        assert block.output == pytest.approx(angle([outputs[number]], [plain_outputs[number]]), abs=1e-5)
        names = [name for name in weights if name.startswith(f"model.layers.{number}.")]
        assert len(names) == 7
        whole = angle([weights[n] for n in names], [plain_weights[n] for n in names])
        assert block.weights == pytest.approx(whole, abs=1e-5)
        for name in names:
            assert look.alignments[name] == pytest.approx(angle([weights[name]], [plain_weights[name]]), abs=1e-5)
        assert block.output < 0.9999
    with torch.no_grad():
        assert look.loss == pytest.approx(next_token_loss(model, windows).item(), rel=1e-6)
        assert look.unquantized_loss == pytest.approx(next_token_loss(plain, windows).item(), rel=1e-6)


def test_a_model_without_quantization_is_aligned_with_itself(windows):
    look = look_at(llama("none"), windows)
    assert [(block.output, block.weights) for block in look.blocks] == [(1.0, 1.0)] * 2
    assert look.loss == look.unquantized_loss
    assert not look.weights
    assert not look.inputs


def test_cosine_of_parts_and_of_nothing():
    a, b = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])], [torch.tensor([0.0, 1.0]), torch.tensor([[1.0]])]
    assert cosine(a, b) == pytest.approx(4 / (5 * math.sqrt(2)))
    assert cosine(a, [-x for x in a]) == -1.0
    assert cosine(a, [torch.zeros(2), torch.zeros(1, 1)]) is None
    assert cosine([torch.tensor([math.nan])], [torch.ones(1)]) is None


# --- operands --------------------------------------------------------------------------------------------------------


def hadamard(size):
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / math.sqrt(size)


def by_hand(x, levels, alpha, group, rotated):
    """Relative error, masked share under trust, kurtosis, mean Δ of rows (T, K); every level tried for each value."""
    x_h = x.astype(np.float64) @ hadamard(x.shape[1]) if rotated else x.astype(np.float64)
    groups = x_h.reshape(-1, group)
    sigma = np.sqrt((groups**2).mean(1, keepdims=True))
    step = (alpha * sigma + 1e-8) / max(levels)
    table = step[:, :, None] * np.asarray(levels)
    x_q = np.take_along_axis(table, np.abs(groups[:, :, None] - table).argmin(-1)[:, :, None], -1)[:, :, 0]
    gap = max(levels[1] - levels[0], levels[-1] - levels[-2])
    masked = np.abs(groups) > step * (max(levels) + gap / 2)
    return {
        "error": ((x_q - groups) ** 2).sum() / (groups**2).sum(),
        "masked": masked.mean(),
        "kurtosis": ((groups / sigma) ** 4).mean() - 3,
        "step": math.exp(np.log(step).mean()),
    }


UNIFORM_2 = (-1.5, -0.5, 0.5, 1.5)
UNIFORM_4 = tuple(c + 0.5 for c in range(-8, 8))
FP4_LEVELS = (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)


@pytest.mark.parametrize(
    ("scheme", "levels", "alpha", "group", "rotated"),
    [
        ("w2a2", UNIFORM_2, 1.4935346200, 128, True),
        ("w4a4-norot", UNIFORM_4, 2.5139305786, 128, False),
        ("w4a4-g32", UNIFORM_4, 2.5139305786, 32, True),
        ("w4a4-fp4", FP4_LEVELS, 6 * 0.48707917, 128, True),
    ],
)
def test_figures_of_operands_are_the_formulas(scheme, levels, alpha, group, rotated):
    generator = torch.Generator().manual_seed(0)
    plain = nn.Linear(128, 20, bias=False)
    with torch.no_grad():
        plain.weight.copy_(torch.randn(20, 128, generator=generator) ** 3)
    x = torch.randn(2, 15, 128, generator=generator) * torch.rand(2, 15, 1, generator=generator)
    layer = bq.quantize_(plain, scheme)
    for look, operand in ((weight_look(layer), plain.weight.detach()), (input_look(layer, x), x.reshape(30, 128))):
        expected = by_hand(operand.numpy(), levels, alpha, group, rotated)
        assert {key: getattr(look, key) for key in expected} == pytest.approx(expected, rel=1e-4)
        assert look.masked > 0 or scheme == "w4a4-fp4"
        assert look.elements == operand.numel()
        assert float(look.mask.float().mean()) == pytest.approx(look.masked)
        assert look.mask.shape == operand.shape


def test_sparse_weights_count_what_was_dropped():
    torch.manual_seed(0)
    layer = bq.quantize_(nn.Linear(64, 32, bias=False), "w4a4-2:4")
    look = weight_look(layer)
    values, w_h = layer.quantized_weight().double(), layer.rotation.apply(layer.weight.detach()).double()
    assert look.error == pytest.approx(float((values - w_h).square().sum() / w_h.square().sum()), rel=1e-5)
    assert look.masked == pytest.approx(
        float(((values - w_h).abs() > layer.encode_weight().step.double() / 2 * (1 + 1e-6)).double().mean()), abs=2e-3
    )
    assert look.masked > 0.3  # METHOD: about 80 % of the zeroed half
    assert look.expected_masked is None


@pytest.mark.parametrize(
    ("grid", "optimum"),
    [
        (UniformGrid(1), 0.363380), (TERNARY, 0.190174), (UniformGrid(2), 0.118846), (UniformGrid(3), 0.037440),
        (UniformGrid(4), 0.011543), (UniformGrid(8), 8.7686e-5), (FP4, 0.0126849),
    ],
)  # fmt: skip
def test_the_gaussian_optimum_is_the_methods(grid, optimum):
    assert gaussian_optimum(grid) == pytest.approx(optimum, rel=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_gaussian_operand_is_at_the_optimum_and_masked_as_expected(bits):
    torch.manual_seed(0)
    layer = bq.quantize_(nn.Linear(1024, 512, bias=False), Scheme(weight=Quantizer(UniformGrid(bits))))
    with torch.no_grad():
        layer.weight.normal_()
    look = weight_look(layer)
    assert look.excess == pytest.approx(1, abs=0.03 if bits == 8 else 0.01)  # at 8 bits by few clipped outliers
    assert look.kurtosis == pytest.approx(-6 / 1026, abs=0.02)
    assert look.masked == pytest.approx(look.expected_masked, rel=0.1, abs=1e-5)


def test_the_expected_masked_share_is_a_tail_of_the_gaussian():
    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    share = gaussian_masked_share(Quantizer(UniformGrid(2), estimator=Trust()))
    assert share == pytest.approx(2 * phi(-1.4935346200 * 4 / 3))  # METHOD, "Backward"
    weight = Scheme.parse("w1a1").weight
    assert gaussian_masked_share(weight) == pytest.approx(2 * phi(-1.30 * 0.7978845587))
    assert gaussian_masked_share(Quantizer(UniformGrid(2), estimator=StraightThrough())) == 0
    assert gaussian_masked_share(Quantizer(UniformGrid(4), estimator=Trust(0.5))) is None
    assert gaussian_masked_share(Quantizer(UniformGrid(4), scale=Learned())) is None


def test_kurtosis_leaves_out_groups_of_zeros():
    grouped = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
    assert excess_kurtosis(grouped) == pytest.approx((1 + 4) / 2 - 3)
    assert excess_kurtosis(torch.zeros(2, 4)) == 0


def test_a_layer_of_zeros_has_no_error():
    layer = bq.quantize_(nn.Linear(32, 4, bias=False), "w2a2")
    with torch.no_grad():
        layer.weight.zero_()
    look = weight_look(layer)
    assert (look.error, look.excess, look.kurtosis) == (0, 0, 0)


# --- what is looked at, and what is left ------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w1a1", "w4a4", "w2a8"])
def test_integers_and_fused_norms_show_what_floats_show(windows, scheme):
    slow, fast = look_at(llama(scheme), windows), look_at(fuse_(llama(scheme, "auto")), windows)
    assert slow.weights.keys() == fast.weights.keys()
    assert slow.inputs.keys() == fast.inputs.keys()
    for part in ("weights", "inputs"):
        for name, figures in getattr(slow, part).items():
            other = getattr(fast, part)[name]
            assert other.masked == pytest.approx(figures.masked, abs=2e-3), name
            assert other.error == pytest.approx(figures.error, rel=0.02), name
    for one, other in zip(slow.blocks, fast.blocks, strict=True):
        assert other.output == pytest.approx(one.output, abs=0.02)


@pytest.mark.parametrize(
    ("scheme", "weights", "inputs"), [("w1a1-h8", 15, 8), ("w2a16", 14, 0), ("w16a4", 0, 8), ("w16a16", 0, 0)]
)
def test_what_is_quantized_is_looked_at_once(windows, scheme, weights, inputs):
    look = look_at(llama(scheme), windows)
    assert (len(look.weights), len(look.inputs)) == (weights, inputs)
    assert len(look.alignments) == 14
    assert all(look.inputs[f"model.layers.1.{name}"] for name in ("self_attn.q_proj", "mlp.gate_proj") if inputs)
    assert ("lm_head" in look.weights) == scheme.endswith("h8")


LEARNED = Scheme(
    weight=Quantizer(scale=Learned(), estimator=StraightThrough()),
    activation=Quantizer(granularity=PerTensor(), scale=Learned(), estimator=StraightThrough()),
)


@pytest.mark.parametrize("scheme", ["w1a1", LEARNED], ids=str)
def test_a_look_leaves_no_trace(windows, scheme):
    model = llama(scheme)
    model.activation_checkpointing = True
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    look = look_at(model, windows)
    after = model.state_dict()
    for name, tensor in before.items():
        assert torch.equal(tensor.nan_to_num(7), after[name].nan_to_num(7)), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())
    assert len(look.inputs) == (8 if scheme == "w1a1" else 14)  # a learned step is each layer's own
    model.eval()
    look_at(model, windows)
    assert not model.training


def test_a_failing_look_leaves_no_trace_either(windows):
    model = llama(LEARNED)
    with pytest.raises(IndexError):
        look_at(model, windows + 1000)
    assert model.training
    assert all(module.quantizes for module in model.modules() if hasattr(module, "quantizes"))
    assert all(s.isnan().all() for n, s in model.state_dict().items() if n.endswith("activation_quantizer.step"))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_look_works_where_gradients_are_off(windows):
    model = llama("w1a1")
    with torch.no_grad():
        look = look_at(model, windows)
    assert look.blocks == look_at(model, windows).blocks


def test_a_packed_model_is_refused(windows):
    with pytest.raises(ConfigError, match="is packed"):
        look_at(bq.pack_(llama("w1a1")), windows)

"""Norms and gated products that are left to the layers behind them: the same model."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bitquest.models import Llama, LlamaConfig
from bitquest.models.fuse import DeferredRMSNorm, DeferredSwiGLU, fuse_
from bitquest.nn import QuantizedLinear, pack_, quantize_
from bitquest.nn.integer_training import TrainingPlan
from bitquest.ops import Backend
from bitquest.ops.linear_spec import LinearSpec

IDS = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))


def gradients(model: Llama) -> tuple[Tensor, Tensor]:
    logits = model(IDS)
    F.cross_entropy(logits.flatten(0, 1), IDS.flatten()).backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def make(config: LlamaConfig, name: str, integers: bool) -> Llama:
    model = quantize_(Llama(config).init_weights(0), name, backend="torch")
    for layer in model.modules():
        if integers and isinstance(layer, QuantizedLinear):
            operands = layer.weight_quantizer.spec, layer.activation_quantizer.spec
            spec = LinearSpec(layer.in_features, layer.out_features, *operands, layer.rotation.block)
            layer._plan = TrainingPlan(spec, Backend.TORCH)
    return model


@pytest.mark.parametrize("integers", [False, True])
@pytest.mark.parametrize("name", ["w1a1", "w4a4-g32"])
def test_a_fused_model_trains_alike(name: str, integers: bool, grouped_config: LlamaConfig) -> None:
    expected, wanted = gradients(make(grouped_config, name, integers))
    fused = fuse_(make(grouped_config, name, integers))
    assert isinstance(fused.model.layers[0].input_layernorm, DeferredRMSNorm)
    assert isinstance(fused.model.layers[0].mlp.act, DeferredSwiGLU)
    assert set(fused.state_dict()) == set(make(grouped_config, name, integers).state_dict())
    got, given = gradients(fused)
    assert float((got - expected).norm() / expected.norm()) < 1e-4
    assert float((given - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("name", ["w1a1", "w4a16"])
def test_a_fused_packed_model_runs_alike(name: str, grouped_config: LlamaConfig) -> None:
    model = pack_(quantize_(Llama(grouped_config).init_weights(0), name))
    with torch.no_grad():
        expected = model(IDS)
        assert float((fuse_(model)(IDS) - expected).norm() / expected.norm()) < 1e-5


def test_plain_models_stay_as_they_are(grouped_config: LlamaConfig) -> None:
    model = fuse_(Llama(grouped_config))
    assert not any(isinstance(module, DeferredRMSNorm | DeferredSwiGLU) for module in model.modules())

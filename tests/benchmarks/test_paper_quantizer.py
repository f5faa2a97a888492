"""The paper's layer, a reference for speed, computes what the project's layer computes."""

import pytest
import torch
from torch import nn

from bitquest.benchmarks.paper_quantizer import PaperLinear, dense_rotation, paper_
from bitquest.errors import ConfigError
from bitquest.models import Llama, LlamaConfig
from bitquest.nn import quantize_
from bitquest.numerics import BlockHadamard


def test_the_dense_matrix_is_the_blockwise_rotation():
    x = torch.randn(3, 192)
    rotation = BlockHadamard().resolve(192)
    matrix = dense_rotation(192, rotation.block)
    torch.testing.assert_close(x @ matrix, rotation.apply(x), atol=1e-6, rtol=0)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(192), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scheme", ["w1a1", "w2a2", "w3a3", "w4a4", "w8a8"])
def test_values_and_gradients_are_those_of_the_definition(scheme):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(96, 40))
    ours = quantize_(nn.Sequential(nn.Linear(96, 40)), scheme, backend="torch")
    ours.load_state_dict(plain.state_dict())
    paper = paper_(plain, scheme)
    assert isinstance(paper[0], PaperLinear)
    gradient, found = torch.randn(17, 40), []
    for model in (ours, paper):
        x = torch.randn(17, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = model(x)
        y.backward(gradient)
        found.append((y, x.grad, model[0].weight.grad, model[0].bias.grad))
    for expected, result in zip(*found, strict=True):
        torch.testing.assert_close(result, expected, atol=2e-4, rtol=1e-4)


def test_every_layer_of_a_model_but_the_head():
    model = paper_(Llama(LlamaConfig.preset("1M", vocab_size=32, max_position_embeddings=8)), "w4a4")
    kinds = {name.rsplit(".", 1)[-1]: type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert kinds.pop("lm_head") is nn.Linear
    assert set(kinds.values()) == {PaperLinear}
    assert len(kinds) == 7
    assert "rotation" not in "".join(model.state_dict())


@pytest.mark.parametrize("scheme", ["w4a4-fp4", "w4a4-g32", "w4a4-2:4", "w4a16", "w16a4"])
def test_what_it_does_not_take(scheme):
    with pytest.raises(ConfigError, match="the paper's layer"):
        paper_(nn.Sequential(nn.Linear(64, 8)), scheme)

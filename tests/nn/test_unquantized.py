"""The unquantized twin is the plain layer on the same parameters, on every backend, and leaves no trace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bitquest as bq
from bitquest.errors import ConfigError
from bitquest.models import Llama
from bitquest.models.fuse import fuse_
from bitquest.nn import unquantized

BACKENDS = ("torch", "auto")


def both(layer, x):
    """Output and gradients of x and the weight."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return y, *torch.autograd.grad(y.square().sum(), [x, layer.weight])


@pytest.mark.parametrize("scheme", ["w1a1", "w4a4-norot", "w2a16", "w4a4-2:4", "w4a4-ste"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_is_the_plain_layer_inside_and_itself_outside(scheme, backend):
    torch.manual_seed(0)
    plain = nn.Linear(64, 24)
    layer = bq.quantize_(copy.deepcopy(plain), scheme, backend=backend)
    x = torch.randn(5, 64)
    before = both(layer, x)
    with unquantized(layer):
        inside = both(layer, x)
    after = both(layer, x)
    for mine, expected, quantized, again in zip(inside, both(plain, x), before, after, strict=True):
        assert torch.equal(mine, expected)
        assert torch.equal(quantized, again)
        assert not torch.equal(mine, quantized)


@pytest.mark.parametrize("scheme", ["w2a2-h8", "none"])
def test_a_fused_llama_is_its_unquantized_self(grouped_config, scheme):
    plain = Llama(grouped_config).init_weights(0)
    model = fuse_(bq.quantize_(copy.deepcopy(plain), scheme))
    tokens = torch.arange(16).reshape(2, 8)
    with unquantized(model):
        torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-5, atol=1e-6)
    assert torch.equal(model(tokens), plain(tokens)) == (scheme == "none")


def test_an_embedding_hands_out_its_float_rows():
    table = nn.Embedding(10, 32)
    quantized = bq.quantize_(copy.deepcopy(nn.ModuleDict({"e": table, "lm_head": nn.Linear(32, 10)})), "w4a4-h4")
    ids = torch.arange(10)
    assert not torch.equal(quantized["e"](ids), F.embedding(ids, table.weight))
    with unquantized(quantized):
        assert torch.equal(quantized["e"](ids), F.embedding(ids, table.weight))


def test_weights_are_shared_with_the_twin():
    layer = bq.quantize_(nn.Linear(32, 4), "w1a1")
    x = torch.randn(2, 32)
    with unquantized(layer):
        before = layer(x)
        with torch.no_grad():
            layer.weight.mul_(2)
        assert torch.allclose(layer(x) - layer.bias, 2 * (before - layer.bias), atol=1e-6)


def test_nested_and_failing_uses_put_back_what_was():
    layer = bq.quantize_(nn.Linear(32, 4), "w1a1")
    with unquantized(layer):
        with unquantized(layer):
            pass
        assert not layer.quantizes
    with pytest.raises(RuntimeError, match="inside"), unquantized(layer):
        raise RuntimeError("inside")
    assert layer.quantizes


def test_a_packed_layer_is_refused_by_name():
    model = bq.quantize_(nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4)), "w1a1")
    bq.pack_(model)
    with pytest.raises(ConfigError, match=r"^0 is packed: .* Take the run it was packed from"), unquantized(model):
        pass

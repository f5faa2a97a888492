"""What packed layers compute once: an input that several read, the integers behind the codes. Never stale."""

import copy

import pytest
import torch
from torch import nn

from bitquest.nn import PackedLinear, QuantizedLinear, Scheme
from bitquest.numerics import Learned, PerTensor, Quantizer, UniformGrid
from bitquest.ops import engine


@pytest.fixture(autouse=True)
def _the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are of the layers themselves, on torch; tests/ops compares the other backends with it."""
    monkeypatch.setenv("BITQUEST_BACKEND", "torch")


def layer(name: str | Scheme = "w4a4", out: int = 33, seed: int = 0) -> QuantizedLinear:
    s = Scheme.parse(name) if isinstance(name, str) else name
    torch.manual_seed(seed)
    return QuantizedLinear(nn.Linear(96, out), weight=s.weight, activation=s.activation, rotation=s.rotation)


def test_packed_layers_share_one_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = engine.encode
    monkeypatch.setattr(engine, "encode", lambda *a: calls.append(1) or original(*a))
    q, k = PackedLinear.of(layer()), PackedLinear.of(layer(out=7))
    calls.clear()
    x = torch.randn(3, 96)
    q(x), k(x)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["w4a4", "w4a4-2:4", "w8a8", "w4a16"])
@pytest.mark.parametrize("change", ["load", "assign", "in place", "mask"])
def test_changed_codes_are_used(name: str, change: str) -> None:
    made, other = PackedLinear.of(layer(name)), PackedLinear.of(layer(name, seed=7))
    made.kept = None if made.kept is None else made.kept.clone()  # never written to, as what replaces it
    x = torch.randn(4, 96)
    made(x)
    if change == "mask":
        made.kept = None if made.kept is None else made.kept.flip(0)
        other = copy.deepcopy(made)
    elif change == "load":
        made.load_state_dict(other.state_dict())
    elif change == "assign":
        made.codes, made.step, made.kept, made.bias = other.codes, other.step, other.kept, other.bias
    else:
        for mine, theirs in zip(made.buffers(), other.buffers(), strict=True):
            mine.copy_(theirs)
    assert torch.equal(made(x), other(x.clone()))


def test_a_learned_input_step_that_changes_is_used() -> None:
    spec = Quantizer(UniformGrid(4), PerTensor(), Learned())
    trained = layer(Scheme(Quantizer(), spec))
    trained(x := torch.randn(4, 96))
    made = PackedLinear.of(trained)
    before = made(x)
    assert made.activation_step is not None
    made.activation_step.mul_(3)
    after = made(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, made(x.clone()))
    other = PackedLinear.of(trained)  # reads the same input with a step of its own
    assert torch.equal(other(x), before)


def test_packed_layers_made_for_inference() -> None:
    with torch.inference_mode():
        made = PackedLinear.of(layer())
        x = torch.randn(4, 96)
        assert torch.equal(made(x), made(x.clone()))

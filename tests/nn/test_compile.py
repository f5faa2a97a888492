"""torch.compile: one graph, the same numbers, the same number of quantizations."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from bitquest.models import Llama, LlamaConfig
from bitquest.nn import pack_, quantize_
from bitquest.ops import registry


@pytest.fixture(autouse=True)
def _the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are of the layers themselves, on torch; tests/ops compares the other backends with it."""
    monkeypatch.setenv("BITQUEST_BACKEND", "torch")


IDS = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _compile_afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["w4a4", "w1a1", "w2a8-g32-2:4-h8", "w4a16", "w4a4-fp4-norot"])
def test_a_compiled_model_is_the_eager_one(
    name: str, grouped_config: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, original = [], registry.fake_quantize_forward
    monkeypatch.setattr(registry, "fake_quantize_forward", lambda *a: calls.append(1) or original(*a))
    model = quantize_(Llama(grouped_config).init_weights(0), name)
    results = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        calls.clear()
        logits = function(IDS)
        F.cross_entropy(logits.flatten(0, 1), IDS.flatten()).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((logits.detach(), gradient, len(calls)))
    (eager, eager_gradient, eager_calls), (compiled, gradient, compiled_calls) = results
    assert torch.equal(eager, compiled)
    assert float((gradient - eager_gradient).norm() / eager_gradient.norm()) < 1e-5
    assert compiled_calls == eager_calls  # the compiler shares the quantization of q, k, v and gate, up


@pytest.mark.parametrize("name", ["w4a4", "w8a8", "w4a16"])
def test_a_compiled_packed_model_is_the_eager_one(name: str, grouped_config: LlamaConfig) -> None:
    model = pack_(quantize_(Llama(grouped_config).init_weights(0), name))
    with torch.no_grad():
        eager = model(IDS)
        assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(IDS), eager, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_packed_model_sees_codes_that_are_loaded(grouped_config: LlamaConfig) -> None:
    model, other = (pack_(quantize_(Llama(grouped_config).init_weights(seed), "w4a4")) for seed in (0, 1))
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        before = compiled(IDS)
        model.load_state_dict(other.state_dict())
        after = compiled(IDS)
        assert not torch.allclose(after, before)
        assert torch.allclose(after, other(IDS), atol=1e-6)

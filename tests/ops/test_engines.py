"""The native engine is the reference."""

import pytest
import torch
from engine_cases import SCHEMES, TRAINED, check_no_tokens, check_packed, check_training, near
from torch import nn

from bitquest.errors import ConfigError
from bitquest.nn import PackedLinear, QuantizedLinear, quantize_, running_backends, training_backends
from bitquest.numerics import BlockHadamard, Quantizer
from bitquest.ops.backend import BackendError, BackendReport
from bitquest.ops.native import availability

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not availability()[0], reason=availability()[1])


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("tokens", "width", "out"), [(1, 128, 64), (3, 384, 65), (33, 256, 130)])
def test_packed_layers(name: str, tokens: int, width: int, out: int) -> None:
    check_packed("native", CPU, name, tokens, width, out)


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize(("tokens", "width", "out"), [(5, 128, 33), (48, 384, 64)])
def test_training(name: str, tokens: int, width: int, out: int) -> None:
    check_training("native", CPU, name, tokens, width, out)


def test_no_tokens() -> None:
    check_no_tokens("native", CPU)


# --- what a user may do wrong, or unusually ------------------------------------------------------------------------


def test_double_precision_runs_where_engines_have_none() -> None:
    layer = QuantizedLinear(nn.Linear(64, 8), weight=Quantizer(), activation=Quantizer(), rotation=BlockHadamard())
    assert layer.training_backend == "native"
    x = torch.randn(3, 64, dtype=torch.float64)
    packed = PackedLinear.of(layer)
    assert layer.double()(x).dtype == packed(x).dtype == torch.float64
    assert near(packed(x), layer(x).detach(), 1e-5)


def test_a_wrong_width_is_named() -> None:
    layer = QuantizedLinear(nn.Linear(64, 8), weight=Quantizer(), activation=Quantizer(), rotation=BlockHadamard())
    for made in (layer, PackedLinear.of(layer)):
        with pytest.raises(ConfigError, match="reads 64 features, not 60"):
            made(torch.randn(3, 60))
    with pytest.raises(ConfigError, match=r"codes are \(8, 64\), not \(8, 60\)"):
        PackedLinear.of(layer).codes = torch.zeros(8, 60, dtype=torch.int8)


def test_the_environment_says_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained_on(name: str) -> str:
        model = nn.Sequential()
        model.lm_head = nn.Linear(64, 8)
        model.up = nn.Linear(64, 8)
        return training_backends(quantize_(model, name))

    assert trained_on("w1a1-h8") == "native, torch"  # the head's activations stay floats
    monkeypatch.setenv("BITQUEST_BACKEND", "native")
    assert trained_on("w1a1-h8") == "native, torch"
    monkeypatch.setenv("BITQUEST_BACKEND", "torch")
    assert trained_on("w1a1") == "torch"
    monkeypatch.setenv("BITQUEST_BACKEND", "nativ")
    with pytest.raises(BackendError, match="BITQUEST_BACKEND=nativ: unknown backend 'nativ'"):
        trained_on("w1a1")


def test_forgetting_quantizes_anew() -> None:
    layer = QuantizedLinear(nn.Linear(64, 8), weight=Quantizer(), activation=Quantizer(), rotation=BlockHadamard())
    layer(torch.randn(3, 64))
    assert layer._weight_rows._cached is not None
    layer.forget()
    assert layer._weight_rows._cached is None


def test_what_runs_a_layer_can_be_seen() -> None:
    layer = QuantizedLinear(nn.Linear(64, 8), weight=Quantizer(), activation=Quantizer(), rotation=BlockHadamard())
    packed = PackedLinear.of(layer)
    assert "backend=auto (native)" in repr(packed)
    assert running_backends(nn.Sequential(packed)) == "native"
    packed.use("torch")
    assert running_backends(nn.Sequential(packed)) == "torch"


def test_an_instruction_set_that_is_not_there_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    report = (BackendReport("native", False, "BITQUEST_ISA names avx521"), BackendReport("torch", True, ""))
    monkeypatch.setattr("bitquest.ops.backend.backend_report", lambda: report)
    assert training_backends(quantize_(nn.Sequential(nn.Linear(64, 8)), "w1a1")) == "torch"
    monkeypatch.setenv("BITQUEST_ISA", "avx521")
    with pytest.raises(BackendError, match="names avx521"):
        quantize_(nn.Sequential(nn.Linear(64, 8)), "w1a1")

"""Decoding through a fixed window of the cache: the same logits as growing it, whichever step the window changes at."""

from collections.abc import Callable

import pytest
import torch

from bitquest.errors import DataError
from bitquest.inference import KVCache, static_decode
from bitquest.inference.static_decode import StaticDecoder
from bitquest.models import Llama, LlamaConfig
from bitquest.nn import PackedLinear, pack_, quantize_


class Again:
    """In place of a CUDA graph: runs the function anew."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run
        for _ in range(2):  # a graph is warmed up and captured before it is replayed
            run()


def make(scheme: str, device: str) -> Llama:
    config = LlamaConfig.preset("1M", vocab_size=97, max_position_embeddings=24, num_hidden_layers=2)
    model = pack_(quantize_(Llama(config).init_weights(0), scheme)).to(device)
    assert isinstance(model, Llama)
    return model.eval()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("scheme", ["none", "w4a4", "w1a16"])
@pytest.mark.parametrize("window", [4, 8, 256])
def test_logits_are_those_of_a_growing_cache(
    scheme: str, window: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static_decode, "SMALLEST_WINDOW", window)
    model = make(scheme, device)
    growing, fixed = (KVCache(model.config, positions=20, device=device) for _ in range(2))
    prompt = torch.tensor([[5, 9, 3]], device=device)
    with torch.no_grad():
        model(prompt, growing), model(prompt, fixed)
        decoder = StaticDecoder(model, fixed, Again) if device == "cpu" else StaticDecoder(model, fixed)
        for token in range(17):
            expected = model(torch.tensor([[token]], device=device), growing)[0, -1]
            assert torch.allclose(decoder.step(token), expected, atol=1e-4 if device == "cuda" else 1e-5)
    assert fixed.length == growing.length == 20


def test_a_longer_text_takes_wider_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_decode, "SMALLEST_WINDOW", 4)
    model, widths = make("w4a4", "cpu"), []
    cache = KVCache(model.config, positions=20)
    decoder = StaticDecoder(model, cache, Again)
    for token in range(20):
        decoder.step(token)
        assert decoder._view is not None
        widths.append(decoder._view.window)
    assert widths == [4] * 4 + [8] * 4 + [16] * 8 + [20] * 4


def test_what_cannot_be_captured_is_not() -> None:
    assert StaticDecoder.refuses(make("none", "cpu")) is None
    model = make("w4a4", "cpu")
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.use("torch")
    assert "runs on the torch backend" in str(StaticDecoder.refuses(model))
    trained = quantize_(
        Llama(LlamaConfig.preset("1M", vocab_size=97, max_position_embeddings=24, num_hidden_layers=1)), "w4a4"
    )
    assert "quantized anew in every pass" in str(StaticDecoder.refuses(trained))  # type: ignore[arg-type]


def test_a_full_cache_is_named() -> None:
    model = make("none", "cpu")
    decoder = StaticDecoder(model, KVCache(model.config, positions=2), Again)
    decoder.step(1), decoder.step(2)
    with pytest.raises(DataError, match="holds 2 positions; 3 are needed"):
        decoder.step(3)

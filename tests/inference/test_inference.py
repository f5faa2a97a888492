import pytest
import torch

from bitquest.errors import ConfigError, DataError
from bitquest.inference import SamplingOptions, Speed, TextEngine, choose, generate, probabilities
from bitquest.models import Llama, LlamaConfig, Tokenizer
from bitquest.nn import pack_, quantize_


def model(scheme: str = "none") -> Llama:
    config = LlamaConfig.preset("1M", vocab_size=257, max_position_embeddings=40, num_hidden_layers=2)
    made = quantize_(Llama(config).init_weights(0), scheme)
    assert isinstance(made, Llama)
    return made.eval()


def greedy_without_cache(m: Llama, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(m(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


@pytest.mark.parametrize("scheme", ["none", "w4a4", "w1a8"])
def test_greedy_equals_the_uncached_model_packed_or_not(scheme: str) -> None:
    m = model(scheme)
    expected = greedy_without_cache(m, [1, 2, 3], 12)
    assert list(generate(m, [1, 2, 3], 12, SamplingOptions(temperature=0))) == expected
    assert list(generate(pack_(m), [1, 2, 3], 12, SamplingOptions(temperature=0))) == expected  # type: ignore[arg-type]


def test_the_seed_decides() -> None:
    m = model()
    first, again, other = (list(generate(m, [5], 20, SamplingOptions(seed=s))) for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("prompt", [1, 39, 40])
def test_stops_at_the_last_position(prompt: int) -> None:
    speed = Speed()
    tokens = list(generate(model(), [7] * prompt, 100, SamplingOptions(temperature=0), speed=speed))
    assert len(tokens) == 40 - prompt + 1
    assert "context of 40" in speed.stopped
    assert speed.prompt_tokens == prompt


def test_stops_at_the_end_of_the_document() -> None:
    m = model()
    first = next(generate(m, [1], 1, SamplingOptions(temperature=0)))
    speed = Speed()
    assert list(generate(m, [1], 10, SamplingOptions(temperature=0), eos_id=first, speed=speed)) == []
    assert speed.stopped == "the end of the document"


def test_prompts_that_cannot_be() -> None:
    for ids, message in (([], "no tokens"), ([1] * 41, "41 tokens, the model 40"), ([257], "outside the model's")):
        with pytest.raises(DataError, match=message):
            next(generate(model(), ids, 1))


@pytest.mark.parametrize("field", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}])
def test_options_out_of_range(field: dict) -> None:
    with pytest.raises(ConfigError, match="must be"):
        SamplingOptions(**field)


def test_top_k_and_top_p_against_plain_loops() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for temperature, k, p in ((0.7, 5, 1.0), (1.0, 0, 0.6), (1.3, 10, 0.5), (1.0, 1, 1.0), (1.0, 99, 1e-9)):
        got = probabilities(logits, SamplingOptions(temperature, k, p))
        ranked = sorted(range(50), key=lambda i: -float(logits[i]))
        allowed = ranked[: k or 50]
        weights = {i: float((logits[i].double() / temperature).exp()) for i in allowed}
        total, kept, mass = sum(weights.values()), [], 0.0
        for i in allowed:
            if kept and mass >= p:
                break
            kept.append(i)
            mass += weights[i] / total
        total = sum(weights[i] for i in kept)
        for i in range(50):
            assert float(got[i]) == pytest.approx(weights[i] / total if i in kept else 0.0, abs=1e-6)


def test_sampling_follows_the_distribution() -> None:
    logits, generator = torch.tensor([0.0, 1.0, 2.0]), torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([choose(logits, SamplingOptions(1.0), generator) for _ in range(4000)]))
    assert torch.allclose(counts / 4000, logits.softmax(0), atol=0.03)


def test_text_engine_streams_what_decoding_gives() -> None:
    engine = TextEngine(model(), Tokenizer.byte_level())
    ids = list(generate(engine.model, engine.prompt_ids("Hé"), 20, SamplingOptions(seed=3), eos_id=256))
    pieces = list(engine.write("Hé", 20, SamplingOptions(seed=3)))
    assert "".join(pieces) == engine.tokenizer.decode(ids)


def test_a_tokenizer_too_large_for_the_model() -> None:
    with pytest.raises(ConfigError, match="words and the model 257"):
        TextEngine(model(), Tokenizer.train_bpe(["some text with enough pairs to merge, some text"] * 30, 300))


def test_a_bfloat16_model_writes() -> None:
    m = model().to(torch.bfloat16)
    assert len(list(generate(m, [1, 2, 3], 6, SamplingOptions(temperature=0)))) == 6

import csv
from pathlib import Path

import pytest
import torch

from bitquest.errors import ConfigError, DataError
from bitquest.inference import KVCache
from bitquest.models import PRESETS, Llama, LlamaConfig
from bitquest.nn import quantize_


def tiny(**overrides: object) -> LlamaConfig:
    fields: dict = {"vocab_size": 61, "max_position_embeddings": 32, "hidden_size": 64, "num_attention_heads": 4}
    return LlamaConfig.preset("1M", **{**fields, "num_hidden_layers": 2, **overrides})


def test_presets_have_the_papers_sizes(shared_data: Path) -> None:
    with open(shared_data / "quest_paper_runs.csv") as file:
        rows = list(csv.DictReader(file))
    column = next(name for name in rows[0] if "param" in name.lower() or name == "N")
    published = {int(float(row[column])) for row in rows}
    ours = {
        LlamaConfig.preset(name, vocab_size=32000, max_position_embeddings=512).non_embedding_parameters
        for name in ("30M", "50M", "100M", "200M", "430M", "800M")
    }
    assert ours == published


@pytest.mark.parametrize("name", PRESETS)
def test_counted_parameters_are_the_models(name: str) -> None:
    options = {"qk_norm": True, "norm_before_o_proj": True, "norm_before_down_proj": True}
    config = LlamaConfig.preset(name, vocab_size=10, max_position_embeddings=8, num_key_value_heads=1, **options)
    with torch.device("meta"):
        model = Llama(config)
    outside = 2 * 10 * config.hidden_size
    assert sum(p.numel() for p in model.parameters()) - outside == config.non_embedding_parameters


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_attention_heads": 5}, "hidden_size 64 is not divisible by num_attention_heads 5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"hidden_size": -1}, "hidden_size must be a positive"),
        ({"qk_norm": 1}, "qk_norm must be true or false"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"num_attention_heads": 64}, "RoPE"),
        ({"hiden_size": 3}, "did you mean 'hidden_size'"),
    ],
)
def test_sizes_that_do_not_fit(overrides: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**overrides)


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean '30M'"):
        LlamaConfig.preset("30m", vocab_size=1, max_position_embeddings=1)
    with pytest.raises(ConfigError, match="lack"):
        LlamaConfig.from_json({"vocab_size": 3})


@pytest.mark.parametrize("scheme", ["none", "w4a4", "w1a1-h8"])
@pytest.mark.parametrize("overrides", [{}, {"num_key_value_heads": 2, "qk_norm": True}, {"tie_word_embeddings": True}])
def test_cached_equals_uncached(scheme: str, overrides: dict) -> None:
    config = tiny(**overrides, norm_before_o_proj=True, norm_before_down_proj=True)
    model = quantize_(Llama(config).init_weights(1), scheme)
    ids = torch.randint(0, 61, (2, 17), generator=torch.Generator().manual_seed(0))
    cache = KVCache(config, batch=2)
    with torch.no_grad():
        whole = model(ids)
        parts = [model(ids[:, a:b], cache) for a, b in ((0, 5), (5, 6), (6, 11), (11, 17))]
    # A rounding difference may flip a code; at this size and seed none does.
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-5)
    assert cache.length == 17


def test_same_seed_same_weights_whatever_the_global_generator() -> None:
    first = Llama(tiny()).init_weights(3).state_dict()
    torch.manual_seed(99)
    torch.randn(7)
    second = Llama(tiny()).init_weights(3).state_dict()
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))
    other = Llama(tiny()).init_weights(4).state_dict()
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_a_token_does_not_see_later_ones() -> None:
    model = quantize_(Llama(tiny()).init_weights(1), "w2a2")
    ids = torch.randint(0, 61, (1, 12))
    changed = ids.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 61
    with torch.no_grad():
        assert torch.allclose(model(ids)[:, :8], model(changed)[:, :8], atol=1e-5)
        assert not torch.allclose(model(ids)[:, 8:], model(changed)[:, 8:], atol=1e-3)


@pytest.mark.parametrize("scheme", ["none", "w4a4", "w1a1"])
def test_activation_checkpointing_changes_no_gradient(scheme: str) -> None:
    gradients = []
    for on in (False, True):
        model = quantize_(Llama(tiny()).init_weights(1), scheme)
        model.activation_checkpointing = on
        model(torch.arange(20).reshape(2, 10)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("scheme", ["none", "w4a4", "w1a8-g32"])
def test_compiles_without_graph_breaks(scheme: str) -> None:
    model = quantize_(Llama(tiny()).init_weights(1), scheme)
    ids = torch.arange(20).reshape(2, 10)
    eager = model(ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    result = compiled(ids)
    assert torch.allclose(result, eager, atol=1e-5)
    result.square().mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_too_many_positions() -> None:
    with pytest.raises(DataError, match="33 tokens are more than the 32 positions"):
        Llama(tiny())(torch.zeros(1, 33, dtype=torch.int64))
    cache = KVCache(tiny(), positions=4)
    with pytest.raises(DataError, match="holds 4 positions; 5"):
        Llama(tiny())(torch.zeros(1, 5, dtype=torch.int64), cache)


def test_bf16_autocast_runs_and_is_near() -> None:
    model = Llama(tiny()).init_weights(1)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(ids).float()
    assert torch.allclose(half, model(ids), atol=2e-2)


def test_logits_of_the_last_position_alone() -> None:
    model = Llama(tiny()).init_weights(0)
    ids = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model(ids, last=True), model(ids)[:, -1:], atol=1e-6)

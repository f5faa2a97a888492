"""Formats at equal loss: shapes, the scaling of blocks, winners, and losses that no size has."""

import pytest
import torch

from bitquest.benchmarks import cpu_equal_loss
from bitquest.benchmarks.cpu_equal_loss import FORMATS, measure_equal_loss, nearest_shape
from bitquest.benchmarks.cpu_random import model_bytes, packed_llama
from bitquest.benchmarks.cpu_report import equal_loss_lines
from bitquest.errors import ConfigError
from bitquest.models import PRESETS, LlamaConfig
from bitquest.nn import Scheme


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("1M", "3M", "10M")])
def test_the_presets_are_their_own_nearest_shapes(name):
    preset = LlamaConfig.preset(name, vocab_size=64, max_position_embeddings=1024)
    assert nearest_shape(preset.non_embedding_parameters, 64) == preset


@pytest.mark.parametrize("parameters", [2e7, 6.6e7, 2.4e8, 1.1e9, 8e9, 3e11])
def test_shapes_between_them(parameters):
    shape = nearest_shape(parameters, 64)
    assert shape.non_embedding_parameters == pytest.approx(parameters, rel=0.03)
    assert 0.6 < shape.hidden_size / shape.num_hidden_layers / 128 < 1.6
    assert shape.hidden_size % 128 == shape.intermediate_size % 128 == 0


def test_formats_side_by_side():
    told = []
    found = measure_equal_loss(4.6, (1,), 1, True, False, told.append)
    assert list(found["formats"]) == list(FORMATS)
    for name, row in found["formats"].items():
        assert row["loss_of_shape"] == pytest.approx(4.6, abs=0.1)
        assert row["bytes"] > row["bytes_per_token"] > 0
        for phase, tokens in (("decode", 1), ("prefill", found["prompt"])):
            assert row[phase]["tokens_per_second"] == tokens / row[phase]["median_seconds"] > 0
            assert row[phase]["ran_as"].split()[0] == name
    formats = found["formats"]
    assert (formats["w1a8"]["efficiency_of"], formats["w1a8"]["efficiency"]) == ("w1a16", 0.138)
    assert formats["w1a1"]["parameters"] > formats["w1a8"]["parameters"] > formats["bf16"]["parameters"]
    fastest = found["winners"]["fastest decoding"]
    speeds = {name: row["decode"]["tokens_per_second"] for name, row in formats.items()}
    assert speeds[fastest] == max(speeds.values())
    assert formats[found["winners"]["fewest bytes"]]["bytes"] == min(row["bytes"] for row in formats.values())
    text = "\n".join(equal_loss_lines(found))
    assert "taken as w1a16" in text
    assert f"fastest decoding: {fastest}" in text


def test_bytes_of_a_model_whose_blocks_were_not_all_made():
    config = LlamaConfig.preset("1M", vocab_size=64, max_position_embeddings=16)
    row = {"config": config}
    cpu_equal_loss._runners("w2a8", row, whole=False)
    assert row["blocks_measured"] == 4  # small blocks: all of them
    assert {name: row[name] for name in ("bytes", "bytes_per_token")} == model_bytes(
        packed_llama(config, Scheme.parse("w2a8-h8"))
    )


def test_blocks_are_scaled_and_the_head_is_not():
    def seconds(median, minimum):
        return {"median_seconds": median, "minimum_seconds": minimum, "repetitions": 3}

    taken = {
        "w2a2": seconds(7.0, 5.0),
        "w2a2, one block": seconds(3.0, 3.0),
        "w2a8": seconds(0.1, 0.1),
        "w2a8, one block": seconds(0.2, 0.2),
    }
    row = {"blocks_measured": 3, "layers": 10}  # a block takes 2 seconds (1 at least), head and table 1 (2)
    (made,) = cpu_equal_loss._scaled("w2a2", row, taken, tokens=42)
    assert (made["median_seconds"], made["minimum_seconds"], made["one_block_seconds"]) == (21.0, 12.0, 3.0)
    assert made["tokens_per_second"] == 2.0
    (noise,) = cpu_equal_loss._scaled("w2a8", row, taken, tokens=1)
    assert noise["median_seconds"] == 0.1
    (all_of_it,) = cpu_equal_loss._scaled("w2a2", {"blocks_measured": 3, "layers": 3}, taken, tokens=1)
    assert all_of_it["median_seconds"] == 7.0
    (single,) = cpu_equal_loss._scaled("w2a2", {"blocks_measured": 1, "layers": 1}, taken, tokens=1)
    assert single["median_seconds"] == 7.0


def test_the_first_blocks_of_a_model():
    config = LlamaConfig.preset("1M", vocab_size=64, max_position_embeddings=16)
    model = packed_llama(config, Scheme.parse("w1a1-h8"))
    ids, decoder = torch.tensor([[3, 4]]), model.model
    with torch.no_grad():
        bare = cpu_equal_loss._first_blocks(model, 0)
        assert torch.equal(bare(ids), model.lm_head(decoder.norm(decoder.embed_tokens(ids))))
        assert torch.equal(cpu_equal_loss._first_blocks(model, 4)(ids), model(ids))


@pytest.mark.parametrize(
    ("loss", "message"),
    [(0.5, "bf16: no size has a loss of 0.5"), (50.0, "no size has a loss of 50"), (1.5, "parameters; take a higher")],
)
def test_losses_that_are_not_to_be_had(loss, message):
    with pytest.raises(ConfigError, match=message):
        measure_equal_loss(loss, (1,), 1, True, False, print)

"""`bitquest eval` on packed models, runs and Hugging Face folders, and what one gets wrong."""

import json
import math

import pytest

from bitquest.models import Llama, LlamaConfig, Tokenizer, save_hf
from bitquest.training import prepare


@pytest.fixture
def packed(bitquest, run_dir, tmp_path):
    bitquest("export", run_dir, "--out", tmp_path / "packed")
    return tmp_path / "packed"


def test_figures(bitquest, run_dir, packed):
    text = run_dir.parent / "text.txt"
    result, said = bitquest("eval", packed, "--data", text, "--json")
    assert (result["command"], result["kind"]) == ("eval", "packed")
    assert result["utf8_bytes"] == text.stat().st_size
    assert result["tokens"] == text.stat().st_size + 1  # and the end of the text
    assert result["bits_per_byte"] == pytest.approx(result["nats"] / math.log(2) / result["utf8_bytes"])
    assert result["perplexity"] == pytest.approx(math.exp(result["nats"] / result["tokens"]))
    assert result["tokens_per_second"] > 0
    assert "bits per byte" in said
    of_run, _ = bitquest("eval", run_dir, "--data", text, "--json")
    assert of_run["kind"] == "run"
    assert of_run["loss"] == pytest.approx(result["loss"], rel=0.01)


def test_limits_and_kinds_of_text(bitquest, run_dir, packed, tmp_path):
    (tmp_path / "lines.jsonl").write_text(json.dumps({"text": "one and two"}) + "\n")
    for data, tokens, found in [
        (run_dir.parent / "text.txt", 50, 50),
        (run_dir.parent / "data", 50, 50),
        (tmp_path / "lines.jsonl", 50, 12),
    ]:
        result, _ = bitquest("eval", packed, "--data", data, "--tokens", tokens, "--json")
        assert result["tokens"] == found
    shorter, _ = bitquest("eval", packed, "--data", run_dir.parent / "text.txt", "--context", 4, "--json")
    assert shorter["tokens"] == (run_dir.parent / "text.txt").stat().st_size + 1


def test_mistakes_give_one_message(bitquest, run_dir, packed, tmp_path):
    text = run_dir.parent / "text.txt"
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    prepare([text], "bpe:300", tmp_path / "other", val_fraction=0.2)
    narrow = Llama(LlamaConfig(200, 16, 32, 1, 2, 2, 16)).init_weights(0)
    save_hf(narrow, tmp_path / "narrow")
    Tokenizer.byte_level().save(tmp_path / "narrow" / "tokenizer.json")
    for model, data, part in [
        (tmp_path / "nowhere", text, "no such directory"),
        (tmp_path / "other", text, "neither a packed model"),
        (packed, tmp_path / "nowhere.txt", "nowhere.txt"),
        (packed, tmp_path / "empty.txt", "empty"),
        (packed, tmp_path / "image.png", "image.png"),
        (packed, tmp_path / "bad.jsonl", "line 2"),
        (packed, tmp_path / "other", "another tokenizer"),
        (tmp_path / "narrow", text, "vocabulary of 200"),
    ]:
        _, said = bitquest("eval", model, "--data", data, code=1)
        assert part in said, (model, data)
        assert said.strip().startswith("error: ")
        assert len(said) < 700
    for words, part in [
        (("--tokens", 0), "at least 1"),
        (("--context", 0), "context of 0"),
        (("--context", 99), "a context of 99 tokens is longer than the model's"),
        (("--step", 8), "no run directory"),
    ]:
        _, said = bitquest("eval", packed, "--data", text, *words, code=1)
        assert part in said, words


def test_a_misspelt_backend_is_a_mistake_for_every_kind_of_model(bitquest, run_dir, packed):
    for model in (run_dir, packed):
        _, said = bitquest("eval", model, "--data", run_dir.parent / "text.txt", "--backend", "gpu", code=1)
        assert said == "error: unknown backend 'gpu'; this version has: auto, cuda, triton, native, torch\n"

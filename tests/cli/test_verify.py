"""`bitquest verify`: a table for people, an object for programs, and an exit code."""

import pytest

from bitquest.export import load, read_tokenizer, save

FAST = ("--tokens", 100, "--texts", 1, "--new-tokens", 4)


@pytest.fixture
def packed(bitquest, run_dir, tmp_path):
    bitquest("export", run_dir, "--out", tmp_path / "packed")
    return tmp_path / "packed"


def test_the_table(bitquest, run_dir, packed):
    result, said = bitquest("verify", run_dir, packed, *FAST)
    assert result is None
    assert "The packed model is the trained model." in said
    for name in ("description", "weights", "tensors", "layers", "activation codes", "greedy tokens", "perplexity"):
        assert name in said
    assert "FAILED" not in said


def test_the_object(bitquest, run_dir, packed):
    result, _ = bitquest("verify", run_dir, packed, *FAST, "--json", "--data", run_dir.parent / "text.txt")
    assert (result["bitquest"], result["command"], result["passed"], result["step"]) == (1, "verify", True, 8)
    assert len(result["checks"]) == 7


def test_a_changed_model_fails_loudly(bitquest, run_dir, packed, tmp_path):
    model = load(packed)
    layer = model.model.layers[0].mlp.down_proj
    codes = layer.codes
    codes[1, 2] = -1 - codes[1, 2]
    layer.codes = codes
    save(model, tmp_path / "changed", read_tokenizer(packed), {"step": 8})
    result, said = bitquest("verify", run_dir, tmp_path / "changed", *FAST, "--json", code=1)
    assert not result["passed"]
    assert "FAILED" in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("The packed model is not the trained one. weights: ")
    assert "model.layers.0.mlp.down_proj: weight codes: 1 of 2048 differ, the first at [1, 2]" in last


def test_mistakes_give_one_message(bitquest, run_dir, packed, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    damaged = packed / "model.safetensors"
    for words, part in [
        ((packed, run_dir), "run directory"),
        ((run_dir, tmp_path / "nowhere"), "no such directory"),
        ((run_dir, packed, "--data", tmp_path / "nowhere.txt"), "nowhere.txt"),
        ((run_dir, packed, "--data", tmp_path / "empty.txt"), "empty"),
        ((run_dir, packed, "--step", 3), "step 3"),
        ((run_dir, packed, "--backend", "abacus"), "abacus"),
    ]:
        _, said = bitquest("verify", *words, *FAST, code=1)
        assert part in said, words
        assert len(said) < 700
    damaged.write_bytes(damaged.read_bytes()[:-1])
    _, said = bitquest("verify", run_dir, packed, *FAST, code=1)
    assert "truncated" in said

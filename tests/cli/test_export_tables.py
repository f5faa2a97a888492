"""`bitquest export --tables`: a float embedding and head rounded after training, what it saves and what it costs."""

import json
import shutil

import pytest

from bitquest.export import load
from bitquest.nn import TableRounding
from bitquest.training import prepare

FAST = ("--tokens", 100, "--texts", 1, "--new-tokens", 4)


def metadata(packed):
    return json.loads((packed / "config.json").read_text())["metadata"]


@pytest.mark.parametrize("bits", [8, 4])
def test_tables_are_rounded_measured_and_verified(bitquest, run_dir, tmp_path, bits):
    plain, out = tmp_path / "float", tmp_path / "few"
    whole, _ = bitquest("export", run_dir, "--out", plain, "--json")
    result, said = bitquest("export", run_dir, "--out", out, "--tables", bits, "--tokens", 90, "--json")
    assert (whole["tables"], whole["rounding"]) == (None, None)
    assert result["tables"] == metadata(out)["tables"] == TableRounding.to_bits(bits).to_json()
    assert "tables" not in metadata(plain)
    cost = result["rounding"]
    words = cost["float_bytes"] // (2 * 4 * 32)
    assert result["embedding_bytes"] == result["head_bytes"] == words * (32 * bits // 8 + 4)
    assert cost["float_bytes"] == whole["embedding_bytes"] + whole["head_bytes"]
    assert cost["saved_bytes"] == whole["total_bytes"] - result["total_bytes"]
    assert cost["not_measured"] is None
    for key, folder in (("before", plain), ("after", out)):
        alone, _ = bitquest("eval", folder, "--data", run_dir.parent / "data", "--tokens", 90, "--json")
        assert cost[key]["tokens"] == 90
        assert (cost[key]["nats"], cost[key]["bits_per_byte"]) == (alone["nats"], alone["bits_per_byte"])
    assert cost["relative_change"] == pytest.approx(cost["after"]["perplexity"] / cost["before"]["perplexity"] - 1)
    assert f"rounded after training to {bits} bits, {cost['saved_bytes'] / 1e6:.2f} MB saved; perplexity " in said
    assert f"{cost['before']['perplexity']:.4f} before, {cost['after']['perplexity']:.4f} after" in said
    assert "on 90 held-out tokens" in said
    assert load(out).lm_head.weight_spec.bits == load(out).model.embed_tokens.weight_spec.bits == bits

    checked, said = bitquest("verify", run_dir, out, *FAST, "--json")
    assert checked["passed"]
    assert checked["tables"]["summary"] == f"rounded after training at export ({bits} bits)"
    assert "The packed model is the trained model, its embedding and head rounded after training at export" in said
    checked, said = bitquest("verify", run_dir, plain, *FAST, "--json")
    assert checked["tables"] is None
    assert "after training" not in said


def test_float_is_the_default_and_twice_is_the_same_bytes(bitquest, run_dir, tmp_path):
    for name, words in [("a", ()), ("b", ("--tables", "float")), ("c", ("--tables", 8)), ("d", ("--tables", 8))]:
        bitquest("export", run_dir, "--out", tmp_path / name, *words)
    for name in ("config.json", "manifest.json", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()


def test_without_its_data_a_run_is_exported_all_the_same(bitquest, small_run, tmp_path):
    run, out = small_run(tmp_path, "none"), tmp_path / "out"
    (tmp_path / "data").rename(tmp_path / "moved")
    result, said = bitquest("export", run, "--out", out, "--tables", 8, "--json")
    assert f"was not measured: {tmp_path / 'data'}, the run's data, is gone. See bitquest eval --data" in said
    cost = result["rounding"]
    assert "is gone" in cost["not_measured"]
    assert (cost["before"], cost["after"], cost["relative_change"]) == (None, None, None)
    assert cost["saved_bytes"] > 0
    checked, _ = bitquest("verify", run, out, *FAST, "--data", tmp_path / "moved", "--json")
    assert checked["passed"]
    (tmp_path / "other.txt").write_text("quite other words. " * 400)
    prepare([tmp_path / "other.txt"], "bpe:300", tmp_path / "data", val_fraction=0.2)
    _, said = bitquest("export", run, "--out", out, "--tables", 8, "--overwrite")
    assert "was prepared with another tokenizer" in said
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").write_text("")
    _, said = bitquest("export", run, "--out", out, "--tables", 4, "--overwrite")
    assert "was not measured: " in said
    assert metadata(out)["tables"]["bits"] == 4


def test_trained_tables_are_not_rounded_again(bitquest, small_run, tmp_path):
    run, out = small_run(tmp_path, "w4a4-h8"), tmp_path / "out"
    for bits in (8, 4):
        _, said = bitquest("export", run, "--out", out, "--tables", bits, code=1)
        assert said.startswith(f"error: --tables {bits} does not fit a run of scheme w4a4-h8: model.embed_tokens has ")
        assert said.rstrip().endswith(
            "8-bit codes already: only a float embedding and head can be rounded. Leave --tables out"
        )
        assert not out.exists()
    result, _ = bitquest("export", run, "--out", out, "--tables", "float", "--json")
    assert (result["tables"], result["rounding"]) == (None, None)


def test_mistakes_give_one_message_and_leave_nothing(bitquest, run_dir, tmp_path):
    out = tmp_path / "out"
    for words, code, part in [
        (("--tables", 5), 2, "'5' is not one of '8', '4', 'float'"),
        (("--tables", 8, "--tokens", 0), 2, "--tokens"),
        (("--tokens", 9), 1, "--tokens is for the rounding of tables; add --tables 8 or --tables 4"),
        (("--tables", 8, "--step", 3), 1, "step 3"),
    ]:
        _, said = bitquest("export", run_dir, "--out", out, *words, code=code)
        assert part in " ".join(said.split()), words
        assert not out.exists()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    _, said = bitquest("export", run_dir, "--out", out, "--tables", 8, "--overwrite", code=1)
    assert "not only a packed model" in said
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["mine.txt"]

"""What rounding costs is measured on the models it is about, and `verify` proves the rounded model exactly."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from bitquest.errors import DataError, FormatError
from bitquest.evaluation.perplexity import Perplexity, evaluate_tokens
from bitquest.evaluation.sources import open_stream
from bitquest.evaluation.table_rounding import RoundingCost, float_bytes, held_out, rounding_cost
from bitquest.evaluation.verify import verify
from bitquest.export import load, read_tokenizer, save
from bitquest.nn import Scheme, TableRounding, round_tables_
from bitquest.training import load_run

SMALL = {"tokens": 200, "texts": 2, "new_tokens": 8}


def export(run: Path, out: Path, bits: int, **metadata):
    """A run's model with rounded tables, packed; gives the float tables."""
    loaded = load_run(run)
    rounding = TableRounding.to_bits(bits, Scheme.parse(loaded.config.scheme).rotation)
    tables = round_tables_(loaded.model, rounding)
    save(loaded.model, out, loaded.tokenizer, {"step": loaded.step, "tables": rounding.to_json(), **metadata})
    return tables


def failed(report):
    return {check.name: " | ".join(check.failures) for check in report.failed}


# --- what it costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_before_is_the_float_export_and_after_the_rounded_one(w1a1, tmp_path, bits):
    tables = export(w1a1 / "run", tmp_path / "rounded", bits)
    progress = []
    text = held_out(w1a1 / "data", read_tokenizer(tmp_path / "rounded"), 150)
    cost = rounding_cost(tmp_path / "rounded", tables, text, lambda *now: progress.append(now))
    for folder, found in ((w1a1 / "packed", cost.before), (tmp_path / "rounded", cost.after)):
        alone = evaluate_tokens(load(folder), text.tokens, utf8_bytes=text.utf8_bytes)
        assert (found.nats, found.tokens, found.utf8_bytes) == (alone.nats, 150, alone.utf8_bytes)
    assert cost.before.nats != cost.after.nats
    assert cost.relative_change == pytest.approx(cost.after.perplexity / cost.before.perplexity - 1)
    assert progress[-1] == (300, 300)
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert json.loads(json.dumps(cost.to_json()))["relative_change"] == cost.relative_change


def test_float_bytes_count_tied_tables_once():
    table, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    assert float_bytes({"words": table, "lm_head": head}) == 320
    head.weight = table.weight
    assert float_bytes({"words": table, "lm_head": head}) == 160
    assert float_bytes({"words": table.bfloat16()}) == 80


def test_figures_that_are_not_finite_are_null():
    fine = Perplexity(10.0, 5, 20)
    for nats in (math.inf, math.nan, 1e6):
        fields = RoundingCost(fine, Perplexity(nats, 5, 20)).to_json()
        assert fields["relative_change"] is None
        json.dumps(fields, allow_nan=False)


def test_text_that_is_not_there(w1a1, tmp_path):
    tokenizer = read_tokenizer(w1a1 / "packed")
    assert torch.equal(held_out(w1a1 / "data", tokenizer, 9).tokens, open_stream(w1a1 / "data", tokenizer, 9).tokens)
    (tmp_path / "empty").mkdir()
    for path, part in [(tmp_path / "nothing", "is gone"), (tmp_path / "empty", "empty")]:
        with pytest.raises(DataError, match=part):
            held_out(path, tokenizer, 9)


# --- verify --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "model", "bits"),
    [("w1a1", {}, 8), ("w4a4", {"tie_word_embeddings": True}, 4), ("w2a8-g32-norot", {}, 4), ("none", {}, 8)],
)
def test_a_rounded_model_is_verified_exactly(trained_run, tmp_path, scheme, model, bits):
    trained_run(tmp_path, scheme, **model)
    export(tmp_path / "run", tmp_path / "rounded", bits)
    report = verify(tmp_path / "run", tmp_path / "rounded", **SMALL)
    assert report.passed, failed(report)
    assert report.tables == f"rounded after training at export ({bits} bits)"
    fields = json.loads(json.dumps(report.to_json()))
    assert fields["tables"]["bits"] == bits
    assert fields["tables"]["summary"] == report.tables
    by_layer = report.check("layers").figures["by_layer"]
    assert {"model.embed_tokens", "lm_head"} <= set(by_layer)
    assert len(by_layer) == 2 + (0 if scheme == "none" else 14)


def test_float_tables_are_reported_as_trained(w1a1):
    report = verify(w1a1 / "run", w1a1 / "packed", **SMALL)
    assert report.tables is None
    assert report.to_json()["tables"] is None


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_one_changed_code_of_a_table(w1a1, tmp_path, name):
    export(w1a1 / "run", tmp_path / "rounded", 8)
    model = load(tmp_path / "rounded")
    table = model.get_submodule(name)
    table.packed[97, 3] ^= 64
    rounding = TableRounding.to_bits(8)
    save(model, tmp_path / "changed", read_tokenizer(w1a1 / "packed"), {"step": 12, "tables": rounding.to_json()})
    wrong = failed(verify(w1a1 / "run", tmp_path / "changed", **SMALL))
    assert f"{name}: weight codes: 1 of" in wrong["weights"]
    assert f"{name}: its output" in wrong["layers"]


def test_what_metadata_say_is_held_against_the_tables(w1a1, tmp_path):
    run = w1a1 / "run"
    other = TableRounding.to_bits(4).to_json()
    export(run, tmp_path / "other", 8, tables=other)
    wrong = failed(verify(run, tmp_path / "other", **SMALL))
    assert "model.embed_tokens: weight: trained grid" in wrong["description"]
    export(run, tmp_path / "silent", 8, tables=None)
    assert "lm_head: packed, not quantized in training" in failed(verify(run, tmp_path / "silent"))["description"]
    loaded = load_run(run)
    save(loaded.model, tmp_path / "float", loaded.tokenizer, {"step": 12, "tables": other})
    wrong = failed(verify(run, tmp_path / "float", **SMALL))
    assert "model.embed_tokens: rounded, as the metadata say, not packed" in wrong["description"]


def test_metadata_that_mean_nothing(w1a1, trained_run, tmp_path):
    for number, tables in enumerate((8, {"bits": 8}, {**TableRounding.to_bits(8).to_json(), "bits": 3})):
        export(w1a1 / "run", tmp_path / str(number), 8, tables=tables)
        with pytest.raises(FormatError, match=r"its metadata: .*Export the run again"):
            verify(w1a1 / "run", tmp_path / str(number))
    trained_run(tmp_path, "w1a1-h8")
    export(w1a1 / "run", tmp_path / "rounded", 8)
    with pytest.raises(FormatError, match=r"which the model of .* cannot be: model\.embed_tokens has 8-bit codes"):
        verify(tmp_path / "run", tmp_path / "rounded")

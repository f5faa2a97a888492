"""The demo from text to report: stopped and started again, whole, and refused where it does not belong."""

import json

import pytest

from bitquest.demo.recipe import SCHEMES, Recipe
from bitquest.demo.stages import commands, demo
from bitquest.errors import ConfigError

NAMES = [name for name, _, _ in SCHEMES]


def test_it_stops_and_goes_on(made):
    _, (stopped, finished), (first, second) = made
    assert stopped.interrupted
    assert stopped.runs == ()
    assert first.stages[-1] == "training unquantized"
    assert not finished.interrupted
    assert not any("held out" in stage for stage in second.stages)  # the data is prepared already
    assert [s for s in second.stages if s.startswith("training")] == [f"training {name}" for name in NAMES]
    assert second.stages[-1] == "writing the report"


def test_what_it_comes_to(made):
    out, (_, result), _ = made
    assert [run.name for run in result.runs] == NAMES
    assert all(run.verified and run.finished for run in result.runs)
    totals = [run.packed_bytes["total_bytes"] for run in result.runs]
    assert totals == sorted(totals, reverse=True)
    assert result.runs[2].packed_bytes["linear_bytes"] * 20 < result.runs[0].packed_bytes["linear_bytes"]
    assert all(count >= 200 for count in result.words.values())
    assert all(0 <= share <= 1 for share in result.known_words.values())
    assert "scheme" not in result.table.columns
    page = (out / "report.html").read_text(encoding="utf-8")
    for text in (*NAMES, "byte 3-gram", "bitquest verify", "<svg", "Source files of Python"):
        assert text in page
    assert json.loads(json.dumps(result.to_json()))["runs"][2]["scheme"] == "w1a1"


def test_the_losses_are_the_packed_models_own(made):
    out, (_, result), _ = made
    from bitquest.evaluation.perplexity import evaluate_tokens
    from bitquest.evaluation.sources import open_model, open_stream

    opened = open_model(out / "packed" / "w1a1")
    stream = open_stream(out / "data", opened.tokenizer)
    found = evaluate_tokens(opened.model, stream.tokens, utf8_bytes=stream.utf8_bytes)
    assert found.loss == pytest.approx(result.runs[2].val_loss, rel=1e-6)
    assert found.bits_per_byte == pytest.approx(result.runs[2].bits_per_byte, rel=1e-6)


def test_a_finished_demo_is_read_not_made_again(made, small_corpus, listener):
    out, (_, finished), _ = made
    before = {path: path.stat().st_mtime_ns for path in (out / "measured").iterdir()}
    again = demo(out, small_corpus, listener, recipe=Recipe(2))
    assert again.to_json() == finished.to_json()
    assert {path: path.stat().st_mtime_ns for path in (out / "measured").iterdir()} == before
    assert listener.progress == []


def test_a_failed_verification_shows(made, small_corpus, listener):
    out, _, _ = made
    path = out / "measured" / "w4a4.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(json.dumps(json.loads(text) | {"verified": False}), encoding="utf-8")
    try:
        result = demo(out, small_corpus, listener, recipe=Recipe(2))
    finally:
        path.write_text(text, encoding="utf-8")
    assert [run.verified for run in result.runs] == [True, False, True]
    assert result.table.rows[1][-1] == "no"


def test_its_commands_are_commands(made):
    out, _, _ = made
    lines = commands(out, "It is the duty of")
    assert [line.split()[1] for line in lines] == ["data", *["train", "export", "verify", "eval"] * 3, "generate"]
    assert "'It is the duty of'" in lines[-1]


def test_another_demo_in_the_directory(made, small_corpus, listener):
    out, _, _ = made
    with pytest.raises(ConfigError, match="another text, other steps"):
        demo(out, small_corpus, listener, recipe=Recipe(3))


def test_a_directory_with_something_else(tmp_path, small_corpus, listener):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds thesis.tex and no demo.json, so it is no demo"):
        demo(tmp_path, small_corpus, listener)
    with pytest.raises(ConfigError, match="there is a file of this name"):
        demo(tmp_path / "thesis.tex", small_corpus, listener)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

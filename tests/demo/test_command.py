"""`bitquest demo` as a user meets it."""

import json
import shlex
import sys

import pytest

import bitquest.cli.app as app
from bitquest.cli.console import err
from bitquest.demo import corpus


@pytest.fixture
def bitquest(small_corpus, monkeypatch, capsys):
    """Run `bitquest demo` in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(corpus, "find_corpus", lambda: small_corpus)
    monkeypatch.setattr(err, "_width", 80, raising=False)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["bitquest", "demo", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            app.main()
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return caught.value.code, captured.out, captured.err

    return call


def test_table_sample_and_json(bitquest, made):
    out, (_, result), _ = made
    code, printed, said = bitquest("--out", out, "--steps", 2, "--json")
    assert code == 0
    assert json.loads(printed) == {"bitquest": 1, "command": "demo", **result.to_json()}
    assert "W1A1 writes:" in said
    assert f"Written: {out / 'report.html'}" in said
    for run in result.runs:
        assert f"{run.val_loss:.4f}" in said
    assert "…" not in said.split("Validation loss (nats")[0]  # the table fits a terminal of 80 columns


def test_a_failed_verification_is_an_error(bitquest, made):
    out, _, _ = made
    path = out / "measured" / "w1a1.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(json.dumps(json.loads(text) | {"verified": False}), encoding="utf-8")
    try:
        code, _, said = bitquest("--out", out, "--steps", 2)
    finally:
        path.write_text(text, encoding="utf-8")
    assert code == 1
    assert "not the trained model" in said
    assert "W1A1" in said.splitlines()[-1]


def test_stopped_it_names_the_command_that_goes_on(bitquest, tmp_path, monkeypatch, small_corpus):
    import bitquest.demo.stages as stages
    from bitquest.demo.stages import DemoResult

    monkeypatch.setattr(stages, "demo", lambda *args, **options: DemoResult(interrupted=True))
    code, _, said = bitquest("--out", tmp_path / "with space", "--steps", 3)
    assert code == 0  # no signal came: the exit code of Ctrl-C is 130
    assert said.splitlines()[-1].strip() == f"bitquest demo --out {shlex.quote(str(tmp_path / 'with space'))} --steps 3"


def test_mistakes(bitquest, tmp_path):
    code, _, said = bitquest("--steps", 0)
    assert code == 2
    assert "--steps" in said
    (tmp_path / "thesis.tex").write_text("mine")
    code, _, said = bitquest("--out", tmp_path)
    assert code == 1
    assert said.startswith("error: ")
    assert "holds thesis.tex" in said

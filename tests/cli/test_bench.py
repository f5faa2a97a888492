"""`bitquest bench` as a user meets it."""

import json

import pytest

SMALL = ("--width", 64, "--layers", 1, "--batch", 1, "--context", 8, "--repetitions", 2)


def test_schemes_side_by_side(bitquest, tmp_path):
    out = tmp_path / "new folder" / "result.json"
    result, said = bitquest("bench", "train-step", *SMALL, "--schemes", "none, w4a4,w1a1", "--out", out, "--json")
    assert said == ""
    assert (result["command"], result["baseline"], list(result["schemes"])) == (
        "bench train-step",
        "none",
        ["none", "w4a4", "w1a1"],
    )
    assert result["schemes"]["none"]["ratio_of_medians"] == result["schemes"]["none"]["ratio_of_minima"] == 1
    for row in result["schemes"].values():
        assert 0 < row["minimum_seconds"] <= row["median_seconds"]
        assert row["repetitions"] == 2
        assert row["target"] is None  # targets are for the size they were set at
    written = json.loads(out.read_text())
    assert written["schemes"] == result["schemes"]
    assert written["command"].startswith("bitquest bench train-step --schemes none,w4a4,w1a1 --width 64 ")
    assert {"date", "cpu", "torch"} <= set(written["hardware"])
    assert [path.name for path in out.parent.iterdir()] == ["result.json"]


def test_the_table(bitquest):
    _, said = bitquest("bench", "train-step", *SMALL, "--schemes", "w2a2")
    assert "width 64, 1 blocks, 1×8 bytes" in said
    assert "w2a2" in said
    assert "1.00" in said


def test_mistakes_are_told_before_anything_is_measured(bitquest, tmp_path, monkeypatch):
    def measured(*_, **__):
        raise AssertionError("measured")

    monkeypatch.setattr("bitquest.benchmarks.train_step.alternate", measured)
    (tmp_path / "file").write_text("")
    for words, part in [
        (("--schemes", "foo"), "unknown scheme 'foo'"),
        (("--schemes", "none,none"), "none is given twice"),
        (("--schemes", ""), "unknown scheme ''"),
        (("--width", 100), "--width must be a multiple of 64"),
        (("--schemes", "w4a4-g128"), "groups of 128"),
        (("--out", tmp_path), "this is a folder"),
        (("--out", tmp_path / "file" / "x.json"), "is a file, and a folder is needed there"),
    ]:
        _, said = bitquest("bench", "train-step", *SMALL, *words, code=1)
        assert part in said, words
        assert said.count("\n") == 1
    for option in ("--repetitions", "--layers", "--batch", "--context"):
        _, said = bitquest("bench", "train-step", option, 0, code=2)
        assert option in said
    _, said = bitquest("bench", "train-step", "--threads", 100_000, code=2)
    assert "--threads" in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("word", ["train-step", ""])
def test_help(bitquest, word):
    import subprocess
    import sys

    words = [sys.executable, "-m", "bitquest.cli.app", "bench", *([word] if word else []), "--help"]
    assert "Usage: " in subprocess.run(words, capture_output=True, text=True, check=True).stdout

"""`bitquest bench cpu` as a user meets it."""

import json
import subprocess
import sys

import pytest

QUICK = ("bench", "cpu", "--quick", "--repetitions", 1, "--threads", 1)


def test_a_quick_run(bitquest, tmp_path):
    out = tmp_path / "new" / "cpu.json"
    result, said = bitquest(*QUICK, "--cases", "w1a1-one, row-1,memory-w4a4", "--out", out, "--json")
    assert (result["command"], result["quick"], list(result["cases"])) == (
        "bench cpu",
        True,
        ["w1a1-one", "row-1", "memory-w4a4"],
    )
    for case in result["cases"].values():
        assert case["status"] == "measured"
        assert "target_met" not in case["goals"][0]  # tiny data meet no targets
    assert "of best of torch" in said
    written = json.loads(out.read_text())
    assert written["cases"] == result["cases"]
    assert written["command"] == (
        "bitquest bench cpu --threads 1 --repetitions 1 --quick --cases w1a1-one,row-1,memory-w4a4"
    )
    assert {"date", "cpu", "isa", "torch"} <= set(written["hardware"])
    printed = subprocess.run(
        [sys.executable, "-m", "bitquest.benchmarks.cpu_report", str(out)], capture_output=True, text=True, check=True
    ).stdout
    assert "| memory-w4a4 " in printed


def test_models_without_peers(bitquest):
    _, said = bitquest(*QUICK, "--cases", "decode-w1a1,decode-w4a4")
    assert "800M" not in said
    assert "1M preset, decode, 1 threads." in said
    assert "| w1a1 " in said
    if "has no llama-cpp-python" in said:
        assert "decode-w4a4: not measured of llama.cpp Q4_0" in said


def test_equal_loss(bitquest, tmp_path):
    out = tmp_path / "equal.json"
    result, said = bitquest(*QUICK, "--equal-loss", 4.8, "--out", out, "--json")
    assert result["loss"] == 4.8
    assert set(result["winners"]) == {"fastest decoding", "fastest prefill", "fewest bytes"}
    assert json.loads(out.read_text())["command"].endswith("--quick --equal-loss 4.8")
    assert "w1a1: " in said


def test_the_picture(bitquest, tmp_path):
    pytest.importorskip("matplotlib")
    result, said = bitquest(*QUICK, "--cases", "w2a2-one", "--plot", tmp_path / "roof.png")
    assert result is None
    assert "The machine, 1 threads" in said
    assert [path.name for path in tmp_path.iterdir()] == ["roof.png"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--cases", "w9a9"), "there is no case 'w9a9'"),
        (("--threads", "0"), "--threads takes numbers from 1"),
        (("--threads", "two"), "--threads takes numbers from 1"),
        (("--out", "."), "this is a folder"),
        (("--plot", "."), "this is a folder"),
        (("--whole",), "--whole goes with --equal-loss"),
        (("--equal-loss", 4.6, "--cases", "rows"), "--equal-loss measures formats side by side"),
        (("--equal-loss", 0.5), "no size has a loss of 0.5"),
        (("--cases", "rows", "--plot", "x.png"), "--plot draws layers; take --cases layers"),
        (("--peers", "nowhere/python"), "--peers nowhere/python: No such file"),
        (("--peers", "false"), "--peers false: this Python has no llama-cpp-python"),
    ],
)
def test_mistakes(bitquest, tmp_path, monkeypatch, words, part):
    monkeypatch.chdir(tmp_path)
    _, said = bitquest(*QUICK, *words, code=1)
    assert part in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help():
    words = [sys.executable, "-m", "bitquest.cli.app", "bench", "cpu", "--help"]
    assert "Usage: " in subprocess.run(words, capture_output=True, text=True, check=True).stdout

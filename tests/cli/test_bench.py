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


def test_a_dry_run_of_the_gpu_benchmark(bitquest, tmp_path):
    out = tmp_path / "gpu.json"
    words = ("bench", "gpu", "--dry-run", "--only", "decode-w4, w1a1-4096", "--rounds", 1, "--backend", "torch")
    result, said = bitquest(*words, "--out", out, "--json")
    assert (result["command"], result["dry_run"], list(result["cases"])) == (
        "bench gpu",
        True,
        ["w1a1-4096", "decode-w4"],
    )
    for case in result["cases"].values():
        assert case["status"] == "measured"
        assert case["target"] > 1
        assert "target_met" not in case
        assert all(check["found"] <= check["allowed"] for check in next(iter(case["checks"].values())).values())
    assert said.count("the speed of torch.matmul bf16") == 2
    written = json.loads(out.read_text())
    assert written["cases"] == result["cases"]
    assert written["command"].startswith("bitquest bench gpu --backend torch --budget 300 --rounds 1 --only decode-w4,")
    assert {"date", "cpu", "torch"} <= set(written["hardware"])
    assert {"gpu", "driver", "triton"} <= set(written["device"])


def test_a_wrong_case_is_no_success(bitquest, monkeypatch):
    from bitquest.benchmarks.gpu import Bench

    def run(self):
        self._take("w2a2", {"status": "wrong", "reason": "output: 3, and at most 1 is right"})

    monkeypatch.setattr(Bench, "run", run)
    _, said = bitquest("bench", "gpu", "--dry-run", code=1)
    assert "A dry run on tiny data: the figures mean nothing." in said
    assert "wrong: output: 3" in said


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--only", "w9a9", "--dry-run"), "there is no case 'w9a9'; there are floors, prefill-w4a4,"),
        (("--backend", "fast", "--dry-run"), "unknown backend 'fast'"),
        (("--out", ".", "--dry-run"), "this is a folder"),
        ((), "PyTorch sees no CUDA device here; --dry-run runs the benchmark on the CPU"),
    ],
)
def test_mistakes_before_the_gpu_benchmark(bitquest, monkeypatch, words, part):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    _, said = bitquest("bench", "gpu", *words, code=1)
    assert part in said
    assert said.count("\n") == 1


def test_loss_curves(bitquest, run_dir, tmp_path):
    words = ("--preset", "1M", "--steps", 3, "--last", 2, "--batch", 2, "--context", 8, "--seeds", 2, "--repeats", 2)
    data, out = run_dir.parent / "data", tmp_path / "curves.json"
    result, said = bitquest(
        "bench", "loss-curves", "--data", data, *words, "--backend", "torch", "--out", out, "--json"
    )
    names = ["fused", "reference", "fused, nudge 1", "reference, nudge 1", "reference, seed 1"]
    curves = result["curves"]
    assert list(curves) == names
    assert [len(curve) for curve in curves.values()] == [3] * 5
    assert curves["fused"] == curves["reference"] != curves["reference, seed 1"]
    assert curves["fused, nudge 1"] == curves["reference, nudge 1"]
    assert (result["agree"], result["difference"], result["skipped"]) == (True, 0, [])
    assert said.count("mean of the last 2 steps") == 5
    assert json.loads(out.read_text())["means_of_last"] == result["means_of_last"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--data", "nowhere"), "no such folder"),
        (("--data", ".", "--steps", 10), "the mean of 50 losses needs as many steps, not 10"),
        (("--data", ".", "--preset", "7B"), "unknown preset '7B'"),
        (("--data", ".", "--backend", "fast"), "unknown backend 'fast'"),
    ],
)
def test_mistakes_before_loss_curves(bitquest, run_dir, monkeypatch, words, part):
    monkeypatch.chdir(run_dir.parent / "data")
    _, said = bitquest("bench", "loss-curves", *words, code=1)
    assert part in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("word", ["train-step", "gpu", "loss-curves", ""])
def test_help(bitquest, word):
    import subprocess
    import sys

    words = [sys.executable, "-m", "bitquest.cli.app", "bench", *([word] if word else []), "--help"]
    assert "Usage: " in subprocess.run(words, capture_output=True, text=True, check=True).stdout

"""`bitquest scaling` and `bitquest plan` as a user meets them."""

import csv
import json
import math
import re

import pytest

from bitquest.evaluation.scaling_charts import Drawn, on_some_front, rotated
from bitquest.evaluation.scaling_fitted import load_law
from bitquest.evaluation.scaling_law import ScalingLaw
from bitquest.evaluation.scaling_report import formats_to_draw

LAW = ScalingLaw(160.0, 0.2, 86.0, 0.24, 1.5)


@pytest.fixture
def runs(tmp_path):
    """A CSV of runs that lie on LAW, give or take a per mille."""
    rows = ["parameters,tokens,scheme,loss"]
    for name, eff in (("none", 1.0), ("w4a4", 0.7), ("w1a1", 0.02)):
        for number, n in enumerate((10**7, 3 * 10**7, 10**8, 3 * 10**8)):
            for ratio in (25, 100):
                loss = LAW.loss(n, n * ratio, eff) * (1 + 0.001 * math.sin(7 * number + ratio + eff))
                rows.append(f"{n},{n * ratio},{name},{loss:.5f}")
    path = tmp_path / "runs.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def test_fit_then_plot_then_plan(bitquest, runs, tmp_path):
    law = tmp_path / "law.json"
    result, said = bitquest("scaling", "fit", runs, "--out", law, "--bootstrap", 50, "--json")
    assert result["law"]["formats"]["w4a4"]["eff"] == pytest.approx(0.7, rel=0.05)
    low, high = result["law"]["formats"]["w1a1"]["interval"]
    assert 0.015 < low < result["law"]["formats"]["w1a1"]["eff"] < high < 0.025
    assert result["law"]["E_identifiable"]
    assert "Parameter efficiency" in said
    assert "24 runs" in said
    assert f"Written: {law}" in said

    out = tmp_path / "pictures"
    result, _ = bitquest("scaling", "plot", runs, "--law", law, "--out", out, "--vocabulary", 4096, "--json")
    assert result["formats"] == ["bf16", "w4a4", "w1a1"]
    assert len(result["written"]) == 9
    page = (out / "scaling.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 4
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    for name in ("loss-against-size", "size-at-loss", "efficiency", "equal-memory"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        rows = list(csv.DictReader((out / f"{name}.csv").read_text().splitlines()))
        assert {row["format"] for row in rows} >= {"bf16", "w4a4", "w1a1"}
    marked = list(csv.DictReader((out / "loss-against-size.csv").read_text().splitlines()))
    assert sum(row["kind"] == "run" for row in marked) == 12  # those of 100 tokens per parameter
    fronts = list(csv.DictReader((out / "size-at-loss.csv").read_text().splitlines()))
    for row in fronts:  # nothing on the front is undercut by a smaller or equal model with a lower loss
        if row["on_front"] == "yes":
            others = [r for r in fronts if r["table_bits"] == row["table_bits"] and r["format"] != row["format"]]
            assert not [
                r for r in others if int(r["bytes"]) <= int(row["bytes"]) and float(r["loss"]) < float(row["loss"])
            ]

    result, said = bitquest("plan", "--law", law, "--memory", "200MB", "--tokens", "3B", "--vocabulary", 4096, "--json")
    assert {choice["format"] for choice in result["choices"]} == {"bf16", "w4a4", "w1a1"}
    losses = [choice["loss"] for choice in result["choices"]]
    assert losses == sorted(losses)
    assert all(choice["packed_bytes"] + choice["cache_bytes"] <= 2e8 for choice in result["choices"])
    assert "samples" not in result["law"]
    assert f"fitted to {runs.name}" in result["assumptions"][0]
    assert result["advice"][0].startswith("Train ")
    assert result["advice"][0] in said


def test_plot_without_anything_draws_the_papers_law(bitquest, tmp_path):
    _, said = bitquest("scaling", "plot", "--out", tmp_path / "p", "--formats", "bf16,w4a4")
    assert "and 8 PNG and CSV files" in said
    page = (tmp_path / "p/scaling.html").read_text(encoding="utf-8")
    assert "quest_paper_runs.csv" in page
    left_out = "w1a1, w2a2, w3a3, w8a8, w4a4-fp4, w4a4-4:8, w1a16, w2a16, w3a16, w4a16"
    assert set(said.partition("draws them): ")[2].partition(".")[0].split(", ")) == set(left_out.split(", "))
    assert page.count("Not drawn, but in the CSV") == 2
    for name in ("loss-against-size", "size-at-loss"):
        rows = list(csv.DictReader((tmp_path / f"p/{name}.csv").read_text().splitlines()))
        assert {row["format"] for row in rows} == {"bf16", "w4a4", *left_out.split(", ")}


def test_what_is_drawn_of_more_formats_than_there_are_colours():
    law = load_law(None)
    chosen = formats_to_draw(law)
    front = on_some_front(Drawn(law, rotated(law), 100.0))
    assert len(chosen) == 10
    assert {"bf16", "w8a8", "w4a16"} | front <= set(chosen)


def test_held_constants_and_formats(bitquest, runs):
    held = ("--hold", "beta=0.24", "--hold", "B=86")
    result, said = bitquest("scaling", "fit", runs, "--formats", "w4a4", *held, "--bootstrap", 0, "--json")
    assert set(result["law"]["formats"]) == {"bf16", "w4a4"}
    assert result["law"]["constants"]["beta"] == pytest.approx(0.24)
    assert result["law"]["formats"]["w4a4"]["interval"] is None
    assert "held" in said
    assert said.count("1 by definition") == 1  # the reference alone; without samples there is no interval to say
    assert re.search(r"w4a4 +0\.\d+ +– ", said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fit", "RUNS", "--formats", "w9a9"), "--formats w9a9: there are bf16, w4a4, w1a1"),
        (("fit", "RUNS", "--reference", "w2a2"), "no run of the reference format 'w2a2'"),
        (("fit", "RUNS", "--hold", "beta"), "--hold beta: write NAME=VALUE"),
        (("fit", "RUNS", "--huber", "0"), "--huber 0: must be above 0"),
        (
            ("fit", "RUNS", "--bootstrap", 49),
            "--bootstrap 49: fewer than 50 samples make no 95 % interval; 0 for none",
        ),
        (("fit", "RUNS", "--out", "."), "this is a folder"),
        (("fit", "missing.csv"), "missing.csv: no such file or folder"),
        (("plot", "--law", "missing.json"), "missing.json: No such file or directory"),
        (("plot", "--law", "RUNS"), "not JSON"),
        (("plot", "--out", "RUNS"), "there is a file of this name"),
        (("plot", "--formats", "w5a5"), "--formats w5a5: there are"),
    ],
)
def test_mistakes(bitquest, runs, words, message):
    _, said = bitquest("scaling", *(runs if word == "RUNS" else word for word in words), code=1)
    assert message in said
    assert said.count("\n") <= 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing is asked: give --memory 2GB"),
        (("--memory", "1kB"), "the smallest model takes"),
        (("--memory", "2GB", "--tokens", "banana"), "--tokens 'banana': not a quantity; write for example 100B"),
        (("--loss", "0.2"), "the law's floor with 100 tokens per parameter"),
        (("--training-budget", "much"), "--training-budget 'much': not a budget"),
        (("--training-budget", "5 a100-hours", "--hardware", "h100"), "leave one out"),
        (("--training-budget", "5 abacus-hours"), "unknown hardware 'abacus'"),
        (("--memory", "2GB", "--formats", "w5a5"), "the scaling law knows no format 'w5a5'"),
        (("--memory", "2GB", "--formats", ","), "--formats names no format"),
        (("--memory", "2GB", "--run-on", "toaster"), "unknown hardware 'toaster'"),
        (("--memory", "2GB", "--hardware", "h1000"), "unknown hardware 'h1000'; did you mean 'h100'? There are h100,"),
        (
            ("--memory", "2GB", "--law", "."),
            ".: this is a folder; name the file that `bitquest scaling fit … --out` wrote",
        ),
        (("--memory", "2GB", "--bench", "nothing.json"), "nothing.json: No such file"),
    ],
)
def test_impossible_plans(bitquest, words, message):
    _, said = bitquest("plan", *words, code=1)
    assert message in said
    assert said.count("\n") <= 2


def test_budgets_and_prices(bitquest, tmp_path):
    hours, _ = bitquest("plan", "--training-budget", "100 A100-hours", "--formats", "w4a4", "--json")
    assert hours["train_on"]["name"] == "a100"
    assert hours["choices"][0]["device_hours"] == pytest.approx(100, rel=0.05)
    assert hours["choices"][0]["dollars"] == pytest.approx(hours["choices"][0]["device_hours"] * 1.39)
    priced = ("--hardware", "a100", "--price", 2.78, "--formats", "w4a4")
    dollars, _ = bitquest("plan", "--training-budget", "$278", *priced, "--json")
    assert dollars["choices"][0]["parameters"] == hours["choices"][0]["parameters"]
    (tmp_path / "own.toml").write_text("[mine]\nmemory_gb = 10\nbandwidth_gbs = 100\npeak_tflops = 50\n")
    own = ("--hardware-file", tmp_path / "own.toml", "--hardware", "mine")
    _, said = bitquest("plan", "--training-budget", "$5", *own, code=1)
    assert "no price is known for mine: give --price" in said
    result, _ = bitquest("plan", "--memory", "100MB", *own, "--run-on", "mine", "--json")
    assert result["choices"][0]["dollars"] is None
    assert result["run_on"]["bandwidth_gbs"] == 100


def test_extrapolation_is_loud(bitquest):
    _, said = bitquest("plan", "--memory", "2GB", "--tokens", "100B")
    assert "EXTRAPOLATED: size 2.6B" in said
    assert "Formats that were not fitted are taken as others: w4a8 as w4a16" in said


def test_bench_takes_a_law(bitquest, runs, tmp_path):
    law = tmp_path / "law.json"
    bitquest("scaling", "fit", runs, "--out", law, "--bootstrap", 0)
    loss = round(LAW.loss(2e5, 2e7), 1)
    result, _ = bitquest(
        "bench", "cpu", "--equal-loss", loss, "--law", law, "--threads", 1, "--repetitions", 1, "--quick", "--json"
    )
    assert set(result["formats"]) == {"bf16", "w4a4", "w1a1"}
    assert result["law"] == {k: pytest.approx(v) for k, v in vars_of(law).items()}
    _, said = bitquest("bench", "cpu", "--law", law, code=1)
    assert "--law goes with --equal-loss" in said


def vars_of(law):
    constants = json.loads(law.read_text())["constants"]
    return {"a": constants["A"], "alpha": constants["alpha"], "b": constants["B"], "beta": constants["beta"],
            "e": constants["E"]}  # fmt: skip

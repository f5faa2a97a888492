"""Charts of a comparison: what they show, with what in the files; the stability map and its plan; the dry run."""

import csv
import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from bitquest.errors import ConfigError
from bitquest.evaluation import compare_dry
from bitquest.evaluation.charts import write_charts
from bitquest.evaluation.compare_charts import arms_chart, curves_chart, rates_chart, sizes_chart
from bitquest.evaluation.compare_dry import forecast, forecast_table
from bitquest.evaluation.compare_file import load_comparison
from bitquest.evaluation.compare_map import Cell, cells_of, map_chart, map_table
from bitquest.evaluation.compare_page import charts_of
from bitquest.evaluation.compare_plan import Arm, Comparison, Run, short_paths
from bitquest.evaluation.compare_results import summarize
from bitquest.evaluation.compare_runs import RunResult
from bitquest.evaluation.runs import CurvePoint, RunSummary
from bitquest.training import TrainConfig

MAP = """
[model]
preset = "1M"

[data]
path = "texts/one"

[train]
steps = 60

[compare]
map = true
schemes = ["none", "w1a1"]
names = ["unquantized", "W1A1"]
sizes = ["1M", "3M"]
corpora = ["texts/one", "texts/two"]
rates = [1e-3, 4e-3]
"""


def result_of(run, loss, scheme="w1a1", status="finished"):
    status = "diverged" if loss is None else status
    return RunResult(run.arm, scheme, run.seed, run.rate, status, 10, loss, loss and 1.5, 4.0, "runs/x")


def swept(seeds=(0, 1, 2)):
    """A sweep of two arms: `none` has its best rate in the middle, `w1a1` at the edge and once diverged."""
    arms = (Arm("none", "un<quantized", TrainConfig(scheme="none")), Arm("w1a1", "W1A1 $x$", TrainConfig()))
    plan = Comparison(TrainConfig(), arms, seeds, (1e-3, 2e-3, 4e-3))
    losses = {"none": (3.0, 2.0, 2.5), "w1a1": (2.75, 3.5, None)}
    runs = [
        result_of(Run(arm, 0, rate), loss, arm)
        for arm, values in losses.items()
        for rate, loss in zip(plan.rates, values, strict=True)
    ]
    best = {"none": 2e-3, "w1a1": 1e-3}
    runs += [
        result_of(run, {1: 2.1, 2: None}[run.seed] if run.arm == "none" else 3.0 + 0.1 * run.seed, run.arm)
        for run in plan.later_runs(best)
    ]
    return summarize(plan, runs)


def words(chart):
    return [node.text for node in ElementTree.fromstring(re.sub("xlink:", "", chart.svg)).iter() if node.text]


def rows(chart):
    return list(csv.DictReader(chart.csv().splitlines()))


def test_the_arms_with_intervals_and_what_went_wrong():
    result = swept()
    chart = arms_chart(result)
    shown = "\n".join(words(chart))
    assert "un<quantized" in shown
    assert "W1A1 $x$" in shown
    assert "2.050 ± 0.635, 1 of 3 diverged" in shown  # t = 12.706 of two seeds 0.1 apart, over sqrt(2)
    first, second = rows(chart)
    assert (first["rate"], first["seeds"], first["diverged"]) == ("0.002", "2", "1")
    assert float(second["mean"]) == pytest.approx((2.75 + 3.1 + 3.2) / 3)
    assert float(second["half_interval"]) == pytest.approx(4.3027 * 0.2363 / 3**0.5, rel=1e-3)
    assert arms_chart(summarize(result.plan, [])) is None


def test_loss_against_rate():
    chart = rates_chart(swept())
    assert tuple(word for word in words(chart) if word.startswith("0.00")) == ("0.001", "0.002", "0.004")
    assert [(row["arm"], row["rate"], row["status"], row["validation_loss"], row["chosen"]) for row in rows(chart)] == [
        ("un<quantized", "0.001", "finished", "3.0", "0"),
        ("un<quantized", "0.002", "finished", "2.0", "1"),
        ("un<quantized", "0.004", "finished", "2.5", "0"),
        ("W1A1 $x$", "0.001", "finished", "2.75", "1"),
        ("W1A1 $x$", "0.002", "finished", "3.5", "0"),
        ("W1A1 $x$", "0.004", "diverged", "", "0"),
    ]
    assert "Seed 0" in chart.caption
    one = dataclasses.replace(swept().plan, rates=(1e-3,))
    assert rates_chart(summarize(one, [])) is None


def test_curves_and_sizes_carry_their_numbers():
    curve = tuple(CurvePoint(step, 3.0 - step / 10) for step in range(1, 6))
    sizes = {"total_bytes": 2_000_000}
    runs = [
        RunSummary(name, name, 0, 5, 5, curve, curve[-1:], 2.5, bits, sizes) for name, bits in (("a", 1.5), ("b", 1.25))
    ]
    curves = rows(curves_chart(runs))
    assert len(curves) == 2 * 6
    assert curves[5] == {"arm": "a", "scheme": "a", "seed": "0", "kind": "validation", "step": "5", "loss": "2.5"}
    assert [(row["packed_mb"], row["bits_per_byte"]) for row in rows(sizes_chart(runs))] == [
        ("2.0", "1.5"), ("2.0", "1.25"),
    ]  # fmt: skip
    assert curves_chart([]) is None
    assert sizes_chart(runs[:1]) is None


def test_figures_are_written_as_png_and_csv(tmp_path):
    charts = [chart for drawn in charts_of(swept(), []).values() for chart in drawn]
    write_charts(charts, tmp_path / "figures")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "arms.csv", "arms.png", "rates.csv", "rates.png",
    ]  # fmt: skip
    assert (tmp_path / "figures" / "arms.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def map_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "map.toml").write_text(MAP)
    return load_comparison("map.toml")


def test_a_map_crosses_sizes_corpora_and_schemes(map_plan, tmp_path, monkeypatch):
    assert [arm.key for arm in map_plan.arms] == [
        f"{scheme} {size} {corpus}"
        for corpus in ("one", "two")
        for size in ("1M", "3M")
        for scheme in ("unquantized", "W1A1")
    ]
    last = map_plan.arms[-1].config
    assert (last.scheme, last.model.preset, last.data.path) == ("w1a1", "3M", str(tmp_path / "texts" / "two"))
    assert map_plan.total_runs() == len(map_plan.first_runs()) == 16
    assert map_plan.later_runs(dict.fromkeys(map_plan.keys, 1e-3)) == []
    monkeypatch.setattr("bitquest.evaluation.compare_plan.data_digest", lambda config: config.data.path[-3:])
    (tmp_path / "again.toml").write_text(map_plan.to_toml())
    assert load_comparison("again.toml") == map_plan


def test_corpora_are_told_apart_by_as_little_as_it_takes():
    assert short_paths(["/a/data/text", "/a/old/text", "/b/more"]) == {
        "/a/data/text": "data/text", "/a/old/text": "old/text", "/b/more": "more",
    }  # fmt: skip
    assert short_paths(["/a/text", "/a/text"]) == {"/a/text": "text"}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("rates = [1e-3, 4e-3]", "", "give compare.rates"),
        ("map = true", 'map = true\nexpect = ["W1A1 1M one"]', "remove expect"),
        ("map = true", "map = 1", "compare.map must be true or false"),
        ('"3M"]', '"4M"]', "model.preset must be one of"),
        ('sizes = ["1M", "3M"]', "sizes = 1", "compare.sizes must be a list of strings"),
    ],
)
def test_mistakes_in_a_map(map_plan, tmp_path, old, new, says):
    assert old in MAP
    (tmp_path / "map.toml").write_text(MAP.replace(old, new))
    with pytest.raises(ConfigError, match=says):
        load_comparison("map.toml")


def test_the_map_marks_where_training_diverges(map_plan):
    plan = dataclasses.replace(map_plan, seeds=(0, 1))
    runs = []
    for run in plan.first_runs():
        bad = run.arm == "W1A1 3M two" and run.rate == 4e-3
        half_bad = run.arm == "W1A1 1M two" and run.seed == 1
        status = "unstable" if run.arm == "W1A1 1M one" else "finished"
        runs.append(result_of(run, None if bad or half_bad else 2.0 + run.seed, plan.arm(run.arm).scheme, status))
    result = summarize(plan, runs[:-1])
    cells = cells_of(result)
    assert cells["unquantized 1M one", 1e-3] == Cell(2.5, 2, 0, 0)
    assert cells["W1A1 3M two", 4e-3] == Cell(None, 1, 1, 0)
    assert cells["W1A1 1M one", 1e-3].text == "~2.50"
    assert cells["W1A1 1M two", 1e-3].text == "2.00 1×"
    assert cells["W1A1 3M two", 4e-3].text == "×"
    assert Cell(None, 0, 0, 0).text == ""
    chart = map_chart(result)
    shown = words(chart)
    assert [shown.count(text) for text in ("2.50", "~2.50", "2.00 1×", "×")] == [11, 2, 2, 1]
    for title in ("1M · one", "3M · one", "1M · two", "3M · two"):
        assert title in shown
    assert shown.count("W1A1") == 2  # beside the first panel of each corpus
    assert rows(chart)[-1] == {
        "arm": "W1A1", "scheme": "w1a1", "size": "3M", "corpus": "two", "rate": "0.004", "loss": "", "runs": "1",
        "diverged": "1", "unstable": "0",
    }  # fmt: skip
    table = map_table(result)
    assert table.columns == ("arm", "0.001", "0.004")
    assert table.rows[-1] == ("W1A1 3M two", "2.50", "×")
    assert list(charts_of(result, [])) == ["Results"]
    assert result.claims == ()
    assert [arm.difference for arm in result.arms] == [None] * 8


def test_a_dry_run_counts_and_estimates(map_plan, tmp_path, monkeypatch):
    config = MAP.replace("map = true", "seeds = [0, 1, 2]\njobs = 2").replace('sizes = ["1M", "3M"]', "")
    (tmp_path / "map.toml").write_text(config.replace('corpora = ["texts/one", "texts/two"]', ""))
    plan = load_comparison("map.toml")
    made = {}
    monkeypatch.setattr(compare_dry, "read_result", lambda plan, out, run: made.get(run))
    found = forecast(plan, tmp_path / "out")
    assert (found.seconds, found.chosen_later, set(found.statuses.values())) == (None, 4, {"waiting"})
    assert "8 runs in all; training time left: unknown before the first run is made." in forecast_table(found).note
    first = Run("none", 0, 1e-3)
    made[first] = dataclasses.replace(result_of(first, 2.0, "none"), step=60, seconds=30.0)
    monkeypatch.setattr(compare_dry, "is_held", lambda folder: folder.name == "w1a1-lr0.004-seed0")
    monkeypatch.setattr(
        compare_dry, "latest_step", lambda folder: {"step": 20} if folder.name == "w1a1-lr0.004-seed0" else None
    )
    found = forecast(plan, tmp_path / "out")
    # 3 and 4 runs of 60 steps, less 20 steps, at half a second: what w1a1 takes is not known yet
    assert found.seconds == pytest.approx((3 * 60 + 4 * 60 - 20) * 0.5)
    assert found.statuses[Run("w1a1", 0, 4e-3)] == "running"
    table = forecast_table(found)
    assert table.rows == [("unquantized", "none", "60", "4", "1", "0"), ("W1A1", "w1a1", "60", "4", "0", "1")]
    assert table.note.endswith("training time left: 3:20, by 2 at once 1:40.")
    made[Run("none", 0, 4e-3)] = result_of(Run("none", 0, 4e-3), 1.0, "none")
    found = forecast(plan, tmp_path / "out")
    assert (found.chosen_later, found.statuses[Run("none", 2, 4e-3)]) == (2, "waiting")
    assert json.loads(json.dumps(found.to_json()))["runs"][0] == {
        "arm": "none", "seed": 0, "rate": 0.001, "status": "finished", "run": "runs/none-lr0.001-seed0",
    }  # fmt: skip

"""Swept learning rates, arms with settings of their own, and what counts as unstable."""

import dataclasses
import json
import random

import pytest
from compare_cases import MODEL_AND_DATA, THREE_STEPS, prepare_words

from bitquest.errors import ConfigError
from bitquest.evaluation.compare import compare
from bitquest.evaluation.compare_file import load_comparison
from bitquest.evaluation.compare_plan import Arm, Comparison, Run
from bitquest.evaluation.compare_results import best_rates, summarize
from bitquest.evaluation.compare_runs import RunResult, ended_above
from bitquest.evaluation.compare_tables import results_table
from bitquest.training import TrainConfig

CONFIG = (
    MODEL_AND_DATA
    + THREE_STEPS
    + """
[compare]
schemes = ["none"]
names = ["unquantized"]
seeds = [4, 5]
rates = [1e-3, 1e-2, 1e30]
expect = ["unquantized<=Light W1A1"]

[[compare.arm]]
name = "Light W1A1"
scheme = "w1a1-norot-ste"
set = ["optimizer.weight_decay=0.01", "optimizer.clip=0"]
"""
)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return prepare_words(tmp_path_factory.mktemp("text"))


@pytest.fixture
def config(tmp_path, data_dir):
    path = tmp_path / "small.toml"
    path.write_text(CONFIG.format(data=data_dir))
    return path


def result_of(run, loss, status="finished"):
    status = "diverged" if loss is None else status
    return RunResult(run.arm, run.arm, run.seed, run.rate, status, 10, loss, loss and 1.0, 4.0, f"runs/{run}")


def plan_of(schemes=("none", "w1a1"), seeds=(0, 1, 2), rates=(1.0, 2.0, 4.0), **options):
    arms = tuple(Arm(scheme, scheme, TrainConfig(scheme=scheme)) for scheme in schemes)
    return Comparison(TrainConfig(), arms, seeds, rates, **options)


def test_every_arm_is_tried_at_every_rate_and_then_trained_at_its_best(tmp_path, config):
    plan = load_comparison(config)
    assert plan.total_runs() == 2 * (3 + 1)
    result = compare(plan, tmp_path / "out")
    assert result.finished
    first = [run for run in result.runs if run.seed == 4]
    assert {(run.arm, run.rate) for run in first} == {
        (arm, rate) for arm in ("none", "Light W1A1") for rate in plan.rates
    }
    for arm in result.arms:
        losses = {run.rate: run.val_loss for run in first if run.arm == arm.arm and run.val_loss is not None}
        assert arm.rate == min(losses, key=losses.get)
        later = [run for run in result.runs if run.arm == arm.arm and run.seed == 5]
        assert [run.rate for run in later] == [arm.rate]
        # the statistics are about one run per seed, all at the best rate
        assert arm.runs == 2
        assert arm.val_loss.mean == pytest.approx((losses[arm.rate] + later[0].val_loss) / 2)
        assert arm.difference == pytest.approx(arm.val_loss.mean - result.arms[0].val_loss.mean)
    assert next(run for run in first if run.arm == "Light W1A1" and run.rate == 1e30).diverged

    out = tmp_path / "out"
    light = json.loads((out / "results.json").read_text())["arms"][1]
    assert light["set"] == ["optimizer.weight_decay=0.01", "optimizer.clip=0"]
    written = (out / "runs" / "light_w1a1-lr0.01-seed5" / "config.toml").read_text()
    for line in ("lr = 0.01", "weight_decay = 0.01", "clip = 0.0", "seed = 5", 'scheme = "w1a1-norot-ste"'):
        assert line in written
    assert (out / "runs" / "none-lr0.001-seed4").is_dir()
    page = (out / "report.html").read_text()
    assert "Light W1A1" in page

    # its own file describes it: nothing is trained again
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("metrics.jsonl")}
    again = compare(load_comparison(out / "compare.toml"), out)
    assert (again.plan, again.runs) == (plan, result.runs)
    assert before == {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("metrics.jsonl")}

    # the same arm with other settings is no longer the same arm
    config.write_text(config.read_text().replace("weight_decay=0.01", "weight_decay=0.02"))
    with pytest.raises(ConfigError, match=r"another configuration .*optimizer.weight_decay: 0.01, 0.02"):
        compare(load_comparison(config), out)


def test_the_best_rate_and_when_it_lies_at_the_edge():
    plan = plan_of()
    sweep = {
        "none": [(1.0, 3.0, "finished"), (2.0, 2.0, "unstable"), (4.0, 2.5, "finished")],
        "w1a1": [(1.0, None, None), (2.0, 3.5, "finished"), (4.0, None, None)],
    }
    runs = [result_of(Run(arm, 0, rate), *rest) for arm, values in sweep.items() for rate, *rest in values]
    by_run = {run.key: run for run in runs}
    assert best_rates(plan, by_run) == {"none": 4.0, "w1a1": 2.0}  # a stable run before an unstable one
    del by_run[Run("none", 0, 1.0)]
    assert best_rates(plan, by_run) == {"w1a1": 2.0}
    assert best_rates(plan, {run: result_of(run, None) for run in plan.first_runs()}) == {"none": 1.0, "w1a1": 1.0}
    # one of the same loss twice: the lower rate
    assert best_rates(plan, {run: result_of(run, 2.0) for run in plan.first_runs()})["none"] == 1.0

    result = summarize(plan, runs)
    assert [(arm.rate, arm.at_edge, arm.runs) for arm in result.arms] == [(4.0, True, 1), (2.0, False, 1)]
    assert not result.finished
    later = plan.later_runs({"none": 4.0, "w1a1": 2.0})
    assert later == [Run("none", 1, 4.0), Run("w1a1", 1, 2.0), Run("none", 2, 4.0), Run("w1a1", 2, 2.0)]
    finished = summarize(plan, [*runs, *(result_of(run, 2.25) for run in later)])
    assert finished.finished
    assert [run.key for run in finished.chosen("w1a1")] == [Run("w1a1", seed, 2.0) for seed in (0, 1, 2)]
    table = results_table(finished)
    assert [row[1] for row in table.rows] == ["4*", "2"]
    assert "at the edge of the rates tried" in table.note
    only = summarize(plan_of(seeds=(0,), rates=(1.0,)), [result_of(Run("none", 0, 1.0), 2.0)])
    assert (only.arms[0].rate, only.arms[0].at_edge) == (1.0, False)  # one rate has no edge


def test_unstable_runs_are_counted_and_named():
    plan = plan_of(rates=(), seeds=(0, 1))
    runs = [result_of(run, 2.0, "unstable" if run.arm == "w1a1" else "finished") for run in plan.first_runs()]
    result = summarize(plan, runs)
    assert [(arm.unstable, arm.diverged) for arm in result.arms] == [(0, 0), (2, 0)]
    table = results_table(result)
    assert [row[table.columns.index("unstable")] for row in table.rows] == ["0 of 2", "2 of 2"]
    assert "unstable" not in results_table(summarize(plan, runs[:1])).columns


def test_a_loss_that_ended_far_above_its_own_best_is_unstable():
    falling = [6.0 - 0.04 * i for i in range(100)]
    noise = random.Random(0)
    assert ended_above(falling) is None
    assert ended_above([loss + noise.gauss(0, 0.1) for loss in falling]) is None
    blown_up = falling[:50] + [8.0] * 50
    assert ended_above(blown_up) == pytest.approx(8.0 - sum(falling[40:50]) / 10)
    recovered = falling[:50] + [8.0] * 10 + falling[60:]
    assert ended_above(recovered) is None
    # one that was thrown far off at once and came back only in part
    assert ended_above([6.0] + [60.0] * 20 + [20.0 - i for i in range(10)]) == pytest.approx((13 + 12 + 11) / 3 - 6.0)
    # 3 nats learned: a tenth of that is allowed; what was hardly learned may rise by 0.1
    learned = [6.0] + [3.0] * 50
    assert ended_above([*learned, *[3.29] * 20]) is None
    assert ended_above([*learned, *[3.31] * 20]) == pytest.approx(0.31)
    assert ended_above([6.0] * 30 + [6.09] * 10) is None
    assert ended_above([6.0] * 30 + [6.11] * 10) == pytest.approx(0.11)
    assert ended_above([6.0] * 9 + [9.0] * 10) is None  # too few to tell


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("rates = [1e-3, 1e-2, 1e30]", "rates = [0]", "compare.rates must be a list of learning rates above 0"),
        ("rates = [1e-3, 1e-2, 1e30]", "rates = 1e-3", "compare.rates must be a list"),
        ("rates = [1e-3, 1e-2, 1e30]", "rates = [1e-3, 1e-3]", "rate 0.001 is given twice"),
        ("seeds =", "jobs = 0\nseeds =", "compare.jobs must be a whole number, at least 1, got 0"),
        ('name = "Light W1A1"\n', "", "compare.arm number 1 needs a name"),
        ('name = "Light W1A1"', 'name = "unquantized"', "name unquantized is given twice"),
        ('name = "Light W1A1"', 'name = "none"', "arm none is given twice"),
        ('name = "Light W1A1"', 'name = "NONE"', "would share the run folders none-"),
        ('name = "Light W1A1"', 'name = "a<b"', "has a name with < in it"),
        ('scheme = "w1a1-norot-ste"', 'scheme = "w1a1-norto"', r"arm 'Light W1A1': .*did you mean 'norot'"),
        ('scheme = "w1a1-norot-ste"', 'shceme = "w1a1"', r"shceme is not a key of an arm .did you mean 'scheme'"),
        ('scheme = "w1a1-norot-ste"', "scheme = 3", "scheme must be a string"),
        ("optimizer.clip=0", "optimizer.clib=0", r"small.toml: compare.arm 'Light W1A1': .*did you mean"),
        ("optimizer.clip=0", "seed=3", "seed does not belong into `set`"),
        (
            "optimizer.clip=0",
            "optimizer.lr=1",
            "optimizer.lr does not belong into `set` of an arm whose rates",
        ),
        ('set = ["optimizer', 'set = "optimizer', "small.toml: not valid TOML"),
        ("[[compare.arm]]", "[compare.arm]", r"write \[\[compare.arm\]\] for each"),
        ("unquantized<=Light W1A1", "unquantized<=Dark W1A1", "Dark W1A1 is not compared; the arms are none, Light"),
    ],
)
def test_mistakes_in_arms_and_rates(config, old, new, says):
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=says):
        load_comparison(config)


def test_arms_and_rates_on_the_command_line(config):
    plan = load_comparison(config, ["optimizer.clip=2"], schemes="Light W1A1, w4a4", rates="1e-3, 0.02", jobs=3)
    assert (plan.keys, plan.rates, plan.jobs, plan.expect) == (("Light W1A1", "w4a4"), (1e-3, 0.02), 3, ())
    assert plan.config(Run("w4a4", 4, 0.02)).optimizer == dataclasses.replace(plan.base.optimizer, lr=0.02)
    assert plan.config(Run("Light W1A1", 4, 0.02)).optimizer.clip == 0  # an arm's own settings win
    assert load_comparison(config, schemes="none,Light W1A1").expect == ("unquantized<=Light W1A1",)
    with pytest.raises(ConfigError, match=r"--rates 1e-3,x: 'x' is no learning rate"):
        load_comparison(config, rates="1e-3,x")

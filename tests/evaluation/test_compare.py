"""Comparisons: plans, expectations, statistics, and runs that are made once, go on, or diverge."""

import csv
import json
import math
import statistics

import pytest
from compare_cases import MODEL_AND_DATA, prepare_words

from bitquest.errors import ConfigError, DataError, MissingExtraError
from bitquest.evaluation.compare import compare
from bitquest.evaluation.compare_file import load_comparison, parse_seeds
from bitquest.evaluation.compare_plan import Arm, Comparison, Run
from bitquest.evaluation.compare_results import Spread, summarize
from bitquest.evaluation.compare_runs import RunResult
from bitquest.evaluation.compare_tables import results_table, verdicts_table
from bitquest.evaluation.ordering import Expectation, judge, parse_expectation, pooled_deviation
from bitquest.nn import Scheme
from bitquest.training import TrainConfig, prepare
from bitquest.training.data import Tokens

CONFIG = (
    MODEL_AND_DATA
    + """
[optimizer]
lr = 0.01

[train]
steps = 3
batch_size = 2

[evaluate]
every = 2
batches = 2

[log]
every = 1

[compare]
schemes = ["none", "w1a1"]
seeds = [0, 1]
names = ["unquantized", "W1A1"]
expect = ["none<=w1a1"]
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


def steps_of(out):
    return {
        folder.name: len((folder / "metrics.jsonl").read_text().splitlines()) for folder in (out / "runs").iterdir()
    }


class Events:
    """A display that keeps what it is told."""

    def __init__(self):
        self.events = []

    def on_start(self, plan, out, jobs):
        self.events.append(f"start {jobs}")

    def on_step(self, run, step, loss):
        self.events.append(f"step {run.arm} {step}")

    def on_result(self, result):
        self.events.append((result.arm, result.seed, result.diverged))

    def on_failure(self, run, message):
        self.events.append(f"failure {run.arm}: {message}")

    def on_end(self):
        self.events.append("end")

    @property
    def trained(self):
        """The runs that were given steps, in order."""
        return list(dict.fromkeys(event.split()[1] for event in self.events if str(event).startswith("step")))


def test_every_pair_is_trained_once_with_the_seeds_data_and_reported(tmp_path, config, monkeypatch):
    plan = load_comparison(config)
    batches = {}
    batch = Tokens.batch

    def record(self, seed, step, *shape):
        batches.setdefault((seed, step), []).append(batch(self, seed, step, *shape))
        return batches[seed, step][-1]

    monkeypatch.setattr(Tokens, "batch", record)
    events = Events()
    result = compare(plan, tmp_path / "out", display=events)
    assert [run for run in events.events if isinstance(run, tuple)] == [
        ("none", 0, False),
        ("w1a1", 0, False),
        ("none", 1, False),
        ("w1a1", 1, False),
    ]
    assert (events.events[0], events.events[1], events.events[-1]) == ("start 1", "step none 1", "end")
    assert sorted(batches) == [(seed, step) for seed in (0, 1) for step in range(3)]
    assert all(len(pair) == 2 and pair[0].equal(pair[1]) for pair in batches.values())
    assert result.finished
    assert [verdict.expectation for verdict in result.verdicts] == [Expectation("none", "<=", "w1a1")]

    by_name = {arm.name: arm for arm in result.arms}
    losses = [run.val_loss for run in result.runs if run.scheme == "w1a1"]
    assert by_name["W1A1"].val_loss.mean == pytest.approx(statistics.mean(losses))
    assert by_name["W1A1"].val_loss.std == pytest.approx(statistics.stdev(losses))
    assert by_name["W1A1"].difference == pytest.approx(
        by_name["W1A1"].val_loss.mean - by_name["unquantized"].val_loss.mean
    )
    assert 0 < by_name["W1A1"].packed_bytes["linear_bytes"] < by_name["unquantized"].packed_bytes["linear_bytes"] / 8
    assert losses[0] != losses[1]

    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        *(".lock", "compare.toml", "figures", "report.html", "results.csv", "results.json", "runs"),
    ]
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(result.to_json()))
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [(row["scheme"], row["seed"], row["status"], row["step"]) for row in rows][1] == (
        "w1a1",
        "0",
        "finished",
        "3",
    )
    assert float(rows[1]["val_loss"]) == result.runs[1].val_loss
    page = (out / "report.html").read_text()
    for part in ("unquantized", "W1A1", "unquantized &lt;= W1A1", f"bitquest compare {out / 'compare.toml'}", "<svg"):
        assert part in page

    # the comparison's own file describes it; nothing is trained again, and the results are the same
    batches.clear()
    again = compare(load_comparison(out / "compare.toml"), out)
    assert (batches, again.runs) == ({}, result.runs)
    assert again.plan == plan


def test_it_goes_on_after_an_interruption_and_when_schemes_or_seeds_are_added(tmp_path, config):
    straight = compare(load_comparison(config), tmp_path / "straight")
    out, plan = tmp_path / "out", load_comparison(config)
    calls = iter([False] * 5 + [True])  # asked before each run and after each step
    stopped = compare(plan, out, should_stop=lambda: next(calls))
    assert not stopped.finished
    assert not stopped.passed
    assert stopped.verdicts == ()
    assert [run.scheme for run in stopped.runs] == ["none"]
    assert not (out / "report.html").exists()
    assert json.loads((out / "results.json").read_text())["finished"] is False
    events = Events()
    finished = compare(plan, out, display=events)
    assert next(event for event in events.events if str(event).startswith("step w1a1")) == "step w1a1 2"
    assert [(run.scheme, run.seed, run.val_loss) for run in finished.runs] == [
        (run.scheme, run.seed, run.val_loss) for run in straight.runs
    ]
    more = load_comparison(config, schemes="none,w1a1,w4a4", seeds="0-1", expect=["w1a1"])
    events = Events()
    result = compare(more, out, display=events)
    assert events.trained == ["w4a4"]
    assert [arm.runs for arm in result.arms] == [2, 2, 2]
    assert steps_of(out) == dict.fromkeys(
        [f"{s}-seed{k}" for s in ("none", "w1a1", "w4a4") for k in (0, 1)], 5
    )  # 3 steps and 2 evaluations, each once


def test_a_run_that_diverges_is_recorded_and_the_next_one_begins(tmp_path, config):
    plan = load_comparison(config, ["optimizer.lr=1e30", "optimizer.clip=0", "train.steps=6"], expect=["w1a1"])
    for again in (False, True):
        events = Events()
        result = compare(plan, tmp_path / "out", display=events)
        assert bool(events.trained) is not again  # the second time nothing is trained: it is on record
        assert [run.diverged for run in result.runs] == [True] * 4
        assert all("training diverged" in run.message for run in result.runs)
        assert all(0 < run.step < 6 for run in result.runs)
        assert (result.finished, result.passed) == (True, False)
        assert result.verdicts[0].reason == "2 of 2 runs of w1a1 diverged or were unstable"
        assert [(s.diverged, s.val_loss, s.difference) for s in result.arms] == [(2, None, None)] * 2
    assert json.loads((tmp_path / "out" / "results.json").read_text())["runs"][0]["val_loss"] is None
    assert ",diverged," in (tmp_path / "out" / "results.csv").read_text()
    assert "2 of 2" in (tmp_path / "out" / "report.html").read_text()


def test_directories_of_something_else_are_refused_untouched(tmp_path, config, data_dir):
    plan, out = load_comparison(config, seeds="0", schemes="none"), tmp_path / "out"
    compare(plan, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    other = load_comparison(config, ["optimizer.lr=0.02"], seeds="0", schemes="none")
    with pytest.raises(ConfigError, match=r"another configuration .*optimizer.lr: 0.01, 0.02"):
        compare(other, out)
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    (tmp_path / "other.txt").write_text("seven and eight. " * 100)
    prepare([tmp_path / "other.txt"], "byte", tmp_path / "data2", val_fraction=0.5)
    with pytest.raises(ConfigError, match="on other data"):
        compare(load_comparison(config, [f"data.path={tmp_path / 'data2'}"], seeds="0", schemes="none"), out)
    compare(load_comparison(config, ["log.every=2", "checkpoint.keep=1"], seeds="0", schemes="none"), out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "small.toml").touch()
    with pytest.raises(ConfigError, match=r"holds small.toml and no compare.toml"):
        compare(plan, tmp_path / "full")
    with pytest.raises(ConfigError, match="there is a file of this name"):
        compare(plan, config)


def test_what_cannot_work_is_said_before_anything_is_written(tmp_path, config, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="no-data"):
        compare(load_comparison(config, ["data.path=no-data"]), out)
    narrow = load_comparison(config, schemes="none,w4a4-g64")
    with pytest.raises(ConfigError, match="scheme w4a4-g64 does not fit the model"):
        compare(narrow, out)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match="matplotlib"):
        compare(load_comparison(config), out)
    assert not out.exists()


def test_plans_from_file_and_command_line(config):
    plan = load_comparison(config, ["train.steps=9"], schemes="W4A4 , none", seeds="3-5,9")
    assert (plan.keys, plan.seeds, plan.base.train.steps) == (("w4a4", "none"), (3, 4, 5, 9), 9)
    assert (plan.name("none"), plan.name("w4a4"), plan.expect) == ("unquantized", "w4a4", ())
    assert plan.config(Run("w4a4", 5)).seed == 5
    assert plan.config(Run("w4a4", 5)).scheme == "w4a4"
    assert plan.first_runs()[:3] == [Run("w4a4", 3), Run("none", 3), Run("w4a4", 4)]
    assert load_comparison(config, expect=["none<w1a1", "w1a1"]).expectations() == [
        Expectation("none", "<", "w1a1"),
        Expectation("w1a1", "converges", None),
    ]
    config.write_text(config.read_text().replace("seeds = [0, 1]", 'seeds = "0-19"'))
    assert load_comparison(config).seeds == tuple(range(20))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"none", "w1a1"]', '"none", "w1a1-norto"]', r"small.toml: .*'norto' is unknown; did you mean 'norot'"),
        ('"none", "w1a1"]', '"w1a1", "W1A1"]', "arm w1a1 is given twice"),
        ("[0, 1]", "[1, 1]", "seed 1 is given twice"),
        ("[0, 1]", "[]", r"no seeds \(--seeds"),
        ('schemes = ["none", "w1a1"]', "schemes = []", "names must give every scheme a name"),
        ("[0, 1]", '"1-"', "'1-' is no seed"),
        ("[0, 1]", "[-1]", "compare.seeds must be a list"),
        ("[0, 1]", "[true]", "compare.seeds must be a list"),
        ("[0, 1]", "3", "compare.seeds must be a list"),
        ('names = ["unquantized", "W1A1"]', 'names = ["x"]', "there are 1 for 2 schemes"),
        ("seeds =", "sedes =", "compare.sedes is not a key of .compare. .did you mean 'seeds'"),
        ("none<=w1a1", "none<=w1a1<=w2a2", "w2a2 is not compared"),
        ("none<=w1a1", "none<=", "write arms joined by"),
        ("none<=w1a1", "none=>w1a1", "expectation 'none=>w1a1'"),
        ('["none<=w1a1"]', '"none<=w1a1"', "compare.expect must be a list of strings"),
        ("steps = 3", "stepz = 3", r"small.toml: train.stepz .*did you mean 'train.steps'"),
        ("[compare]", "[compare]]", r"small.toml: not valid TOML"),
    ],
)
def test_mistakes_in_a_plan(config, old, new, says):
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=says):
        load_comparison(config)


def test_mistakes_on_the_command_line(config):
    for keywords, says in [
        ({"schemes": ""}, "no schemes"),
        ({"schemes": "w1a1,wlal"}, "--schemes: unknown scheme 'wlal'"),
        ({"seeds": ","}, "no seeds"),
        ({"seeds": "1,a"}, "'a' is no seed"),
        ({"seeds": "5-3"}, "'5-3' is no seed"),
        ({"seeds": "0-99999"}, "more than 10,000"),
        ({"seeds": "0", "expect": ["none<w1a1"]}, "give two seeds or more"),
        ({"overrides": ["train.stepz=4"]}, "--set train.stepz=4: train.stepz is not a configuration key"),
        ({"overrides": ["train.accumulation=4"]}, r"train.accumulation = 4 must divide"),
    ]:
        with pytest.raises(ConfigError, match=says):
            load_comparison(config, **keywords)
    with pytest.raises(ConfigError, match=r"^nothing.toml: no such configuration file"):
        load_comparison("nothing.toml")


def test_seeds_are_numbers_and_ranges():
    assert parse_seeds("0,1,2") == [0, 1, 2]
    assert parse_seeds(" 0-3, 7,9-9") == [0, 1, 2, 3, 7, 9]


def test_expectation_chains():
    schemes = ("none", "w4a4", "w1a1", "w1a1-ste")
    pairs = parse_expectation("none <= W4A4<=w1a1<w1a1-ste", schemes)
    assert list(map(str, pairs)) == ["none <= w4a4", "w4a4 <= w1a1", "w1a1 < w1a1-ste"]
    assert parse_expectation("w4a4≤w1a1", schemes) == [Expectation("w4a4", "<=", "w1a1")]


LESS, CLEARLY = Expectation("a", "<=", "b"), Expectation("a", "<", "b")


def test_the_pooled_deviation_is_the_documented_formula():
    a, b = [2.0, 2.1, 2.3], [2.2, 2.6]
    expected = math.sqrt((2 * statistics.variance(a) + 1 * statistics.variance(b)) / 3)
    assert pooled_deviation(a, b) == pytest.approx(expected)
    assert pooled_deviation([1.0], [2.0]) is None
    assert pooled_deviation([1.0], [2.0, 4.0]) == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(
    ("expectation", "a", "b", "passed", "says"),
    [
        (LESS, [2.0, 2.2], [2.1, 2.3], True, "in order"),
        (LESS, [2.0, 2.2], [2.0, 2.2], True, "in order"),
        # s = 0.1·√2 here, so that two of them are 0.2828
        (LESS, [2.28, 2.48], [2.0, 2.2], True, "inverted by 0.2800, less than two standard deviations, 0.2828"),
        (LESS, [2.29, 2.49], [2.0, 2.2], False, "inverted by 0.2900, not less than two standard deviations, 0.2828"),
        (CLEARLY, [2.0, 2.2], [2.28, 2.48], False, "in order by 0.2800, not more than"),
        (CLEARLY, [2.0, 2.2], [2.29, 2.49], True, "in order by 0.2900, more than"),
        (CLEARLY, [2.29, 2.49], [2.0, 2.2], False, "inverted by 0.2900"),
        # s = 0.1 and the differences are 0.1 ± 0.1 at three seeds, 0.25 ± 0.25 at t = 4.3
        (
            CLEARLY,
            [2.0, 2.1, 2.2],
            [2.4, 2.35, 2.3],
            False,
            "in order by 0.2500, more than two standard deviations, 0.1581, but not separable",
        ),
        (LESS, [2.0], [2.1], True, "in order; with one seed each"),
        (LESS, [2.1], [2.0], False, "inverted; with one seed each"),
        (LESS, [2.0, math.inf], [2.1, 2.1], False, "1 of 2 runs of a diverged"),
        (LESS, [2.0, 2.0], [1.0, math.inf], True, "a run of b diverged, which is worse"),
        (CLEARLY, [2.0, 2.0], [1.0, math.inf], True, "a run of b diverged"),
        (Expectation("a", "converges", None), [2.0, 9.0], [], True, "none of 2 runs diverged or were unstable"),
        (Expectation("a", "converges", None), [math.inf, 9.0], [], False, "1 of 2 runs of a diverged"),
    ],
)
def test_verdicts(expectation, a, b, passed, says):
    verdict = judge(expectation, {"a": dict(enumerate(a)), "b": dict(enumerate(b))})
    assert verdict.passed is passed
    assert verdict.reason.startswith(says)


def plan_of(schemes, seeds, expect=(), **options):
    arms = tuple(Arm(scheme, scheme, TrainConfig(scheme=scheme)) for scheme in schemes)
    return Comparison(TrainConfig(), arms, tuple(seeds), expect=tuple(expect), **options)


def result_of(arm, seed, loss, rate=None, status="finished"):
    status = "diverged" if loss is None else status
    return RunResult(arm, arm, seed, rate, status, 10, loss, loss and loss * 1.5, 4.0, f"runs/{arm}-seed{seed}")


# two seeds, differences 0.5 and 0.7: t is 12.7062 for one degree of freedom
NOISE = "+0.6000 ± 1.2706, not separable"


def test_statistics_over_seeds_and_the_tables():
    plan = plan_of(["none", "w1a1"], range(3), ["none<=w1a1", "w1a1"])
    losses = {"none": [2.0, 2.1, 2.2], "w1a1": [2.5, None, 2.9]}
    runs = [result_of(arm, seed, loss) for arm, values in losses.items() for seed, loss in enumerate(values)]
    result = summarize(plan, runs)
    none, one = result.arms
    assert none.val_loss == Spread(pytest.approx(2.1), pytest.approx(0.1), 2.0, 2.2)
    assert (none.difference, none.diverged, none.runs) == (0.0, 0, 3)
    assert (one.val_loss.mean, one.diverged) == (pytest.approx(2.7), 1)
    assert one.difference == pytest.approx((0.5 + 0.7) / 2)  # of the seeds that both have
    assert [verdict.passed for verdict in result.verdicts] == [True, False]
    table = results_table(result)
    assert table.columns[:5] == ("arm", "diverged", "validation loss", "least", "greatest")
    assert table.rows[1][:6] == ("w1a1", "1 of 3", "2.7000 ± 0.2828", "2.5000", "2.9000", NOISE)
    assert "least" not in results_table(result, narrow=True).columns
    assert [row[1] for row in verdicts_table(result).rows] == ["passed", "failed"]
    assert not summarize(plan, runs[:-1]).finished
    alone = results_table(summarize(plan_of(["none"], [0]), runs[:1]))
    assert alone.rows == (("none", "0 of 1", "2.0000", "3.0000", "4.0"),)
    assert "least" in results_table(summarize(plan_of(["none"], range(3)), runs[:3]), narrow=True).columns


def test_run_folders_are_plain_names_of_their_own():
    odd = json.dumps(Scheme.parse("w1a1").to_json()).replace("1.3", "1.15")
    plan = plan_of(["w4a4-2:4", "w1a1", "w1a1-ste", odd], [0, 7])
    assert plan.folder(Run("w4a4-2:4", 7)) == "runs/w4a4-2_4-seed7"
    assert plan.folder(Run("w1a1", 7, 0.004)) == "runs/w1a1-lr0.004-seed7"
    assert plan.folder(Run(odd, 0)).startswith("runs/scheme-")
    assert len({plan.folder(run) for run in plan.first_runs()}) == 8

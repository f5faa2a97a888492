"""The fit: the published numbers from the paper's runs, known laws from synthetic ones, honest intervals, refusals."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from bitquest.errors import ConfigError, DataError
from bitquest.evaluation.scaling_fit import _Problem, fit_law
from bitquest.evaluation.scaling_fitted import PAPER, FittedLaw, load_law, short_count
from bitquest.evaluation.scaling_law import EFFICIENCY, PUBLISHED, ScalingLaw
from bitquest.evaluation.scaling_runs import ScalingRun, read_runs
from bitquest.evaluation.scaling_table import constants_table, formats_table, remarks

EFF = {"bf16": 1.0, "w4a4": 0.7, "w1a1": 0.02}


def _runs(law, rng=None, noise=0.0, eff=EFF, sizes=(3e7, 1e8, 3e8, 1e9), ratios=(25, 50, 100)):
    runs = []
    for name, value in eff.items():
        for n in map(round, sizes):
            for ratio in ratios:
                scatter = math.exp(noise * rng.normal()) if rng is not None else 1.0
                runs.append(ScalingRun(n, n * ratio, name, law.loss(n, n * ratio, value) * scatter, "made"))
    return runs


@pytest.fixture(scope="module")
def paper(shared_data):
    return read_runs([shared_data / "quest_paper_runs.csv"]).runs


@pytest.fixture(scope="module")
def fitted(paper):
    return fit_law(paper, about="quest_paper_runs.csv")


def test_the_papers_runs_give_the_published_law(fitted):
    assert fitted.sum_of_squares <= 0.001477
    assert fitted.about["starts_that_agree"] == fitted.about["starts"]
    assert set(fitted.efficiencies) == set(EFFICIENCY)
    for name, eff in EFFICIENCY.items():
        assert fitted.efficiencies[name] == pytest.approx(eff, rel=0.01), name
    assert fitted.law.a == pytest.approx(PUBLISHED.a, rel=1e-3)
    assert fitted.law.alpha == pytest.approx(PUBLISHED.alpha, rel=1e-3)
    assert fitted.law.b == pytest.approx(PUBLISHED.b, rel=1e-3)
    assert fitted.law.beta == pytest.approx(PUBLISHED.beta, rel=1e-3)
    for name in fitted.efficiencies:
        interval = fitted.efficiency_interval(name)
        assert interval is None if name == "bf16" else interval[0] < EFFICIENCY[name] < interval[1]


def test_e_is_called_not_identifiable(fitted):
    assert fitted.law.e == 0
    assert not fitted.e_is_identifiable
    assert 0.05 < fitted.e_range[1] < 0.3
    assert constants_table(fitted).rows[-1][-1] == "not identifiable"
    assert any("not identifiable" in line for line in remarks(fitted))


def test_the_law_in_the_package_is_this_fit(fitted):
    shipped = load_law(None)
    assert shipped.efficiencies == pytest.approx(fitted.efficiencies, rel=1e-6)
    assert shipped.law.alpha == pytest.approx(fitted.law.alpha, rel=1e-6)
    assert shipped.range == fitted.range
    for name in EFFICIENCY:
        if name != "bf16":
            assert shipped.efficiency_interval(name) == pytest.approx(fitted.efficiency_interval(name), rel=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_a_known_law_is_found_again(seed):
    """Laws drawn at random, without noise."""
    rng = np.random.default_rng(seed)
    alpha, beta, e = rng.uniform(0.08, 0.4), rng.uniform(0.15, 0.4), rng.choice([0.0, 1.0, 1.7])
    share, level = rng.uniform(0.3, 0.7), 2.0
    law = ScalingLaw(level * share * 1e8**alpha, alpha, level * (1 - share) * 5e9**beta, beta, e)
    eff = {"bf16": 1.0, "w4a4": float(rng.uniform(0.3, 1.1)), "w1a1": float(10 ** rng.uniform(-2, -0.5))}
    found = fit_law(_runs(law, eff=eff), samples=0)
    assert found.efficiencies == pytest.approx(eff, rel=2e-3)
    assert (found.law.alpha, found.law.beta) == pytest.approx((alpha, beta), rel=5e-3)
    assert found.law.e == pytest.approx(e, abs=0.02)
    assert found.e_is_identifiable == (e > 0)
    assert found.loss(1e10, 1e12, "w1a1") == pytest.approx(law.loss(1e10, 1e12, eff["w1a1"]), rel=2e-3)


def test_intervals_cover_as_often_as_they_say():
    """20 noisy repetitions: the true values lie in the 95 % intervals in most; no interval is a guess."""
    law, rng, hits, widths = ScalingLaw(160.0, 0.2, 86.0, 0.24, 1.5), np.random.default_rng(0), [], []
    for seed in range(20):
        fitted = fit_law(_runs(law, rng, 0.004), starts=2, samples=50, seed=seed)
        for name in ("w4a4", "w1a1"):
            low, high = fitted.efficiency_interval(name)
            hits.append(low <= EFF[name] <= high)
            widths.append(high / low)
        hits.append(fitted.e_range[0] <= law.e <= fitted.e_range[1])
    assert 0.85 <= np.mean(hits) <= 0.99
    assert max(widths) < 3


def test_a_new_runs_loss_lies_in_its_interval():
    law, rng = ScalingLaw(160.0, 0.2, 86.0, 0.24, 1.5), np.random.default_rng(1)
    fitted = fit_law(_runs(law, rng, 0.004), samples=100)
    low, high = fitted.loss_interval(2e8, 1e10, "w4a4")
    mean = law.loss(2e8, 1e10, 0.7)
    inside = [low <= mean * math.exp(0.004 * rng.normal()) <= high for _ in range(400)]
    assert 0.85 <= np.mean(inside) <= 1
    assert (high - low) / mean < 4 * 0.004 * 1.4


def test_outliers_count_less():
    law = ScalingLaw(160.0, 0.2, 86.0, 0.24, 1.5)
    runs = _runs(law, np.random.default_rng(0), 0.001)
    runs[13] = replace(runs[13], loss=runs[13].loss * 1.15)
    robust, plain = (fit_law(runs, samples=0, huber=huber).efficiencies["w4a4"] for huber in (0.005, 10.0))
    assert abs(robust - 0.7) < 0.02 < abs(plain - 0.7)


def test_derivatives_are_those_of_the_fit():
    rng = np.random.default_rng(0)
    for held in ({}, {"A": 9.0, "alpha": 0.1}, {"B": 80.0, "beta": 0.2, "E": 0.0}, {"A": 9.0}):
        problem = _Problem(
            rng.uniform(17, 21, 9), rng.uniform(20, 24, 9), np.zeros(9), np.arange(9) % 3, ("a", "b", "c"), held
        )
        u = rng.normal(-0.5, 0.3, (1, problem.unknowns))
        for column in range(problem.unknowns):
            step = np.zeros_like(u)
            step[0, column] = 1e-6
            slope = (problem.log_fit(u + step) - problem.log_fit(u - step)) / 2e-6
            assert problem.jacobian(u)[0, :, column] == pytest.approx(slope[0], rel=1e-5, abs=1e-9)


def test_constants_may_be_held():
    law = ScalingLaw(160.0, 0.2, 86.0, 0.24, 1.5)
    one_ratio = _runs(law, ratios=(100,))
    found = fit_law(one_ratio, held={"B": 86.0, "beta": 0.24}, samples=20)
    assert (found.law.b, found.law.beta) == pytest.approx((86.0, 0.24))
    assert found.efficiencies == pytest.approx(EFF, rel=5e-3)
    assert found.constant_interval("beta") is None
    assert constants_table(found).rows[3][-1] == "held"
    one_size = _runs(law, sizes=(1e8,))
    found = fit_law(one_size, held={"alpha": 0.2, "E": 1.5}, samples=0)
    assert found.efficiencies == pytest.approx(EFF, rel=5e-3)
    assert found.law.e == 1.5
    assert found.e_is_identifiable


def test_another_reference():
    law = ScalingLaw(160.0, 0.2, 86.0, 0.24, 1.5)
    found = fit_law(_runs(law), reference="w4a4", samples=5)
    assert found.efficiencies["w4a4"] == 1
    assert found.efficiencies["bf16"] == pytest.approx(1 / 0.7, rel=5e-3)


def test_what_cannot_be_fitted():
    law = ScalingLaw(160.0, 0.2, 86.0, 0.24, 1.5)
    runs = _runs(law)
    for wrong, message in (
        ([], "no runs"),
        (runs[:5], "5 runs are too few for 5 unknowns"),
        ([run for run in runs if run.format != "bf16"], "no run of the reference format 'bf16'"),
        (_runs(law, sizes=(1e8,)), "all runs have one size"),
        (_runs(law, ratios=(100,)), "about 100 tokens per parameter"),
        ([replace(run, tokens=10**9) for run in runs], "all runs saw 1,000,000,000 tokens"),
        ([replace(runs[0], loss=math.nan), *runs[1:]], "the loss is nan"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit_law(wrong, samples=0)
    only = [replace(run, parameters={"bf16": 10**8, "w4a4": 2 * 10**8, "w1a1": 10**7}[run.format]) for run in runs]
    with pytest.raises(ConfigError, match="every format has one size only"):
        fit_law(only, samples=0)
    for held, message in (
        ({"gamma": 1.0}, "constants are A, alpha, B, beta, E"),
        ({"beta": -1.0}, "positive"),
        ({"A": 8.0}, "hold alpha as well"),
    ):
        with pytest.raises(ConfigError, match=message):
            fit_law(runs, held=held, samples=0)


def test_what_is_hardly_determined_is_said():
    law = ScalingLaw(8.134, 0.0627, 86.4, 0.2413, 0.0)
    runs = _runs(law, np.random.default_rng(0), 0.004, sizes=(3e7, 1e8), ratios=(90, 110))
    lines = remarks(fit_law(runs, samples=40))
    assert any("Hardly determined" in line for line in lines)
    few = [run for run in _runs(law) if run.format != "w1a1" or (run.parameters == 10**8 and run.tokens > 9e9)]
    assert any(line.startswith("Fewer than 3 runs: w1a1") for line in remarks(fit_law(few, samples=5)))


def test_a_law_is_read_back(tmp_path):
    law = fit_law(_runs(ScalingLaw(160.0, 0.2, 86.0, 0.24, 1.5), np.random.default_rng(0), 0.004), samples=7, about="x")
    law.save(tmp_path / "law.json")
    again = load_law(tmp_path / "law.json")
    assert (again.law, again.efficiencies, again.range) == (law.law, law.efficiencies, law.range)
    assert len(again.samples) == 7
    assert again.loss_interval(1e9, 1e11, "w1a1") == pytest.approx(law.loss_interval(1e9, 1e11, "w1a1"), rel=1e-4)
    assert formats_table(again).rows == formats_table(law).rows
    assert FittedLaw.from_json(law.to_json(samples=False)).loss_interval(1e9, 1e11, "w1a1") is None


def test_what_is_no_law(tmp_path):
    path = tmp_path / "law.json"
    good = json.loads(PAPER.read_text(encoding="utf-8"))
    for text, message in (
        ("no", "law.json: not JSON"),
        ("[]", "law.json: not a scaling law"),
        (json.dumps({**good, "version": 9}), "version 9"),
        (json.dumps({**good, "constants": {}}), "damaged"),
        (json.dumps({**good, "samples": [[1, 2]]}), "damaged"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            load_law(path)


def test_formats_that_were_not_fitted():
    law = load_law(None)
    assert law.efficiency("w1a8") == (law.efficiencies["w1a16"], "w1a16")
    assert law.efficiency("w4a4-h8") == (law.efficiencies["w4a4"], "w4a4")
    with pytest.raises(ConfigError, match="knows no format 'w5a5'"):
        law.efficiency("w5a5")


def test_the_range_is_told():
    law = load_law(None)
    assert law.range.beyond(1e8, 1e10) == []
    assert law.range.beyond(7e9, 7e11) == [
        "size 7B is 8.51 times above the fit's 30.5M to 822M",
        "tokens 700B is 8.75 times above the fit's 750M to 80B",
    ]
    assert "tokens per parameter 1 is" in law.range.beyond(1e8, 1e8)[-1]


def test_short_counts():
    counts = [short_count(value) for value in (999, 1e3, 999.6e3, 1.234e6, 2e9, 3.5e12, 7e15)]
    assert counts == ["999", "1k", "1M", "1.23M", "2B", "3.5T", "7000T"]

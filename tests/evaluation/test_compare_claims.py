"""Intervals of differences: Student's t by hand, pairing, Welch, and what is called not separable."""

import math
import statistics
import sys

import pytest

from bitquest.errors import MissingExtraError
from bitquest.evaluation.compare_claims import Claim, claim, half_width, require_scipy, t_quantile
from bitquest.evaluation.compare_plan import Arm, Comparison
from bitquest.evaluation.compare_results import summarize
from bitquest.evaluation.compare_runs import RunResult
from bitquest.evaluation.compare_tables import claims_table, results_table, verdicts_table
from bitquest.training import TrainConfig


def test_the_quantiles_of_any_table_of_students_t():
    for freedom, quantile in ((1, 12.7062), (2, 4.3027), (4, 2.7764), (30, 2.0423), (1e9, 1.95996)):
        assert t_quantile(freedom) == pytest.approx(quantile, rel=2e-5)


def test_the_interval_of_a_mean():
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert half_width([1.0]) is None
    assert half_width([2.0, 2.0]) == 0.0


def test_seeds_that_both_have_are_paired():
    losses = {"a": {0: 2.0, 1: 2.2, 2: 2.1}, "b": {2: 2.3, 0: 2.1, 1: 2.4, 7: 9.0}}
    found = claim("a", "b", losses)
    gaps = [0.1, 0.2, 0.2]
    half = 4.3027 * statistics.stdev(gaps) / math.sqrt(3)
    assert (found.difference, found.seeds, found.is_paired) == (pytest.approx(1 / 6), 3, True)
    assert found.bounds == pytest.approx((1 / 6 - half, 1 / 6 + half), rel=1e-4)
    assert found.separable
    assert found.interval == "+0.0232 to +0.3101"
    turned = claim("b", "a", losses)
    assert turned.bounds == pytest.approx((-found.high, -found.low))


def test_arms_without_common_seeds_are_compared_by_welchs_rule():
    a, b = [2.0, 2.2, 2.1], [2.3, 2.9]
    found = claim("a", "b", {"a": dict(enumerate(a)), "b": {7: 2.3, 8: 2.9}})
    parts = [statistics.variance(a) / 3, statistics.variance(b) / 2]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 1)
    half = t_quantile(freedom) * math.sqrt(sum(parts))
    assert (found.seeds, found.is_paired, found.separable) == (2, False, False)
    assert found.bounds == pytest.approx((0.5 - half, 0.5 + half))
    assert found.interval.endswith(", not separable")
    equal = claim("a", "b", {"a": {0: 1.0, 1: 1.0}, "b": {2: 2.0, 3: 2.0}})
    assert equal.bounds == (1.0, 1.0)


def test_too_few_seeds_have_no_interval():
    one = claim("a", "b", {"a": {0: 2.0}, "b": {0: 2.5}})
    assert (one.difference, one.bounds, one.separable, one.interval) == (0.5, None, None, "–")
    single = claim("a", "b", {"a": {0: 2.0, 1: 2.1}, "b": {1: 2.5}})
    assert (single.difference, single.bounds, single.is_paired) == (pytest.approx(0.45), None, False)
    assert claim("a", "b", {"a": {}, "b": {0: 2.5}}) == Claim("a", "b", None, None, None, 0, False)


def test_scipy_is_asked_for_before_anything_is_trained(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(MissingExtraError, match="scipy"):
        require_scipy()


def test_the_tables_say_what_is_not_separable():
    losses = {"none": [2.0, 2.1, 2.2], "w4a4": [2.02, 2.09, 2.2], "w1a1": [2.8, 2.95, 3.0]}
    arms = tuple(Arm(scheme, scheme.upper(), TrainConfig(scheme=scheme)) for scheme in losses)
    plan = Comparison(TrainConfig(), arms, (0, 1, 2), expect=("none<w4a4", "w4a4<w1a1"))
    runs = [
        RunResult(arm, arm, seed, None, "finished", 10, loss, 1.0, 1.0, "x")
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    result = summarize(plan, runs)
    assert [row[-3] for row in results_table(result).rows] == [
        "+0.0000",
        "+0.0033 ± 0.0379, not separable",
        "+0.8167 ± 0.0717",
    ]
    narrow = results_table(result, narrow=True)
    assert narrow.rows[1][-3] == "+0.0033 ± 0.0379 n.s."
    assert "n.s.: not separable" in narrow.note
    assert "n.s.: not separable" in verdicts_table(result, narrow=True).note
    verdicts = verdicts_table(result).rows
    assert [row[:2] for row in verdicts] == [("NONE < W4A4", "failed"), ("W4A4 < W1A1", "passed")]
    assert verdicts[0][2].endswith("not separable")
    pairs = claims_table(result).rows
    assert [row[:2] for row in pairs] == [("NONE", "W4A4"), ("NONE", "W1A1"), ("W4A4", "W1A1")]
    assert pairs[0][3].endswith("not separable")
    assert "not separable" not in pairs[1][3]
    claims = result.to_json()["claims"]
    assert next((c["first"], c["second"], c["separable"], c["seeds"]) for c in claims) == ("none", "w4a4", False, 3)
    assert result.to_json()["expectations"][1]["interval"][0] > 0
    # the lower one stands first, whichever came first in the file
    turned = Comparison(TrainConfig(), arms[::-1], (0, 1, 2))
    assert [row[:4] for row in claims_table(summarize(turned, runs)).rows] == [row[:4] for row in pairs]


def test_of_many_arms_neighbours_are_shown():
    base = TrainConfig(scheme="none")
    arms = tuple(Arm(f"arm {number}", f"arm {number}", base, is_plain=False) for number in range(10))
    runs = [
        RunResult(arm.key, "none", seed, None, "finished", 1, 3.0 - number / 10 + seed / 100, 1.0, 1.0, "x")
        for number, arm in enumerate(arms)
        for seed in (0, 1)
    ]
    table = claims_table(summarize(Comparison(base, arms, (0, 1)), runs))
    assert [row[:2] for row in table.rows] == [(f"arm {n}", f"arm {n - 1}") for n in range(9, 0, -1)]
    assert {row[2] for row in table.rows} == {"+0.1000"}
    assert table.title == "Neighbours by mean loss"


def test_a_difference_is_to_the_unquantized_model_of_the_same_recipe():
    base = TrainConfig.from_dict({"data": {"path": "x"}})
    decayed = TrainConfig.from_dict({"data": {"path": "x"}, "optimizer": {"weight_decay": 0.5}})
    larger = TrainConfig.from_dict({"data": {"path": "x"}, "model": {"preset": "3M"}})

    def arm(name, config, scheme):
        return Arm(name, name, TrainConfig.from_dict(config.to_dict() | {"scheme": scheme}), is_plain=False)

    arms = (
        arm("full", base, "none"), arm("full decayed", decayed, "none"),
        arm("one", base, "w1a1"), arm("one decayed", decayed, "w1a1"), arm("one larger", larger, "w1a1"),
    )  # fmt: skip
    losses = {"full": 2.0, "full decayed": 1.5, "one": 3.0, "one decayed": 2.75, "one larger": 2.5}
    runs = [RunResult(a.key, a.scheme, 0, None, "finished", 1, losses[a.key], 1.0, 1.0, "x") for a in arms]
    result = summarize(Comparison(base, arms, (0,)), runs)
    assert {a.arm: a.difference for a in result.arms} == {
        "full": 0.0, "full decayed": 0.0, "one": 1.0, "one decayed": 1.25, "one larger": None,
    }  # fmt: skip

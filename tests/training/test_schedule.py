"""The learning rate over a run, against its closed forms."""

import math
from itertools import pairwise

import pytest

from bitquest.training.config import ScheduleSection
from bitquest.training.schedule import learning_rate_share


def curve(steps, **fields):
    return [learning_rate_share(ScheduleSection(**fields), step, steps) for step in range(1, steps + 1)]


def test_cosine():
    shares = curve(100, kind="cosine", warmup=0.1, final=0.1)
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == 1.0
    assert shares[-1] == pytest.approx(0.1)
    assert shares[54] == pytest.approx(0.55)  # half-way from step 10 to step 100
    assert shares[32 - 1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 22 / 90)) / 2)
    assert all(a > b for a, b in pairwise(shares[9:]))


def test_warmup_stable_decay():
    shares = curve(100, kind="wsd", warmup=0.1, decay=0.2, final=0.0)
    assert shares[4] == pytest.approx(0.5)
    assert shares[9:80] == [1.0] * 71
    assert shares[89] == pytest.approx(0.5)
    assert shares[-1] == 0.0


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.5, 0.8])
def test_short_runs_stay_within_bounds_and_end_at_the_final_share(kind, steps, warmup):
    shares = curve(steps, kind=kind, warmup=warmup, decay=0.2, final=0.25)
    assert all(0 < share <= 1 for share in shares)
    if kind == "cosine" and round(warmup * steps) < steps:
        assert shares[-1] == pytest.approx(0.25)

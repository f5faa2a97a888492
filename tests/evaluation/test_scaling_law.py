"""The published law: its values against the paper's runs, its inverse, what it refuses."""

import csv
import statistics
from math import log

import pytest

from bitquest.errors import ConfigError
from bitquest.evaluation.scaling_law import (
    EFFICIENCY,
    FITTED_LOSSES,
    FITTED_PARAMETERS,
    FITTED_TOKENS_PER_PARAMETER,
    PUBLISHED,
    efficiency_of,
    is_extrapolated,
)


def _format(run):
    if run["weight_bits"] == "16":
        return "bf16"
    suffix = {"fp4_e2m1": "-fp4"}.get(run["format"], "") + {"4:8_pairs": "-4:8"}.get(run["sparsity"], "")
    rotated = "-norot" if run["rotation"] == "none" else ""
    return f"w{run['weight_bits']}a{run['activation_bits']}{suffix}{rotated}"


def test_the_runs_it_was_fitted_to(shared_data):
    text = (shared_data / "quest_paper_runs.csv").read_text(encoding="utf-8")
    runs = list(csv.DictReader(text.splitlines()))
    sizes = [int(run["non_embedding_parameters"]) for run in runs]
    tokens = [int(run["tokens"]) for run in runs]
    losses = [float(run["c4_val_loss"]) for run in runs]
    assert (min(sizes), max(sizes)) == FITTED_PARAMETERS
    per_parameter = [d / n for d, n in zip(tokens, sizes, strict=True)]
    assert (round(min(per_parameter), 1), round(max(per_parameter), 1)) == FITTED_TOKENS_PER_PARAMETER
    assert (round(min(losses), 3), round(max(losses), 3)) == FITTED_LOSSES
    assert {_format(run) for run in runs} == set(EFFICIENCY)
    squares = [
        log(PUBLISHED.loss(n, d, EFFICIENCY[_format(run)]) / loss) ** 2
        for n, d, loss, run in zip(sizes, tokens, losses, runs, strict=True)
    ]
    assert sum(squares) == pytest.approx(0.0014771, abs=5e-7)
    assert statistics.fmean(squares) ** 0.5 < 0.004


@pytest.mark.parametrize("name", EFFICIENCY)
def test_the_size_of_a_loss(name):
    for size in (1e6, 5e7, 3e10):
        loss = PUBLISHED.loss(size, 100 * size, EFFICIENCY[name])
        assert PUBLISHED.size(loss, EFFICIENCY[name]) == pytest.approx(size, rel=1e-9)
    assert PUBLISHED.size(3.0, EFFICIENCY[name], 20) > PUBLISHED.size(3.0, EFFICIENCY[name])


def test_one_bit_of_800m_is_worth_bf16_of_50m():
    """METHOD's own comparison of W1A1-800M (3.079) and BF16-50M (3.068)."""
    large, small = PUBLISHED.loss(822e6, 80e9, EFFICIENCY["w1a1"]), PUBLISHED.loss(49.6e6, 5e9)
    assert large == pytest.approx(3.079, rel=0.01)
    assert small == pytest.approx(3.068, rel=0.01)


def test_what_a_format_is_taken_as():
    assert efficiency_of("w4a4") == (0.692, "w4a4")
    assert efficiency_of("w8a8") == (1.016, "w8a8")
    assert efficiency_of("w1a8") == (0.138, "w1a16")
    with pytest.raises(ConfigError, match="knows no format 'w5a5'"):
        efficiency_of("w5a5")
    assert not is_extrapolated(1e8)
    assert is_extrapolated(1e7)
    assert is_extrapolated(1e9)


def test_what_has_no_size():
    for loss in (0.0, 0.5, 100.0, float("nan")):
        with pytest.raises(ConfigError, match="no size has a loss"):
            PUBLISHED.size(loss)
    with pytest.raises(ConfigError, match="positive"):
        PUBLISHED.loss(0, 1e9)

"""Student's t against published quantiles, intervals against worked examples."""

import pytest

from bitquest.errors import ConfigError
from bitquest.evaluation.student import difference_interval, mean_interval, t_quantile


# NIST/SEMATECH e-Handbook, table of critical values of Student's t
@pytest.mark.parametrize(
    ("freedom", "at_95", "at_99"),
    [(1, 12.706, 63.657), (2, 4.303, 9.925), (4, 2.776, 4.604), (10, 2.228, 3.169), (100, 1.984, 2.626)],
)
def test_quantiles(freedom, at_95, at_99):
    assert t_quantile(0.975, freedom) == pytest.approx(at_95, abs=6e-4)
    assert t_quantile(0.995, freedom) == pytest.approx(at_99, abs=6e-4)
    assert t_quantile(0.025, freedom) == -t_quantile(0.975, freedom)


def test_many_degrees_of_freedom_are_normal():
    assert t_quantile(0.975, 1e6) == pytest.approx(1.959964, abs=1e-5)
    assert t_quantile(0.5, 3) == pytest.approx(0, abs=1e-9)


def test_the_interval_of_a_mean():
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.estimate == 2
    assert found.high - 2 == pytest.approx(4.3027 / 3**0.5, abs=1e-3)
    assert found.holds_zero
    assert not mean_interval([11.0, 12.0, 13.0]).holds_zero


def test_the_interval_of_a_difference():
    # equal variances 1, four values each: 6 degrees of freedom, standard error sqrt(1/2)
    ones, others = [0.0, 2.0, 0.0, 2.0], [1.0, 3.0, 1.0, 3.0]
    found = difference_interval(ones, others)
    assert found.estimate == -1
    assert found.high - found.estimate == pytest.approx(2.4469 * (2 * (4 / 3) / 4) ** 0.5, abs=1e-3)
    # Welch: the noisy side decides the freedom
    noisy = difference_interval([0.0, 10.0], [1.0, 1.0, 1.0, 1.0])
    assert noisy.high - noisy.estimate == pytest.approx(12.706 * 5, abs=0.01)
    same = difference_interval([1.0, 1.0], [1.0, 1.0])
    assert (same.low, same.high) == (0, 0)
    assert same.holds_zero


def test_what_makes_no_interval():
    with pytest.raises(ConfigError, match="two values"):
        mean_interval([1.0])
    with pytest.raises(ConfigError, match="two values or more of each"):
        difference_interval([1.0], [1.0, 2.0])
    with pytest.raises(ConfigError, match="no quantile"):
        t_quantile(1.0, 3)

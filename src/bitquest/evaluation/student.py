"""Intervals for means of a few runs: Student's t, and Welch's difference of two means of unequal spread."""

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from bitquest.errors import ConfigError


@dataclass(frozen=True)
class Interval:
    """An estimate and the two ends of its interval, all in the unit of the values."""

    estimate: float
    low: float
    high: float

    @property
    def holds_zero(self) -> bool:
        """Whether zero lies inside: a difference that the values do not separate from none."""
        return self.low <= 0 <= self.high


def t_quantile(probability: float, freedom: float) -> float:
    """The value that Student's t with `freedom` degrees of freedom (1 or more, not only whole numbers) stays below.

    probability: between 0 and 1. By bisection on the distribution function; correct to about 1e-9 of its value.
    """
    if not (0 < probability < 1 and freedom >= 1):
        raise ConfigError(f"no quantile at probability {probability:g} with {freedom:g} degrees of freedom")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while _t_distribution(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if _t_distribution(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of two or more values, and where the mean of many such would lie."""
    if len(values) < 2:
        raise ConfigError("an interval takes two values or more")
    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = t_quantile((1 + confidence) / 2, len(values) - 1) * error
    return Interval(mean, mean - half, mean + half)


def difference_interval(ones: Sequence[float], others: Sequence[float], confidence: float = 0.95) -> Interval:
    """mean(ones) − mean(others) of independent values, two or more each (Welch, Biometrika 34, 1947)."""
    if len(ones) < 2 or len(others) < 2:
        raise ConfigError("an interval takes two values or more of each")
    difference, (error, freedom) = statistics.fmean(ones) - statistics.fmean(others), welch(ones, others)
    half = t_quantile((1 + confidence) / 2, freedom) * error
    return Interval(difference, difference - half, difference + half)


def welch(ones: Collection[float], others: Collection[float]) -> tuple[float, float]:
    """Standard error of the difference of the means of independent values, two or more each, and its freedom.

    With a = s²/n of each: √(a + b), and (a + b)²/(a²/(n_a − 1) + b²/(n_b − 1)); of values that do not vary 0 and 1.
    """
    parts = [(statistics.variance(values) / len(values), len(values) - 1) for values in (ones, others)]
    total = sum(part for part, _ in parts)
    if total == 0:
        return 0.0, 1.0
    return math.sqrt(total), total**2 / sum(part**2 / free for part, free in parts)


def _t_distribution(t: float, freedom: float) -> float:
    """P(T ≤ t) for t ≥ 0.

    With t = √ν·tan θ the density is C·cos^(ν−1) θ on a bounded range: Gauss-Legendre on short pieces, whose
    first one begins where the integrand is smooth.
    """
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    end, pieces = math.atan(t / math.sqrt(freedom)), 64
    width = end / pieces
    total = 0.0
    for piece in range(pieces):
        for node, weight in _GAUSS:
            total += weight * math.cos((piece + node) * width) ** (freedom - 1)
    return 0.5 + constant * total * width


# Three-point Gauss-Legendre on [0, 1].
_GAUSS = (
    (0.5 - math.sqrt(0.15), 5 / 18),
    (0.5, 4 / 9),
    (0.5 + math.sqrt(0.15), 5 / 18),
)

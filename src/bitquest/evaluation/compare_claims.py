"""What may be claimed of a difference between two arms: its 95 % interval, and "not separable" where that holds zero.

With n seeds that both arms finished, d_i the difference at seed i, mean d and sample standard deviation s_d:

    d ± t(n - 1) · s_d / sqrt(n)

t(f) is the 97.5 % quantile of Student's distribution with f degrees of freedom: 12.7 for two seeds, 4.3 for three, 2.8
for five. Arms that share fewer than two seeds are compared unpaired (Welch): s² / n of each arm adds up, and

    f = (a + b)² / (a² / (n_a - 1) + b² / (n_b - 1))        a = s_a² / n_a, b = s_b² / n_b

A pair of runs shares initial weights and the order of data, not its noise: at 1 bit rounding alone parts two runs of
one seed as far as another seed would. So pairing is right but helps little there, and seeds are the honest unit.
Each interval stands alone: of twenty that hold nothing but noise, one on average excludes zero.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bitquest.errors import MissingExtraError
from bitquest.evaluation.student import welch

NOT_SEPARABLE = "not separable"


@dataclass(frozen=True)
class Claim:
    """second's mean loss less first's, in nats per token, and its 95 % interval (None where seeds are too few).

    seeds: of the pairs, or of the arm with fewer where is_paired is False. difference is None where an arm has no loss.
    """

    first: str
    second: str
    difference: float | None
    low: float | None
    high: float | None
    seeds: int
    is_paired: bool

    @property
    def separable(self) -> bool | None:
        """Whether the interval leaves out zero; None where there is no interval."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval, None where there is none."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def interval(self) -> str:
        """The interval in words."""
        if self.low is None or self.high is None:
            return "–"
        words = f"{self.low:+.4f} to {self.high:+.4f}"
        return words if self.separable else f"{words}, {NOT_SEPARABLE}"


def require_scipy() -> None:
    """Raise MissingExtraError if intervals cannot be computed; for asking before hours of training."""
    try:
        import scipy.special  # noqa: F401
    except ImportError:
        raise MissingExtraError("scipy", "science", "the intervals of a comparison") from None


def t_quantile(freedom: float) -> float:
    """The 97.5 % quantile of Student's t."""
    require_scipy()
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean of some values; None of fewer than two."""
    if len(values) < 2:
        return None
    return t_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def claim(first: str, second: str, losses: Mapping[str, Mapping[int, float]]) -> Claim:
    """The difference of two arms; `losses` of every arm by seed, of the runs that have one."""
    one, other = losses[first], losses[second]
    shared = [seed for seed in one if seed in other]
    if len(shared) > 1 or (shared and len(one) == len(other) == 1):
        gaps = [other[seed] - one[seed] for seed in shared]
        mean, half = statistics.fmean(gaps), half_width(gaps)
        return _claim(first, second, mean, half, len(shared), True)
    if not one or not other:
        return Claim(first, second, None, None, None, 0, False)
    mean = statistics.fmean(other.values()) - statistics.fmean(one.values())
    return _claim(first, second, mean, _welch(one, other), min(len(one), len(other)), False)


def _claim(first: str, second: str, mean: float, half: float | None, seeds: int, is_paired: bool) -> Claim:
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return Claim(first, second, mean, low, high, seeds, is_paired)


def _welch(one: Mapping[int, float], other: Mapping[int, float]) -> float | None:
    """Half of the interval of the difference of two means of their own; None where one has a single seed."""
    if min(len(one), len(other)) < 2:
        return None
    error, freedom = welch(one.values(), other.values())
    return t_quantile(freedom) * error

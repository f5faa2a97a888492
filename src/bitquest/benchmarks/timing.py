"""Comparing speeds on a noisy machine: candidates take turns in one run; ratios are of medians and of minima."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition of one candidate, in the order they were taken."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        return min(self.seconds)


def alternate(
    candidates: dict[str, Callable[[], object]],
    repetitions: int,
    warmup: int = 2,
    progress: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Run the candidates in turn, `warmup` rounds unmeasured and `repetitions` measured; `progress` after each run.

    Taking turns spreads a slow minute of the machine over all candidates. A round begins with another candidate each
    time, so that none always follows the same one. Raises ValueError without candidates or repetitions.
    """
    if not candidates or repetitions < 1:
        raise ValueError("a comparison needs at least one candidate and one repetition")
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(warmup + repetitions):
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            began = clock()
            candidates[name]()
            if round_number >= warmup:
                seconds[name].append(clock() - began)
            if progress is not None:
                progress()
    return {name: Timing(name, tuple(taken)) for name, taken in seconds.items()}


@dataclass(frozen=True)
class Ratio:
    """How many times the baseline's time a candidate takes, by medians and by minima; below 1 is faster."""

    median: float
    minimum: float


def ratios(timings: dict[str, Timing], baseline: str) -> dict[str, Ratio]:
    """Every candidate against the baseline."""
    base = timings[baseline]
    return {name: Ratio(t.median / base.median, t.minimum / base.minimum) for name, t in timings.items()}

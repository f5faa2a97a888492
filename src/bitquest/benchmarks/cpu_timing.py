"""Timing on a CPU that others use too: candidates take turns, caches warm or passed, medians and minima.

A sample of a short call is the mean over as many calls as fill a few milliseconds. "Warm" calls one copy of the data,
once unmeasured before each sample, since the other candidates' turns have emptied the caches; "past the cache" walks
through copies that together are several times the last-level cache.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from bitquest.benchmarks.timing import Timing

Sampler = Callable[[], float]

WARM, PAST_CACHE = "warm", "past the cache"
SAMPLE_SECONDS = 4e-3
PAST = 3  # times the last-level cache that lie between two uses of one copy
_ASSUMED_CACHE = 32 * 2**20


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 32 MiB where the system does not say."""
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1)
        digits = text.rstrip("KMG")
        sizes.append(int(digits) * unit if digits.isdigit() else 0)
    return max(sizes) or _ASSUMED_CACHE


def copies_past_cache(bytes_each: int, most: int = 64) -> int:
    """How many copies of some data it takes to pass the last-level cache between two uses of one."""
    return max(2, min(most, -(-PAST * last_level_cache() // max(bytes_each, 1)) + 1))


def thread_counts(asked: Sequence[int]) -> list[int]:
    """The numbers of threads that this process can use out of those asked for, at least one."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({min(n, available) for n in asked})


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """torch's threads, which the native engine obeys as well, inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def sampler(calls: Sequence[Callable[[], object]], memory: str, seconds: float = SAMPLE_SECONDS) -> Sampler:
    """A function that takes one sample, in seconds a call, walking through `calls` (copies of one piece of work)."""
    turns = cycle(calls)
    next(turns)()
    began = time.perf_counter()
    next(turns)()
    once = max(time.perf_counter() - began, 1e-7)
    count = max(1, round(seconds / once))

    def sample() -> float:
        if memory == WARM:
            next(turns)()
        began = time.perf_counter()
        for _ in range(count):
            next(turns)()
        return (time.perf_counter() - began) / count

    return sample


def take_turns(
    samplers: Mapping[str, Sampler],
    repetitions: int,
    *,
    warmup: int = 1,
    budget: float = float("inf"),
    least: int = 5,
    settle: float = 0.0,
    progress: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Samples of each candidate in turn, each round beginning with another one.

    After `least` rounds, rounds end when `budget` seconds are over: long candidates get fewer than `repetitions`.
    settle: seconds of rest before each sample, for threads of other processes that still spin.
    """
    names, seconds = list(samplers), {name: list[float]() for name in samplers}
    began = time.monotonic()
    for number in range(warmup + repetitions):
        taken = number - warmup
        if taken >= least and time.monotonic() - began > budget:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if settle:
                time.sleep(settle)
            sample = samplers[name]()
            if taken >= 0:
                seconds[name].append(sample)
            if progress is not None:
                progress()
    return {name: Timing(name, tuple(taken)) for name, taken in seconds.items()}


def times(timings: Mapping[str, Timing]) -> dict[str, dict[str, Any]]:
    """Timings as JSON values."""
    return {
        name: {"median_seconds": t.median, "minimum_seconds": t.minimum, "repetitions": len(t.seconds)}
        for name, t in timings.items()
    }


def speedup(ours: Mapping[str, Any], baselines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How many times faster ours is than the best of the baselines: by medians and by minima."""
    return {
        "of_medians": min(b["median_seconds"] for b in baselines) / ours["median_seconds"],
        "of_minima": min(b["minimum_seconds"] for b in baselines) / ours["minimum_seconds"],
    }

"""Timing on a GPU: candidates take turns, CUDA events measure, CUDA graphs keep the host out of the figure.

A candidate is a list of calls, each on data of its own, so that a pass over them finds nothing of the last pass in the
L2. One pass, or several where a pass is short, is captured as a CUDA graph; a sample is the time of one replay divided
by the calls in it. Where a capture fails, and on a CPU, the calls are launched one by one.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bitquest.benchmarks.timing import Timing

Call = Callable[[], object]

_SAMPLE_SECONDS = 1e-3  # a sample is at least this long: events resolve about half a microsecond
_MOST_PASSES = 256


@dataclass(frozen=True)
class Burst:
    """A candidate ready to be sampled: `run` makes `calls` calls."""

    run: Call
    calls: int
    graph: bool
    note: str = ""


def prepare(calls: Sequence[Call], device: torch.device, graph: bool = True) -> Burst:
    """Warm up every call (which compiles and tunes), then capture a burst of at least a millisecond."""

    def once() -> None:
        for call in calls:
            call()

    for _ in range(2):
        once()
    if device.type != "cuda":
        return Burst(once, len(calls), False)
    torch.cuda.synchronize(device)
    if graph:
        try:
            run = _captured(once)
            passes = _passes(_sample(Burst(run, 1, True), device))
            if passes > 1:
                run = _captured(_repeated(once, passes))
            return Burst(run, passes * len(calls), True)
        except RuntimeError as error:
            torch.cuda.synchronize(device)  # raises where the device itself is lost
            note = f"not captured as a CUDA graph: {str(error).splitlines()[0]}"
            return Burst(once, len(calls), False, note)
    passes = _passes(_sample(Burst(once, 1, False), device))
    return Burst(_repeated(once, passes), passes * len(calls), False)


def _repeated(run: Call, times: int) -> Call:
    def repeated() -> None:
        for _ in range(times):
            run()

    return repeated


def _passes(seconds: float) -> int:
    return min(_MOST_PASSES, max(1, math.ceil(_SAMPLE_SECONDS / max(seconds, 1e-7))))


def _captured(run: Call) -> Call:
    """A replay of `run`'s launches. Its memory is the graph's own."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _sample(burst: Burst, device: torch.device) -> float:
    """Seconds of one call."""
    if device.type != "cuda":
        began = time.perf_counter()
        burst.run()
        return (time.perf_counter() - began) / burst.calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    start.record()
    burst.run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / burst.calls


def alternate_bursts(bursts: dict[str, Burst], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Sample the candidates in turn, each round beginning with another one; the first round is not counted."""
    names = list(bursts)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds + 1):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds = _sample(bursts[name], device)
            if number:
                taken[name].append(seconds)
    return {name: Timing(name, tuple(seconds)) for name, seconds in taken.items()}


def compare(
    candidates: Mapping[str, Sequence[Call]], baseline: str, rounds: int, device: torch.device, graph: bool = True
) -> dict[str, Any]:
    """Times of every candidate and speed-ups over the baseline (above 1 is faster), as plain JSON values."""
    bursts = {name: prepare(calls, device, graph) for name, calls in candidates.items()}
    timings = alternate_bursts(bursts, rounds, device)
    base, fields = timings[baseline], {}
    for name, timing in timings.items():
        fields[name] = {
            "median_seconds": timing.median,
            "minimum_seconds": timing.minimum,
            "samples": len(timing.seconds),
            "calls_a_sample": bursts[name].calls,
            "cuda_graph": bursts[name].graph,
            **({"note": bursts[name].note} if bursts[name].note else {}),
            "speedup_of_medians": base.median / timing.median,
            "speedup_of_minima": base.minimum / timing.minimum,
        }
    return fields


def seconds_of(calls: Sequence[Call], rounds: int, device: torch.device, graph: bool = True) -> Timing:
    """Times of one candidate alone."""
    return alternate_bursts({"one": prepare(calls, device, graph)}, rounds, device)["one"]

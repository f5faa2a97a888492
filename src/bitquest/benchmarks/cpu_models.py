"""Whole models side by side in one run: ours at several schemes, plain torch, and llama.cpp where it is there."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bitquest.benchmarks.cpu_decode import Generating, PlainTorch, Runner
from bitquest.benchmarks.cpu_peers import Peers
from bitquest.benchmarks.cpu_random import float_llama, model_bytes, packed_llama
from bitquest.benchmarks.cpu_table import MODEL_SCHEMES, Case, Goal, Sizes
from bitquest.benchmarks.cpu_timing import Sampler, take_turns, times, torch_threads
from bitquest.models import LlamaConfig
from bitquest.models.fuse import fuse_
from bitquest.nn import Scheme

Say = Callable[[str], None]

FLOAT32_BLOCKS = 3  # blocks of the float32 model that have memory of their own: past any cache, at a third of the room
_SETTLE = 0.05  # seconds of rest before a sample, for threads of the other side that still spin
_PREFILL_SECONDS = 40.0  # of one candidate; then five rounds are enough


def measure_models(
    cases: Sequence[Case], sizes: Sizes, threads: Sequence[int], repetitions: int, peer_python: str, say: Say
) -> dict[str, Any]:
    """Decode and prefill of every model that the cases ask for, at each number of threads.

    Returns shapes and bytes, the peers' version or why there are none, and one row for each phase and thread count.
    Raises ConfigError for a Python that does not start.
    """
    config = LlamaConfig.preset(sizes.preset, vocab_size=sizes.vocabulary, max_position_embeddings=1024)
    schemes = {case.scheme: MODEL_SCHEMES[case.scheme] for case in cases}
    result: dict[str, Any] = {"preset": sizes.preset, "vocabulary": sizes.vocabulary, "models": {}, "rows": []}
    result["prompt"], result["decoded"] = sizes.prompt, sizes.decoded
    runners: dict[str, Runner] = {}
    with Peers(config, peer_python) as peers:
        result["peers"] = peers.info | ({"reason": peers.reason} if peers.reason else {})
        if peers.reason:
            say(f"llama.cpp {peers.reason}")
        for scheme, name in schemes.items():
            model = packed_llama(config, Scheme.parse(name))
            result["models"][scheme] = {"scheme": name, **model_bytes(model)}
            fuse_(model)
            runners[scheme] = Generating(model)
        for label, dtype in (("torch bf16", torch.bfloat16), ("torch float32", torch.float32)):
            plain = float_llama(config, dtype, FLOAT32_BLOCKS if dtype == torch.float32 else None)
            result["models"][label] = model_bytes(plain)
            runners[label] = PlainTorch(plain)
        runners |= peers.runners
        for name, size in peers.info.get("bytes", {}).items():
            result["models"][f"llama.cpp {name}"] = {"bytes": size}
        phases = [phase for phase in ("decode", "prefill") if any(case.kind == phase for case in cases)]
        for number in threads:
            peers.set_threads(number)
            with torch_threads(number):
                for phase in phases:
                    say(f"{phase}, {number} threads, {len(runners)} models")
                    seconds = _phase(phase, runners, sizes, repetitions)
                    result["rows"].append({"phase": phase, "threads": number, "seconds": seconds})
    for row in result["rows"]:
        each = sizes.prompt if row["phase"] == "prefill" else 1
        row["tokens_per_second"] = {name: each / s["median_seconds"] for name, s in row["seconds"].items()}
    return result


def _phase(phase: str, runners: Mapping[str, Runner], sizes: Sizes, repetitions: int) -> dict[str, Any]:
    samplers: dict[str, Sampler] = {}
    for name, runner in runners.items():
        if phase == "decode":
            samplers[name] = lambda runner=runner: runner.decode(sizes.decoded)  # type: ignore[misc]
        else:
            samplers[name] = lambda runner=runner: runner.prefill(sizes.prompt)  # type: ignore[misc]
    budget = _PREFILL_SECONDS * len(samplers) if phase == "prefill" else float("inf")
    return times(take_turns(samplers, repetitions, settle=_SETTLE, budget=budget))


def judge_model(case: Case, goal: Goal, row: Mapping[str, Any]) -> dict[str, Any]:
    """The speed-up of a case over a goal's baseline in one row, or why there is none."""
    measured = row["seconds"]
    names = [name for name in measured if _is_baseline(goal.against, name)]
    if not names:
        return {"reason": f"{goal.against} was not measured"}
    best = min(names, key=lambda name: measured[name]["median_seconds"])
    ours = measured[case.scheme]
    return {
        "baseline": best,
        "of_medians": measured[best]["median_seconds"] / ours["median_seconds"],
        "of_minima": min(measured[name]["minimum_seconds"] for name in names) / ours["minimum_seconds"],
    }


def _is_baseline(against: str, name: str) -> bool:
    prefixes = {"best of torch": "torch ", "llama.cpp, its best": "llama.cpp "}
    return name.startswith(prefixes[against]) if against in prefixes else name == against

"""Which block sizes a kernel runs with: measured once per shape on the GPU at hand, kept in memory and in a file.

A launcher lists candidates, the first of which is the rule-based default, and asks `best_config`. The first call for a
shape measures them (CUDA events, the L2 flushed between launches, the median of a few, ten seconds in all); later
calls look the answer up. Nothing is measured while a CUDA graph is captured, under Triton's interpreter, without a
GPU, or where the environment says BITQUEST_TUNE=0: the default runs then. This stands outside the jitted functions
because `@triton.autotune` needs a driver even under the interpreter.

The file is `tuning-<gpu>-<triton version>.json` in ~/.cache/bitquest, or in the folder that BITQUEST_CACHE names. It
may be deleted at any time. One that is damaged or was written for something else is ignored, with one warning.
"""

import fcntl
import json
import os
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

from bitquest.files import cache_folder, write_text_atomic

Key = tuple[int | str | bool, ...]

_FORMAT = "bitquest-tuning-1"
_SECONDS_PER_SHAPE = 10.0  # compiling included; after that the best so far is taken
_LAUNCHES = 7
_FLUSH_BYTES = 256 * 2**20  # more than any L2, so that weights come from memory as they do in a model


@dataclass(frozen=True)
class Config:
    """How one launch cuts its work.

    block_t, block_n, block_k: tokens, output channels and inner elements of a tile. warps and stages: Triton's
    num_warps and num_stages. group: rows of tiles that share a stripe of weights in the L2. split: programs that share
    one inner dimension. descriptors: tiles come through TMA descriptors (sm_90 and later). explicit: the kernel whose
    loop is scheduled by hand, where there is one.
    """

    block_t: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    group: int = 8
    split: int = 1
    descriptors: bool = False
    explicit: bool = False


def bucket(tokens: int) -> int:
    """The power of two at or above a number of tokens, so that a varying number does not measure anew each time."""
    return 1 << max(tokens - 1, 0).bit_length()


_best: dict[tuple[str, str, str], Config] = {}  # (gpu, kernel, key) -> what to run
_read: set[Path] = set()  # files read already in this process
_warned: set[str] = set()


def best_config(kernel: str, key: Key, candidates: Sequence[Config], run: Callable[[Config], object]) -> Config:
    """The candidate that is fastest for `key` on the current GPU, or the first one where nothing may be measured.

    kernel: a name that is unique among kernels. key: what the speed depends on (shape, types), plain values.
    candidates: at least one; the first is the default. run(config) launches the kernel once on the current stream; a
    candidate that it cannot launch is passed over.
    """
    default = candidates[0]
    if len(candidates) == 1 or not _may_tune():
        return default
    place = (_gpu_name(torch.cuda.current_device()), kernel, _key_text(key))
    if place not in _best:
        _read_file(_cache_file(place[0]), place[0])
    found = _best.get(place)
    if found is not None and found in candidates:  # a file of an older version may name one that is gone
        return found
    if torch.cuda.is_current_stream_capturing():
        return default
    chosen = _measure(candidates, run)
    if chosen is None:
        return default
    _best[place] = chosen
    _write_file(_cache_file(place[0]), place[0])
    return chosen


def forget() -> None:
    """Forget what this process has measured or read; files stay."""
    _best.clear()
    _read.clear()
    _warned.clear()


def _may_tune() -> bool:
    if os.environ.get("BITQUEST_TUNE", "1") == "0" or triton.knobs.runtime.interpret:
        return False
    return torch.cuda.is_available()


@lru_cache(maxsize=4096)
def _key_text(key: Key) -> str:
    return json.dumps(key)


@cache
def _gpu_name(device: int) -> str:
    return str(torch.cuda.get_device_name(device))


def _measure(candidates: Sequence[Config], run: Callable[[Config], object]) -> Config | None:
    """The candidate with the least median time, or None if none could be launched."""
    deadline = time.monotonic() + _SECONDS_PER_SHAPE
    times: dict[Config, float] = {}
    for config in candidates:
        if times and time.monotonic() > deadline:
            break
        try:
            times[config] = _median_ms(lambda config=config: run(config))  # type: ignore[misc]
        except (RuntimeError, triton.runtime.errors.TritonError):
            continue  # too much shared memory or too many registers for this GPU
    return min(times, key=lambda config: times[config]) if times else None


def _median_ms(launch: Callable[[], object]) -> float:
    """Milliseconds of one launch on the GPU, the L2 flushed before each."""
    launch()  # compiles
    try:
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    except torch.OutOfMemoryError:  # a full GPU: a smaller sweep is better than none
        flush = torch.empty(2**20, dtype=torch.int8, device="cuda")
    spans = []
    for _ in range(_LAUNCHES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        launch()
        end.record()
        spans.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in spans)


# --- the file ------------------------------------------------------------------------------------------------------


def _cache_file(gpu: str) -> Path:
    plain = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return cache_folder() / f"tuning-{plain}-{triton.__version__}.json"


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def _read_file(path: Path, gpu: str) -> None:
    """Take up what the file holds, once per process; what was measured here goes before it."""
    if path in _read:
        return
    _read.add(path)
    for place, config in _entries(path, gpu).items():
        _best.setdefault(place, config)


def _entries(path: Path, gpu: str) -> dict[tuple[str, str, str], Config]:
    """What a file holds; nothing, with a warning, if it is not one of ours for this GPU and this Triton."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT or content["gpu"] != gpu or content["triton"] != triton.__version__:
            raise ValueError("it was written for something else")
        return {
            (gpu, str(kernel), str(key)): _config(made)
            for kernel, made_by_key in content["kernels"].items()
            for key, made in made_by_key.items()
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _warn_once(
            f"the tuning file {path} cannot be used ({type(error).__name__}: {error}); measuring anew. Delete it to end"
            " this warning"
        )
        return {}


def _config(made: dict[str, Any]) -> Config:
    expected = {field.name: field.type for field in fields(Config)}
    if made.keys() != expected.keys() or any(type(made[name]) is not kind for name, kind in expected.items()):
        raise ValueError(f"not a configuration: {made!r}")
    return Config(**made)


def _write_file(path: Path, gpu: str) -> None:
    """Add what this process knows to the file, beside what others have added meanwhile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            kernels: dict[str, dict[str, Any]] = {}
            ours = {place: config for place, config in _best.items() if place[0] == gpu}
            for (_, kernel, key), config in (_entries(path, gpu) | ours).items():
                kernels.setdefault(kernel, {})[key] = asdict(config)
            content = {"format": _FORMAT, "gpu": gpu, "triton": triton.__version__, "kernels": kernels}
            write_text_atomic(path, json.dumps(content, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        _warn_once(
            f"the tuning file {path} cannot be written ({error}); every process will measure anew. Set BITQUEST_CACHE"
            " to a folder that can be written, or BITQUEST_TUNE=0"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes, such as the ranks of one run, which all finish measuring at about the same time."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

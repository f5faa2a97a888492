"""The machine's ceilings, measured: products a second by kind of number, bytes a second from memory and from the cache.

A C file of a few loops (cpu_ceilings.c) is compiled for this very processor if there is a compiler; without one,
torch's own products and sums stand in, which are lower and say so.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bitquest.benchmarks.cpu_table import Sizes
from bitquest.benchmarks.cpu_timing import WARM, last_level_cache, sampler, torch_threads

_SOURCE = Path(__file__).with_name("cpu_ceilings.c")
_REPEATS = 7  # the best of them: a ceiling is what nothing disturbed
_SECONDS = 0.02


def measure_ceilings(threads: int, sizes: Sizes) -> dict[str, Any]:
    """Products ("float32", "bf16", "int8", "one_bit") and bytes ("memory", "cache") a second on so many threads.

    A kind that the processor or the compiler has not is None. "how" says what was run.
    """
    with tempfile.TemporaryDirectory(prefix="bitquest-ceilings-") as folder:
        library = _compiled(Path(folder))
        if library is None:
            return {"threads": threads, "how": "torch: no C compiler was found", **_by_torch(threads, sizes)}
        found: dict[str, Any] = {"threads": threads, "how": "loops of one instruction, compiled for this processor"}
        for name in ("float32", "bf16", "int8", "one_bit"):
            loop = getattr(library, f"{name}_products")
            loop.restype, loop.argtypes = ctypes.c_double, [ctypes.c_int64]
            found[name] = _best(lambda _, rounds, loop=loop: loop(rounds), threads)  # type: ignore[misc]
        library.read_bytes.restype = ctypes.c_double
        library.read_bytes.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        # A quarter of the last-level cache is well inside it, and beyond the caches below.
        streamed = max(sizes.stream_bytes, 4 * last_level_cache())
        for name, size in (("memory", streamed), ("cache", last_level_cache() // 4)):
            data = torch.ones(size // 8, dtype=torch.int64)
            part = data.numel() // threads

            def read(thread: int, rounds: int, data: torch.Tensor = data, part: int = part) -> float:
                done: float = library.read_bytes(data.data_ptr() + 8 * part * thread, part, rounds)
                return done

            found[name] = _best(read, threads)
        return found


def _compiled(folder: Path) -> ctypes.CDLL | None:
    compiler = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        return None
    made = folder / "ceilings.so"
    words = [*compiler.split(), "-O3", "-march=native", "-shared", "-fPIC", str(_SOURCE), "-o", str(made)]
    try:
        subprocess.run(words, check=True, capture_output=True)
        return ctypes.CDLL(str(made))
    except (OSError, subprocess.CalledProcessError):
        return None


def _best(work: Callable[[int, int], float], threads: int) -> float | None:
    """The most a second of several runs of work(thread, rounds) on all threads at once; None if it does nothing."""
    if work(0, 1) == 0:
        return None
    rounds = 1
    while True:
        began = time.perf_counter()
        work(0, rounds)
        if time.perf_counter() - began > _SECONDS:
            break
        rounds *= 2
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_REPEATS):
            began = time.perf_counter()
            done = sum(pool.map(lambda thread: work(thread, rounds), range(threads)))
            best = max(best, done / (time.perf_counter() - began))
    return best


def _by_torch(threads: int, sizes: Sizes) -> dict[str, float | None]:
    side = sizes.ceiling
    a, b = torch.randn(side, side), torch.ones(side, side, dtype=torch.int8)
    c = a.to(torch.bfloat16)
    words = torch.ones(max(sizes.stream_bytes, 4 * last_level_cache()) // 4)
    few = words[: last_level_cache() // 16]

    def best(work: Callable[[], object]) -> float:
        sample = sampler([work], WARM, _SECONDS)
        return min(sample() for _ in range(_REPEATS))

    with torch_threads(threads):
        return {
            "float32": side**3 / best(lambda: a @ a),
            "bf16": side**3 / best(lambda: c @ c),
            "int8": side**3 / best(lambda: torch._int_mm(b, b)),
            "one_bit": None,
            "memory": 4 * words.numel() / best(words.sum),
            "cache": 4 * few.numel() / best(few.sum),
        }

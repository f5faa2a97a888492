"""One process that measures: a line of JSON for every row as soon as it is known.

The benchmark runs it as a process of its own (gpu.py), so that a kernel that hangs, or one that takes the device down,
costs one case and not the rest. Lines: {"device": …} first, {"begin": [rows]} before each job, then
{"row": name, "result": {…}}, {"end": [rows]} after it.
"""

import argparse
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bitquest.benchmarks.gpu_block import block
from bitquest.benchmarks.gpu_check import WrongResultError
from bitquest.benchmarks.gpu_context import Context, describe_device
from bitquest.benchmarks.gpu_floors import floors
from bitquest.benchmarks.gpu_layers import Emit, decode, prefill, square
from bitquest.benchmarks.gpu_step import step
from bitquest.benchmarks.gpu_table import JOBS, TINY, Job, Sizes
from bitquest.errors import ConfigError

Measure = Callable[[Job, Context, Emit], None]
KINDS: dict[str, Measure] = {
    "floors": floors,
    "prefill": prefill,
    "square": square,
    "decode": decode,
    "block": block,
    "step": step,
}


def say(**fields: Any) -> None:
    """One line on stdout, at once."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def run_job(job: Job, context: Context) -> bool:
    """Measure a job and say what came of it. False where the device can no longer be used by this process."""
    say(begin=list(job.rows))
    told: set[str] = set()

    def emit(row: str, result: dict[str, Any]) -> None:
        told.add(row)
        say(row=row, result={"status": "measured", **result})

    usable = True
    try:
        KINDS[job.kind](job, context, emit)
    except Exception as error:
        status = "failed"
        if isinstance(error, WrongResultError):
            status = "wrong"
        elif isinstance(error, ConfigError):
            status = "not measured"
        else:
            traceback.print_exc()
        reason = str(error).splitlines()[0] if str(error) else ""
        if status == "failed":
            reason = f"{type(error).__name__}: {reason}"
        for row in job.rows:
            if row not in told:
                say(row=row, result={"status": status, "reason": reason})
        usable = _device_answers(context)
    context.free()
    say(end=list(job.rows))
    return usable


def _device_answers(context: Context) -> bool:
    try:
        torch.zeros(1, device=context.device).add_(1).item()
    except RuntimeError:
        return False
    return True


def end_with_parent() -> None:
    """End this process, and what it started, when the process that started it is gone: a GPU is not left busy."""

    def watch() -> None:
        sys.stdin.read()
        os.killpg(0, signal.SIGKILL) if os.getpgrp() == os.getpid() else os._exit(4)

    threading.Thread(target=watch, daemon=True).start()


def main(words: Sequence[str] | None = None) -> int:
    """Run the jobs whose first rows are named. 0: all of them ended; 3: the device was lost on the way."""
    parser = argparse.ArgumentParser(prog="python -m bitquest.benchmarks.gpu_worker", description=__doc__)
    parser.add_argument("rows", nargs="+", help="first rows of jobs")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tiny", action="store_true", help="tiny data, for dry runs")
    parser.add_argument("--watch-stdin", action="store_true", help="end when stdin ends")
    chosen = parser.parse_args(words)
    if chosen.watch_stdin:
        end_with_parent()
    device = torch.device(chosen.device)
    sizes = TINY if chosen.tiny else Sizes()
    context = Context(device, chosen.backend, sizes, chosen.rounds)
    say(device=describe_device(device))
    for job in JOBS:
        if job.rows[0] in chosen.rows and not run_job(job, context):
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())

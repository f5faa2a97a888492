"""Runs at once, each its own process: starting them while there is room, watching, stopping, telling of deaths."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from bitquest.evaluation.compare_plan import Comparison, Run
from bitquest.evaluation.compare_runs import latest_step
from bitquest.training.loggers import Record

LOGS = "logs"
COMMAND = (sys.executable, "-m", "bitquest.evaluation.compare_worker")
_MIB = 2**20
# What a process takes of a GPU beside PyTorch's allocations: the CUDA context and the kernels' libraries.
_CONTEXT_MIB = 700


@dataclass
class Worker:
    """A process that makes a run, and where what it prints goes."""

    run: Run
    folder: Path
    log: Path
    process: subprocess.Popen[bytes]

    def latest(self) -> Record | None:
        """The last training record that it has logged."""
        return latest_step(self.folder)

    @property
    def failure(self) -> str | None:
        """What to tell of a worker that has ended otherwise than it should; None if all is well."""
        code = self.process.returncode
        if not code:
            return None
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"failed (exit code {code})"
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1].removeprefix("error: ") if lines else ""
        if code == -signal.SIGKILL:
            last = last or "perhaps the system was out of memory: fewer --jobs need less"
        return f"its process {how}" + (f": {last}" if last else "") + f". All it said is in {self.log}"


def start_worker(plan: Comparison, out: Path, run: Run, threads: int | None) -> Worker:
    """Start the process of a run. threads: how many it computes with, where neither the plan nor the shell says."""
    folder = out / plan.folder(run)
    log = out / LOGS / f"{folder.name}.log"
    log.parent.mkdir(exist_ok=True)
    environment = dict(os.environ)
    if threads is not None and plan.config(run).train.threads == 0:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    with log.open("wb") as file:
        # a session of its own: Ctrl-C reaches the comparison alone, which then stops its workers once
        process = subprocess.Popen(
            [*COMMAND, str(folder)],
            stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
    _feed(process.stdin, plan.config(run).to_toml())
    return Worker(run, folder, log, process)


def _feed(pipe: IO[bytes] | None, text: str) -> None:
    assert pipe is not None
    with suppress(BrokenPipeError), pipe:  # a process that is dead already is reported when it is looked at
        pipe.write(text.encode())


class Pool:
    """The workers of a comparison. Leaving it by an exception kills them; runs go on from their checkpoints.

    jobs: at most so many at once; None for as many as the GPU holds beside each other.
    """

    def __init__(self, plan: Comparison, out: Path, jobs: int | None) -> None:
        self._plan, self._out, self._jobs = plan, out, jobs
        self._cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers: list[Worker] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.process.kill()
            worker.process.wait()

    def has_room(self) -> bool:
        """Whether one more may start now."""
        if not self.workers:
            return True
        if self._jobs is not None:
            return len(self.workers) < self._jobs
        return len(self.workers) < self._cores and self._fits()

    def start(self, run: Run) -> None:
        """Start a run's process."""
        threads = max(1, self._cores // self._jobs) if self._jobs is not None else 1
        self.workers.append(start_worker(self._plan, self._out, run, threads))

    def stop(self) -> None:
        """Tell all workers to save and end, and wait for them."""
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.wait()

    def ended(self) -> list[Worker]:
        """The workers that have ended since the last call; they make room."""
        gone = [worker for worker in self.workers if worker.process.poll() is not None]
        self.workers = [worker for worker in self.workers if worker not in gone]
        return gone

    def _fits(self) -> bool:
        """Whether the GPU has room for a run as large as the largest one seen, once all that run have shown theirs."""
        import torch

        records = [worker.latest() for worker in self.workers]
        if any(record is None or record["step"] < 2 for record in records):
            return False
        largest = max(record["memory_mb"] for record in records if record is not None)
        free, _ = torch.cuda.mem_get_info()
        return bool(free > (1.2 * largest + _CONTEXT_MIB) * _MIB)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"

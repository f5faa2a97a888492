"""`bitquest bench gpu`: every row of the table within a budget of seconds, each job watched from outside.

A worker process measures (gpu_worker.py) and says each result as it comes. Where a job outlasts its limit the worker is
ended and a new one goes on with the next job, and likewise where the worker ends by itself: a kernel that hangs or
loses the device costs its own row. Jobs that the budget does not reach are reported as not measured.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from bitquest.benchmarks.gpu_table import JOBS, ROWS, Job
from bitquest.errors import ConfigError

OnRow = Callable[[str, dict[str, Any]], None]

_START_SECONDS = 60.0  # for a worker to load torch and find the device
_TICK_SECONDS = 0.5  # how often to look whether it is still there
_SHORTEST = 5.0  # with less of the budget left, no job is begun


@dataclass(frozen=True)
class Plan:
    """What to run, and how. `only` names rows (or "floors"); empty: all."""

    device: str = "cuda"
    backend: str = "auto"
    rounds: int = 20
    budget: float = 300.0
    tiny: bool = False
    only: tuple[str, ...] = ()

    def jobs(self) -> list[Job]:
        """The jobs in order. Raises ConfigError naming a row that does not exist."""
        known = ["floors", *ROWS]
        for name in self.only:
            if name not in known:
                raise ConfigError(f"there is no case {name!r}; there are {', '.join(known)}")
        return [job for job in JOBS if not self.only or set(job.rows) & set(self.only)]

    def command(self, jobs: Sequence[Job]) -> list[str]:
        """The worker that runs these jobs."""
        words = [sys.executable, "-m", "bitquest.benchmarks.gpu_worker", *(job.rows[0] for job in jobs)]
        words += ["--device", self.device, "--backend", self.backend, "--rounds", str(self.rounds), "--watch-stdin"]
        return [*words, "--tiny"] if self.tiny else words


@dataclass
class Bench:
    """Results so far: `device`, and for each row a status (measured, wrong, failed, not measured) with its figures."""

    plan: Plan
    on_row: OnRow
    device: dict[str, Any] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: float = 0.0

    def run(self) -> None:
        """Run the plan; whatever happens to the workers, every planned row has a result afterwards."""
        began = time.monotonic()
        left = self.plan.jobs()
        try:
            while left and self._left(began) > _SHORTEST:
                before = len(left)
                left = self._worker(left, began)
                if len(left) == before:  # it ended before its first job
                    reason = "the measuring process did not start; what it said is above"
                    self._report_missing(left.pop(0), "failed", reason)
        finally:
            self.seconds = time.monotonic() - began
            for job in left:
                reason = f"the budget of {self.plan.budget:g} s ended before"
                self._report_missing(job, "not measured", reason)

    def _left(self, began: float) -> float:
        return self.plan.budget - (time.monotonic() - began)

    def _worker(self, jobs: list[Job], began: float) -> list[Job]:
        """Run jobs in one process until it ends or has to be ended; the jobs that remain."""
        left, current, limit = list(jobs), None, _START_SECONDS
        worker = Worker(self.plan.command(jobs))
        until = time.monotonic() + min(limit, self._left(began))
        try:
            while True:
                said = worker.next(until)
                if said is None:
                    break
                if "begin" in said:
                    if self._left(began) < _SHORTEST:
                        return left
                    current = next(job for job in left if list(job.rows) == said["begin"])
                    limit = current.limit
                elif "row" in said:
                    self._take(said["row"], said["result"])
                    continue
                elif "end" in said:
                    assert current is not None
                    left.remove(current)
                    current, limit = None, _START_SECONDS
                else:
                    self.device = said["device"]
                until = time.monotonic() + min(limit, self._left(began))
        finally:
            code = worker.end()
        if current is not None:
            status, reason = "failed", f"the measuring process ended with {code}"
            if code is None:
                in_budget = self._left(began) > 0
                status = "failed" if in_budget else "not measured"
                reason = f"no answer within {limit:g} s" if in_budget else "the budget ended on the way"
            self._report_missing(current, status, reason)
            left.remove(current)
        return left

    def _take(self, row: str, result: dict[str, Any]) -> None:
        self.results[row] = result if row == "floors" else judged(row, result, not self.plan.tiny)
        self.on_row(row, self.results[row])

    def _report_missing(self, job: Job, status: str, reason: str) -> None:
        for row in job.rows:
            if row not in self.results:
                self._take(row, {"status": status, "reason": reason})
            elif row == "floors":
                self.results[row]["reason"] = f"not all of them: {reason}"

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values: the table's rows in its order."""
        floors = self.results.get("floors", {}).get("floors", {})
        for row, result in self.results.items():
            if row != "floors":
                add_floors(row, result, floors)
        return {
            "device": self.device,
            "dry_run": self.plan.tiny,
            "backend": self.plan.backend,
            "rounds": self.plan.rounds,
            "budget_seconds": self.plan.budget,
            "seconds": round(self.seconds, 1),
            "floors": floors,
            "cases": {row: self.results[row] for row in ROWS if row in self.results},
        }


class Worker:
    """A process that says JSON objects, one a line, and ends when this process does."""

    def __init__(self, command: list[str]) -> None:
        # A session of its own, so that what it starts is ended with it; it reads the end of stdin as our end.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        """Queue what it says; None at its end. A line that is no JSON object is somebody else's: on to stderr."""
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            for line in stdout:
                if line.startswith("{"):
                    self._lines.put(line)
                else:
                    sys.stderr.write(line)
        self._lines.put(None)

    def next(self, until: float) -> dict[str, Any] | None:
        """What it says next; None where it has ended, or says nothing before `until` on the monotonic clock."""
        while True:
            ended = self._process.poll() is not None
            wait = min(_TICK_SECONDS, until - time.monotonic())
            try:
                line = self._lines.get(timeout=max(0.0, wait))
            except queue.Empty:
                # Its own children may hold the pipe open after its end.
                if ended or time.monotonic() >= until:
                    return None
                continue
            if line is None:
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_TICK_SECONDS)
                return None
            said: dict[str, Any] = json.loads(line)
            return said

    def end(self) -> int | None:
        """End it and all it started. Its exit code if it ended by itself, else None."""
        code = self._process.poll()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        return code


def add_floors(row: str, result: dict[str, Any], floors: dict[str, Any]) -> None:
    """Add to each measured shape of a layer the least time that the measured hardware allows, and our share of it."""
    scheme = next(job.scheme for job in JOBS if row in job.rows)
    kind = "b1 " if scheme == "w1a1" else "s8 |_int_mm"
    rates = [
        floor["value"] * 1e12
        for name, floor in floors.items()
        if floor["value"] and any(part in name for part in kind.split("|"))
    ]
    bandwidth = (floors.get("copy") or {}).get("value")
    for measured in result.get("rows", ()):
        if "bytes" not in measured or not rates or not bandwidth:
            continue
        by_operations = measured["operations"] / max(rates) if measured["tokens"] > 1 else 0.0
        floor = max(by_operations, measured["bytes"] / (bandwidth * 1e9))
        measured["floor_seconds"] = floor
        measured["share_of_floor"] = floor / measured["ours"]["median_seconds"]


def judged(row: str, result: dict[str, Any], real: bool = True) -> dict[str, Any]:
    """A result with its targets and whether they were met: by the ratio of medians of the slowest shape."""
    case = ROWS[row]
    fields: dict[str, Any] = {
        "title": case.title,
        "against": case.against,
        "target": case.target,
        "beyond": case.beyond,
        "limit": case.limit,
    }
    ratios = [
        measured["ours"]["speedup_of_medians"]
        for measured in result.get("rows", ())
        if measured["memory"] == "past the L2"
    ]
    if ratios and real:
        slowest = min(ratios)
        fields["slowest"] = slowest
        fields["target_met"] = None if case.target is None else slowest >= case.target
        fields["beyond_met"] = None if case.beyond is None else slowest >= case.beyond
    return fields | result

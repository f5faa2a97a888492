"""Train arms, seeds and learning rates of one configuration, several at once, and report how their losses compare.

    DIR/compare.toml                 what is compared
        runs/w1a1-seed0/             a run directory each, as `bitquest train` writes it; diverged.json if it diverged
        runs/w1a1-lr0.004-seed0/     the same where learning rates are swept
        logs/w1a1-seed0.log          what a run's process printed, where several run at once
        results.json results.csv     the numbers, rewritten after every run
        report.html                  at the end

Runs with the same seed start from the same weights and see the same data in the same order, whatever their arm.
"""

import json
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch

from bitquest.errors import ConfigError, UserError
from bitquest.evaluation.compare_claims import require_scipy
from bitquest.evaluation.compare_file import check_same_plan
from bitquest.evaluation.compare_page import write_page
from bitquest.evaluation.compare_plan import PLAN, Comparison, Run
from bitquest.evaluation.compare_results import ComparisonResult, best_rates, summarize
from bitquest.evaluation.compare_runs import RunResult, check_run, is_held, make_run, read_result
from bitquest.evaluation.compare_workers import Pool
from bitquest.evaluation.figures import require_matplotlib
from bitquest.export import packed_sizes, save
from bitquest.files import write_text_atomic
from bitquest.models import Llama
from bitquest.nn import Scheme, quantize_
from bitquest.training import load_run, open_tokens
from bitquest.training.config import TrainConfig
from bitquest.training.loggers import Record
from bitquest.training.runs import check_free, claimed
from bitquest.training.step import choose_device
from bitquest.training.trainer import RunStart, TrainResult

REPORT, RESULTS, TABLE = "report.html", "results.json", "results.csv"
_POLL_S = 0.2  # between two looks at the processes of several runs at once


class CompareDisplay(Protocol):
    """Listens to a comparison."""

    def on_start(self, plan: Comparison, out: Path, jobs: int | None) -> None: ...
    def on_step(self, run: Run, step: int, loss: float) -> None: ...
    def on_result(self, result: RunResult) -> None: ...
    def on_failure(self, run: Run, message: str) -> None: ...
    def on_end(self) -> None: ...


def compare(
    plan: Comparison,
    out: str | Path,
    *,
    display: CompareDisplay | None = None,
    should_stop: Callable[[], bool] | None = None,
    commands: Sequence[str] = (),
) -> ComparisonResult:
    """Train what is left of a comparison in the directory `out`, and write its results and report.

    Finished runs are not repeated and interrupted ones go on. A run that diverges is recorded as such. One run at a
    time is made in this process, several (plan.jobs) in processes of their own; one of those that dies is told of in
    the result's `failures`, and the others go on. Once should_stop() is true the runs are saved and the result is not
    `finished`. commands: what the report says to do to get the same; the plain command unless given.

    Raises, before the first step, ConfigError (a directory of another comparison, a scheme that does not fit the
    model), DataError and MissingExtraError (matplotlib); later, with one run at a time, what a run raises besides
    divergence.
    """
    out = Path(out)
    require_matplotlib()
    require_scipy()
    check_plan(plan, out)
    jobs = jobs_of(plan)
    with claimed(out):
        write_text_atomic(out / PLAN, plan.to_toml())
        session = _Session(plan, out, display, should_stop)
        if display is not None:
            display.on_start(plan, out, jobs)
        try:
            session.take_what_is_there()
            session.one_by_one() if jobs == 1 else session.at_once(jobs)
        finally:
            if display is not None:
                display.on_end()
        result = session.summary()
        if not result.finished:
            return result
        result = session.summary(_packed(out, result))
        _write_results(out, result)
        write_page(
            out, out / REPORT, result, commands or (f"bitquest compare {shlex.quote(str(out / PLAN))} --out DIR",)
        )
    return result


def jobs_of(plan: Comparison) -> int | None:
    """Runs at once: the plan's number, or one on a CPU; None on a GPU: as many as fit."""
    if plan.jobs is not None:
        return plan.jobs
    return None if choose_device(plan.base.train.device).type == "cuda" else 1


class _Session:
    """One call of `compare`: results so far, runs that are left, runs that failed."""

    def __init__(
        self, plan: Comparison, out: Path, display: CompareDisplay | None, should_stop: Callable[[], bool] | None
    ) -> None:
        self._plan, self._out, self._display, self._should_stop = plan, out, display, should_stop
        self._results: dict[Run, RunResult] = {}
        self._failures: dict[Run, str] = {}

    def summary(self, packed: dict[str, dict[str, int]] | None = None) -> ComparisonResult:
        failures = {self._plan.label(run): message for run, message in self._failures.items()}
        return summarize(self._plan, list(self._results.values()), packed, failures)

    def take_what_is_there(self) -> None:
        """Read the runs that earlier calls have finished."""
        found = True
        while found:  # results of a sweep decide about further runs
            found = sum(self._take_old(run) for run in self._left()) > 0

    def one_by_one(self) -> None:
        while (run := next(iter(self._left()), None)) is not None and not self._stopping():
            listener = _Listener(self._display, run)
            make_run(self._plan.config(run), self._out / self._plan.folder(run), listener, self._should_stop)
            if not self._take(run):
                return

    def at_once(self, jobs: int | None) -> None:
        with Pool(self._plan, self._out, jobs) as pool:
            while True:
                if self._stopping():
                    pool.stop()
                running = {worker.run for worker in pool.workers}
                left = [run for run in self._left() if run not in running]
                ready = [run for run in left if not is_held(self._out / self._plan.folder(run))]
                while ready and pool.has_room() and not self._stopping():
                    pool.start(ready.pop(0))
                for worker in pool.ended():
                    self._ended(worker.run, worker.failure if not self._was_stopped(worker.process) else None)
                self._show(pool)
                if not pool.workers and (self._stopping() or not self._left()):
                    return
                time.sleep(_POLL_S)

    def _left(self) -> list[Run]:
        """Runs that are known to be wanted and are neither made nor failed."""
        plan = self._plan
        runs = [*plan.first_runs(), *plan.later_runs(best_rates(plan, self._results))]
        return [run for run in runs if run not in self._results and run not in self._failures]

    def _take_old(self, run: Run) -> bool:
        check_run(self._plan, self._out, run)
        return self._take(run)

    def _take(self, run: Run) -> bool:
        result = read_result(self._plan, self._out, run)
        if result is None:
            return False
        self._results[run] = result
        _write_results(self._out, self.summary())
        if self._display is not None:
            self._display.on_result(result)
        return True

    def _ended(self, run: Run, failure: str | None) -> None:
        try:
            if self._take(run) or (failure is None and self._stopping()):
                return
        except UserError as error:  # what one run left behind does not stop the others
            failure = failure or str(error)
        self._failures[run] = failure or "its process ended before the last step"
        if self._display is not None:
            self._display.on_failure(run, self._failures[run])

    def _was_stopped(self, process: "subprocess.Popen[bytes]") -> bool:
        # one that was told to stop before it could listen is ended by the signal itself
        return self._stopping() and process.returncode == -signal.SIGTERM

    def _show(self, pool: Pool) -> None:
        for worker in pool.workers:
            if self._display is not None and (record := worker.latest()) is not None:
                self._display.on_step(worker.run, record["step"], record["loss"])

    def _stopping(self) -> bool:
        return self._should_stop is not None and self._should_stop()


class _Listener:
    """Tells a comparison's display about the steps of a run in this process."""

    def __init__(self, display: CompareDisplay | None, run: Run) -> None:
        self._display, self._run = display, run

    def on_start(self, start: RunStart) -> None:
        pass

    def on_step(self, record: Record) -> None:
        if self._display is not None:
            self._display.on_step(self._run, record["step"], record["loss"])

    def on_evaluate(self, record: Record) -> None:
        pass

    def on_end(self, result: TrainResult | None) -> None:
        pass


def check_plan(plan: Comparison, out: Path) -> None:
    """Raise now, not hours later.

    DataError for the data, ConfigError for a scheme the model's widths do not allow and for a directory that holds
    something else.
    """
    for arm in plan.arms:
        _check_arm_fits(arm.config, arm.name)
    _check_directory(out, plan)


def _check_arm_fits(config: TrainConfig, name: str) -> None:
    tokens = open_tokens(Path(config.data.path), "train")
    open_tokens(Path(config.data.path), "val")
    if config.model.init_from is not None:
        return  # the shape is the checkpoint's, and every scheme meets it when its run begins
    shape = config.model.llama_config(tokens.vocab_size, config.data.context)
    with torch.device("meta"):
        model = Llama(shape)
        try:
            quantize_(model, Scheme.parse(config.scheme))
        except ConfigError as error:
            what = f"scheme {config.scheme}" if name == config.scheme else f"{name} ({config.scheme})"
            raise ConfigError(f"{what} does not fit the model: {error}") from None


def _check_directory(out: Path, plan: Comparison) -> None:
    if (out / PLAN).is_file():
        check_same_plan(out, plan)
    else:
        check_free(out, PLAN, "not a comparison", early="")


def _write_results(out: Path, result: ComparisonResult) -> None:
    write_text_atomic(out / RESULTS, json.dumps(result.to_json(), indent=1) + "\n")
    write_text_atomic(out / TABLE, result.to_csv())


def _packed(out: Path, result: ComparisonResult) -> dict[str, dict[str, int]]:
    """Packed sizes by arm, measured on its first good run; an arm that cannot be packed is left out."""
    sizes: dict[str, dict[str, int]] = {}
    for run in result.runs:
        if run.arm not in sizes and not run.diverged and not result.plan.is_map:
            with tempfile.TemporaryDirectory(dir=out, prefix=".packing-") as folder:
                try:
                    sizes[run.arm] = packed_sizes(save(load_run(out / run.run).model, Path(folder) / "packed"))
                except UserError:
                    continue
    return sizes

"""What a comparison would train, and how long that takes, from the runs that are there; nothing is trained."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitquest.evaluation.compare_plan import Comparison, Run
from bitquest.evaluation.compare_results import best_rates
from bitquest.evaluation.compare_runs import RunResult, is_held, latest_step, read_result
from bitquest.evaluation.report_page import Table
from bitquest.training.display import duration


@dataclass(frozen=True)
class Forecast:
    """Runs by what has become of them, and seconds of training left, all runs added up (None: unknown).

    statuses: every run that is known by now and its status: finished, unstable, diverged, running, waiting.
    chosen_later: runs at a best rate that a sweep has yet to find.
    """

    plan: Comparison
    statuses: dict[Run, str]
    chosen_later: int
    seconds: float | None

    def to_json(self) -> dict[str, Any]:
        """What --json prints."""
        runs = [
            {"arm": run.arm, "seed": run.seed, "rate": run.rate, "status": status, "run": self.plan.folder(run)}
            for run, status in self.statuses.items()
        ]
        return {
            "total_runs": self.plan.total_runs(),
            "runs": runs,
            "chosen_later": self.chosen_later,
            "seconds_left": self.seconds,
        }


def forecast(plan: Comparison, out: Path) -> Forecast:
    """Look at the directory of a comparison, which need not exist."""
    results: dict[Run, RunResult] = {}
    wanted = plan.first_runs()
    for run in wanted:
        if (result := read_result(plan, out, run)) is not None:
            results[run] = result
    later = plan.later_runs(best_rates(plan, results))
    for run in later:
        if (result := read_result(plan, out, run)) is not None:
            results[run] = result
    statuses = {run: _status(plan, out, run, results) for run in (*wanted, *later)}
    return Forecast(plan, statuses, plan.total_runs() - len(statuses), _seconds(plan, out, statuses, results))


def forecast_table(found: Forecast) -> Table:
    """A row per arm: its scheme, steps, and how many of its runs are in which status."""
    plan, each = found.plan, found.plan.total_runs() // len(found.plan.arms)
    rows = []
    for arm in plan.arms:
        own = [status for run, status in found.statuses.items() if run.arm == arm.key]
        over = sum(status in ("finished", "unstable", "diverged") for status in own)
        running = own.count("running")
        scheme = arm.scheme if len(arm.scheme) <= 24 else arm.stem
        rows.append((arm.name, scheme, f"{arm.config.train.steps}", str(each), str(over), str(running)))
    left = "unknown before the first run is made"
    if found.seconds is not None:
        left = duration(found.seconds)
        if plan.jobs is not None and plan.jobs > 1:
            left += f", by {plan.jobs} at once {duration(found.seconds / plan.jobs)}"
    note = f"{plan.total_runs()} runs in all; training time left: {left}."
    return Table(("arm", "scheme", "steps", "runs", "over", "running"), rows, note=note)


def _status(plan: Comparison, out: Path, run: Run, results: dict[Run, RunResult]) -> str:
    if run in results:
        return results[run].status
    return "running" if is_held(out / plan.folder(run)) else "waiting"


def _seconds(plan: Comparison, out: Path, statuses: dict[Run, str], results: dict[Run, RunResult]) -> float | None:
    """Steps left times seconds per step: the arm's own where it has been trained, else the mean of those that were.

    Evaluation, saving and the start of a process come on top.
    """
    paces: dict[str, list[float]] = {}
    for run, result in results.items():
        if result.step:
            paces.setdefault(run.arm, []).append(result.seconds / result.step)
    if not paces:
        return None
    own = {arm: sum(values) / len(values) for arm, values in paces.items()}
    average = sum(own.values()) / len(own)
    each = plan.total_runs() // len(plan.arms)
    seconds = 0.0
    for arm in plan.arms:
        runs = [run for run in statuses if run.arm == arm.key]
        left = (each - sum(run in results for run in runs)) * arm.config.train.steps
        for run in runs:
            if run not in results:
                left -= (latest_step(out / plan.folder(run)) or {"step": 0})["step"]
        seconds += left * own.get(arm.key, average)
    return seconds

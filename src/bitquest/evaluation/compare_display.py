"""What a person sees of a comparison while it runs: a bar over all steps, one per run under way, a line per result."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from bitquest.evaluation.compare_plan import Comparison, Run
from bitquest.evaluation.compare_runs import RunResult
from bitquest.training.display import duration

# Seconds between two lines about steps where there is no terminal.
_LINE_INTERVAL = 30.0


class ConsoleDisplay:
    """Live bars on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, line_interval: float = _LINE_INTERVAL) -> None:
        self._console, self._interval = console, line_interval
        self._last_line = time.monotonic()
        self._active: dict[Run, _Active] = {}
        self._paces: dict[str, float] = {}  # seconds per step of an arm's runs, evaluation and saving included
        self._done: dict[str, int] = {}  # runs that are over, by arm
        self._steps_done = 0
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"), console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def on_start(self, plan: Comparison, out: Path, jobs: int | None) -> None:
        """A comparison begins, or goes on."""
        self._plan, self._jobs = plan, jobs
        self._steps = {arm.key: arm.config.train.steps for arm in plan.arms}
        self._each = plan.total_runs() // len(plan.arms)
        rates = f" × {_count(plan.rates, 'rate')}" if plan.rates else ""
        steps = sorted(set(self._steps.values()))
        at_once = f", {jobs} at once" if jobs is not None and jobs > 1 else ", as many at once as fit" * (jobs is None)
        self._say(
            f"{out}: {_count(plan.arms, 'arm')}{rates} × {_count(plan.seeds, 'seed')} = "
            f"{_number(plan.total_runs(), 'run')} of {' or '.join(map(str, steps))} steps{at_once}; "
            "Ctrl-C stops, and the same command goes on"
        )
        self._task = self._bar.add_task("", total=self._each * sum(self._steps.values()), left="")
        self._bar.start()

    def on_step(self, run: Run, step: int, loss: float) -> None:
        """A run is at a step. It may be told again."""
        active = self._active.get(run)
        if active is None:
            active = self._active[run] = _Active(step, time.monotonic(), self._add_bar(run))
        if step > active.first:
            self._paces[run.arm] = (time.monotonic() - active.began) / (step - active.first)
        active.step = step
        text = f"{self._plan.label(run)}, loss {loss:.3f}"
        self._bar.update(active.task, completed=step, description="  " + escape(text))
        self._show_all()
        if not self._console.is_terminal and time.monotonic() - self._last_line >= self._interval:
            self._last_line, left = time.monotonic(), self._left()
            number = f"run {sum(self._done.values()) + 1} of {self._plan.total_runs()}"
            if len(self._active) > 1:
                number = (
                    f"{sum(self._done.values())} of {self._plan.total_runs()} runs over, {len(self._active)} under way"
                )
            self._say(f"{number}: {text}, step {step} of {self._steps[run.arm]}" + (f", {left}" if left else ""))

    def on_result(self, result: RunResult) -> None:
        """A run is finished, was finished before, or has diverged."""
        name = self._plan.label(result.key)
        if result.val_loss is None:
            self._say(f"{name}: diverged after step {result.step}")
        else:
            unstable = f", unstable: {result.message}" if result.status == "unstable" else ""
            self._say(f"{name}: {result.val_loss:.4f} nats per token in {duration(result.seconds)}{unstable}")
        self._over(result.key)

    def on_failure(self, run: Run, message: str) -> None:
        """A run could not be made."""
        self._say(f"{self._plan.label(run)}: {message}")
        self._over(run)

    def on_end(self) -> None:
        """No more runs."""
        self._bar.stop()

    def _add_bar(self, run: Run) -> TaskID:
        return self._bar.add_task("", total=self._steps[run.arm], left="")

    def _over(self, run: Run) -> None:
        active = self._active.pop(run, None)
        if active is not None:
            self._bar.remove_task(active.task)
        self._done[run.arm] = self._done.get(run.arm, 0) + 1
        self._steps_done += self._steps[run.arm]
        self._show_all()

    def _show_all(self) -> None:
        over = f"{sum(self._done.values())} of {self._plan.total_runs()} runs over"
        steps = self._steps_done + sum(active.step for active in self._active.values())
        self._bar.update(self._task, completed=steps, description=over, left=self._left())

    def _left(self) -> str:
        """Steps left times seconds per step: an arm's own pace where known, else the mean of those known."""
        if not self._paces:
            return ""
        average = sum(self._paces.values()) / len(self._paces)
        left = {arm: (self._each - self._done.get(arm, 0)) * steps for arm, steps in self._steps.items()}
        for run, active in self._active.items():
            left[run.arm] -= active.step
        seconds = sum(steps * self._paces.get(arm, average) for arm, steps in left.items())
        return f"{duration(seconds / max(1, self._jobs or len(self._active)))} left"

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)


class _Active:
    """A run under way: the first step seen and when, the last, and its bar."""

    def __init__(self, first: int, began: float, task: TaskID) -> None:
        self.first, self.began, self.task, self.step = first, began, task, first


def _count(things: Sequence[object], what: str) -> str:
    return _number(len(things), what)


def _number(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"

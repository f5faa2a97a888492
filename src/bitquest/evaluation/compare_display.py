"""What a person sees of a comparison while it runs: one bar over the steps of all runs, a line for every result."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from bitquest.evaluation.compare_plan import Comparison
from bitquest.evaluation.compare_results import RunResult
from bitquest.training.display import duration
from bitquest.training.loggers import Record
from bitquest.training.trainer import RunStart, TrainResult

# Seconds between two lines about steps where there is no terminal.
_LINE_INTERVAL = 30.0


class ConsoleDisplay:
    """A live bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, line_interval: float = _LINE_INTERVAL) -> None:
        self._console, self._interval = console, line_interval
        self._last_line = time.monotonic()
        self._rates: dict[str, float] = {}  # seconds per step of a scheme, evaluation and saving included
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"), console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def on_start(self, plan: Comparison, out: Path) -> None:
        """A comparison begins, or goes on."""
        self._plan, self._steps, self._runs = plan, plan.base.train.steps, plan.runs()
        self._say(
            f"{out}: {_count(plan.schemes, 'scheme')} × {_count(plan.seeds, 'seed')} = {_count(self._runs, 'run')} of "
            f"{self._steps} steps; Ctrl-C stops, and the same command goes on"
        )
        self._task = self._bar.add_task("", total=len(self._runs) * self._steps, left="")
        self._bar.start()

    def run(self, number: int, scheme: str, seed: int) -> "_RunDisplay":
        """The listener of a run."""
        return _RunDisplay(self, number)

    def on_result(self, result: RunResult) -> None:
        """A run is finished, was finished before, or has diverged."""
        name = f"{self._plan.name(result.scheme)}, seed {result.seed}"
        if result.val_loss is None:
            self._say(f"{name}: diverged after step {result.step}")
        else:
            self._say(f"{name}: {result.val_loss:.4f} nats per token in {duration(result.seconds)}")
        number = self._runs.index((result.scheme, result.seed))
        self._bar.update(self._task, completed=(number + 1) * self._steps)

    def on_end(self) -> None:
        """No more runs."""
        self._bar.stop()

    def show_step(self, number: int, step: int, loss: float, seconds_per_step: float) -> None:
        """A run has logged a step."""
        scheme, seed = self._runs[number]
        self._rates[scheme] = seconds_per_step
        left = f"{duration(self._seconds_left(number, step))} left"
        text = f"run {number + 1} of {len(self._runs)}: {self._plan.name(scheme)}, seed {seed}, loss {loss:.3f}"
        self._bar.update(self._task, completed=number * self._steps + step, description=escape(text), left=left)
        if not self._console.is_terminal and time.monotonic() - self._last_line >= self._interval:
            self._last_line = time.monotonic()
            self._say(f"{text}, step {step} of {self._steps}, {left}")

    def _seconds_left(self, number: int, step: int) -> float:
        """Steps left times seconds per step: a scheme's own where known, else the mean of those known."""
        average = sum(self._rates.values()) / len(self._rates)
        later = sum(self._rates.get(scheme, average) for scheme, _ in self._runs[number + 1 :])
        return (self._steps - step) * self._rates[self._runs[number][0]] + self._steps * later

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)


def _count(things: Sequence[object], what: str) -> str:
    return f"{len(things)} {what}{'s' * (len(things) != 1)}"


class _RunDisplay:
    """Tells a comparison's display about the steps of one run."""

    def __init__(self, owner: ConsoleDisplay, number: int) -> None:
        self._owner, self._number = owner, number

    def on_start(self, start: RunStart) -> None:
        self._first, self._began = start.step, time.monotonic()

    def on_step(self, record: Record) -> None:
        step = record["step"]
        rate = (time.monotonic() - self._began) / (step - self._first)
        self._owner.show_step(self._number, step, record["loss"], rate)

    def on_evaluate(self, record: Record) -> None:
        pass

    def on_end(self, result: TrainResult | None) -> None:
        pass

"""What a person sees of a run: a live panel on a terminal, a line now and then elsewhere."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from bitquest.training.config import TrainConfig
from bitquest.training.loggers import Record
from bitquest.training.trainer import Display, RunStart, TrainResult

# Seconds between two lines where there is no terminal.
_LINE_INTERVAL = 10.0


def make_display(console: Console) -> Display:
    """The live panel if the console is a terminal, lines otherwise."""
    return LiveDisplay(console) if console.is_terminal else LineDisplay(console)


class _Pace:
    """Time left, from the steps of this session so far, evaluation and saving included."""

    def __init__(self, start: RunStart) -> None:
        self.first, self.steps = start.step, start.config.train.steps
        self.began = time.monotonic()

    def left(self, step: int) -> str:
        done = step - self.first
        return duration((time.monotonic() - self.began) / done * (self.steps - step)) if done else "?"


def duration(seconds: float) -> str:
    """`7 s`, `3:05` minutes or `2:03:05` hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def _headline(start: RunStart) -> str:
    going_on = f", going on from step {start.step}" if start.step else ""
    return (
        f"{start.run_dir}: {start.config.scheme}, {start.parameters / 1e6:.2f}M parameters, "
        f"{start.config.train.steps} steps of {start.config.train.batch_size} × {start.config.data.context} tokens, "
        f"{start.precision} on {start.device}{going_on}"
    )


def _numbers(record: Record, left: str) -> dict[str, str]:
    return {
        "loss": f"{record['loss']:.4f}",
        "tokens/s": f"{record['tokens_per_s']:,.0f}",
        "left": left,
        "lr": f"{record['lr']:.2e}",
        "masked": f"{record['masked_share']:.2%}" if record["masked_share"] is not None else "-",
        "memory": f"{record['memory_mb']:,.0f} MiB",
    }


def _held_out(record: Record) -> str:
    return f"validation {record['loss']:.4f} nats/token, {record['bits_per_byte']:.4f} bits/byte"


def _looked(record: Record) -> str:
    """A look in a line; what it has no number for is left out."""
    parts = {
        "alignment, top to bottom": _series(record, "alignment_top", "alignment_bottom", form=".3f", between=" → "),
        "masked": _series(record, "masked_weights", "masked_inputs", form=".2%"),
        "error / optimum": _series(record, "excess_weights", "excess_inputs", form=".2f"),
        "flipped": _series(record, "flipped", form=".2%"),
        "returned": _series(record, "returned", form=".2%"),
    }
    return "look: " + ", ".join(f"{name} {value}" for name, value in parts.items() if value)


def _series(record: Record, *keys: str, form: str, between: str = " and ") -> str:
    return between.join(format(record[key], form) for key in keys if record[key] is not None)


class LineDisplay:
    """Plain lines: the start, at most one step in ten seconds, every evaluation and every look."""

    def __init__(self, console: Console, interval: float = _LINE_INTERVAL) -> None:
        self._console, self._interval = console, interval
        self._config: TrainConfig | None = None
        self._last = float("-inf")

    def on_start(self, start: RunStart) -> None:
        self._pace = _Pace(start)
        self._print(_headline(start))
        for notice in start.notices:
            self._print(f"notice: {notice}")

    def on_step(self, record: Record) -> None:
        if time.monotonic() - self._last >= self._interval or record["step"] == self._pace.steps:
            self._last = time.monotonic()
            numbers = ", ".join(f"{name} {value}" for name, value in _numbers(record, self._left(record)).items())
            self._print(f"step {record['step']}/{self._pace.steps}: {numbers}")

    def on_evaluate(self, record: Record) -> None:
        self._print(f"step {record['step']}/{self._pace.steps}: {_held_out(record)}")

    def on_diagnose(self, record: Record) -> None:
        self._print(f"step {record['step']}/{self._pace.steps}: {_looked(record)}")

    def on_end(self, result: TrainResult | None) -> None:
        pass

    def _left(self, record: Record) -> str:
        return self._pace.left(record["step"])

    def _print(self, text: str) -> None:
        self._console.print(escape(text), soft_wrap=True, highlight=False)


class LiveDisplay:
    """A bar and the current numbers, redrawn in place; evaluations and looks stay above as lines."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(),
            console=console,
        )  # fmt: skip
        self._record: Record | None = None
        self._live = Live(get_renderable=self._draw, console=console, refresh_per_second=4)

    def on_start(self, start: RunStart) -> None:
        self._pace = _Pace(start)
        self._console.print(escape(_headline(start)), highlight=False)
        for notice in start.notices:
            self._console.print(f"[yellow]notice:[/] {escape(notice)}", highlight=False)
        self._task = self._bar.add_task("", total=start.config.train.steps, completed=start.step)
        self._live.start()

    def on_step(self, record: Record) -> None:
        self._record = record
        self._left = self._pace.left(record["step"])
        self._bar.update(self._task, completed=record["step"])

    def on_evaluate(self, record: Record) -> None:
        self._console.print(f"step {record['step']}: {_held_out(record)}", highlight=False)

    def on_diagnose(self, record: Record) -> None:
        self._console.print(f"step {record['step']}: {_looked(record)}", highlight=False)

    def on_end(self, result: TrainResult | None) -> None:
        if self._live.is_started:
            self._live.stop()

    def _draw(self) -> Group:
        if self._record is None:
            return Group(self._bar, Text("first step …", style="dim"))
        table = Table.grid(padding=(0, 3))
        numbers = _numbers(self._record, self._left)
        table.add_row(*(Text(name, style="dim") for name in numbers))
        table.add_row(*(Text(value, style="bold") for value in numbers.values()))
        return Group(self._bar, table)

"""`bitquest demo`: from real prose to a packed 1-bit model that writes, in one go."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn

from bitquest.cli.console import err, print_json_object, print_table

if TYPE_CHECKING:
    from bitquest.training import Display


def command(
    out: Annotated[Path, typer.Option(help="Directory of the demo; report.html is written there.")] = Path("demo"),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of each model.", show_default="500")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON object on stdout.")] = False,
) -> None:
    """Train the same small Llama unquantized, at 4 and at 1 bit; pack, verify, measure. Stopped, it goes on."""
    from bitquest.demo.corpus import find_corpus
    from bitquest.demo.recipe import Recipe
    from bitquest.demo.stages import demo
    from bitquest.training.interrupt import stop_on_signals

    again = shlex.join(["bitquest", "demo", "--out", str(out), *(["--steps", str(steps)] if steps is not None else [])])
    listener = _Listener()
    with stop_on_signals() as stop:
        try:
            recipe = Recipe() if steps is None else Recipe(steps)
            result = demo(out, find_corpus(), listener, recipe=recipe, should_stop=stop)
        finally:
            listener.close()
    if result.interrupted:
        err.print(f"Stopped. Go on with:\n  {again}", soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(stop.exit_code)
    assert result.table is not None
    if json:
        print_json_object("demo", result.to_json())
    print_table(result.table)
    smallest = result.runs[-1]
    err.print(f"{smallest.name} writes:", style="bold")
    err.print(f"{smallest.prompt}{smallest.sample}\n", soft_wrap=True, highlight=False, markup=False)
    err.print(f"Written: {result.report}", soft_wrap=True, highlight=False, markup=False)
    if failed := ", ".join(run.name for run in result.runs if not run.verified):
        err.print(f"[bold red]error:[/] not the trained model, see {out}/measured: {failed}", soft_wrap=True)
        raise typer.Exit(1)


class _Listener:
    """A line for every stage, a bar for those that have a length, the trainer's own panel for runs."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def on_stage(self, text: str) -> None:
        self.close()
        err.print(f"[bold]{text}[/]", soft_wrap=True, highlight=False)

    def on_progress(self, what: str, done: int, total: int) -> None:
        if not err.is_terminal:
            return
        if self._bar is None:
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(), console=err, transient=True)
            self._bar.start()
            self._bar.add_task("")
        self._bar.update(self._bar.task_ids[0], description=what, completed=done, total=total or None)

    def run(self, name: str) -> "Display":
        from bitquest.training.display import make_display

        self.close()
        return make_display(err)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

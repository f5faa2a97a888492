"""`bitquest verify`: prove that a packed model computes what the trained one does."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitquest.cli.console import err, print_json_object

if TYPE_CHECKING:
    from bitquest.evaluation.verify_report import Check, VerifyReport


def command(
    run: Annotated[Path, typer.Argument(help="Run directory that `bitquest train` wrote.")],
    packed: Annotated[Path, typer.Argument(help="Packed model that `bitquest export` made of it.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Text or prepared data not trained on.", show_default="the run's validation split"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to run both models on.")] = 2048,
    texts: Annotated[int, typer.Option(min=1, help="Greedy texts to compare.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each greedy text.")] = 32,
    step: Annotated[
        int | None, typer.Option(help="Checkpoint to compare with.", show_default="the one that was packed")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run both models.")] = "cpu",
    backend: Annotated[str, typer.Option(help="Which code runs the packed layers; see bitquest doctor.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object on stdout.")] = False,
) -> None:
    """Compare a packed model with the run it came from, layer by layer. Exit code 1 if they are not the same."""
    from rich.progress import Progress

    from bitquest.evaluation.verify import verify

    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("", total=None)
        report = verify(
            run,
            packed,
            data,
            step=step,
            tokens=tokens,
            texts=texts,
            new_tokens=new_tokens,
            device=device,
            backend=backend,
            progress=lambda what, done, total: bar.update(
                task, description=what, completed=done, total=total if done else None
            ),
        )
    if json:
        print_json_object("verify", report.to_json())
    _show(report)
    if not report.passed:
        raise typer.Exit(1)


def _first_failure(check: "Check") -> str:
    """What fits on a screen; `--json` has the first few."""
    return check.failures[0] + (" (and more of that kind: --json)" if len(check.failures) > 1 else "")


def _show(report: "VerifyReport") -> None:
    from rich.markup import escape
    from rich.table import Table

    marks = {True: "[green]ok[/]", False: "[bold red]FAILED[/]", None: "[yellow]not run[/]"}
    table = Table(title=escape(f"{report.packed} against {report.run}, step {report.step}"), title_justify="left")
    for column in ("check", "", "found"):
        table.add_column(column, overflow="fold")
    if report.tables is not None:
        table.add_row("tables", "[yellow]rounded[/]", f"{report.tables}; below, the trained model's are rounded alike")
    for check in report.checks:
        found = check.summary if check.passed is not False else _first_failure(check)
        table.add_row(check.name, marks[check.passed], escape(found))
    err.print(table)
    if report.passed:
        what = "" if report.tables is None else f", its embedding and head {report.tables}"
        err.print(f"The packed model is the trained model{what}.", soft_wrap=True, highlight=False)
        return
    first = report.failed[0]
    err.print(
        f"[bold red]The packed model is not the trained one.[/] {escape(first.name)}: {escape(first.failures[0])}",
        soft_wrap=True,
        highlight=False,
    )

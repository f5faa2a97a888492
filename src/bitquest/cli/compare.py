"""`bitquest compare`: train one configuration under several schemes and seeds, and say how their losses compare."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from bitquest.cli.console import err, print_json_object, print_table


def command(
    config: Annotated[Path, typer.Argument(help="TOML: the trainer's keys and \\[compare]; see configs/compare/.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory of the runs and the report.", show_default="runs/<CONFIG's name>")
    ] = None,
    schemes: Annotated[str | None, typer.Option(help="Instead of the file's: none,w4a4,w1a1.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Instead of the file's: 0,1,2 or 0-19.")] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(
            help="What should hold, 'none<=w4a4<=w1a1' (inversions below two standard deviations pass) or "
            "'w1a1<w1a1-ste' (lower by more than two); exit code 1 if not. Repeatable."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. train.steps=100.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON object on stdout.")] = False,
) -> None:
    """Compare schemes: same model, data, order and budget, several seeds. Stopped, the same command goes on."""
    from bitquest.evaluation.compare import REPORT, RESULTS, TABLE, compare
    from bitquest.evaluation.compare_display import ConsoleDisplay
    from bitquest.evaluation.compare_plan import load_comparison
    from bitquest.evaluation.compare_results import results_table, verdicts_table
    from bitquest.training.interrupt import stop_on_signals

    plan = load_comparison(config, set_ or [], schemes=schemes, seeds=seeds, expect=expect or [])
    folder = out if out is not None else Path("runs") / _name(config)
    again = _command_line(config, folder, schemes, seeds, expect or [], set_ or [])
    with stop_on_signals() as stop:
        result = compare(plan, folder, display=ConsoleDisplay(err), should_stop=stop, commands=[again])
    if json:
        print_json_object("compare", {"out": str(folder), **result.to_json()})
    if result.runs:
        print_table(results_table(result, narrow=True))
    if not result.finished:
        _say(f"Stopped; {len(result.runs)} of {len(plan.runs())} runs are finished. Go on with:\n  {again}")
        raise typer.Exit(stop.exit_code)
    if result.verdicts:
        print_table(verdicts_table(result))
    _say(f"Written: {folder / REPORT}, {folder / RESULTS}, {folder / TABLE}")
    if not result.passed:
        failed = [str(verdict.expectation) for verdict in result.verdicts if not verdict.passed]
        _say(f"Not as expected: {'; '.join(failed)}")
        raise typer.Exit(1)


def _name(config: Path) -> str:
    """The comparison's name: the file's, or the directory's for a comparison's own compare.toml."""
    return config.absolute().parent.name if config.name == "compare.toml" else config.stem


def _command_line(
    config: Path, out: Path, schemes: str | None, seeds: str | None, expect: list[str], overrides: list[str]
) -> str:
    words = ["bitquest", "compare", str(config), "--out", str(out)]
    words += ["--schemes", schemes] if schemes is not None else []
    words += ["--seeds", seeds] if seeds is not None else []
    words += [word for chain in expect for word in ("--expect", chain)]
    words += [word for override in overrides for word in ("--set", override)]
    return shlex.join(words)


def _say(text: str) -> None:
    err.print(text, soft_wrap=True, highlight=False, markup=False)

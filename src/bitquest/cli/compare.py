"""`bitquest compare`: train one configuration under several schemes and seeds, and say how their losses compare."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitquest.cli.console import err, print_json_object, print_table

if TYPE_CHECKING:
    from bitquest.evaluation.compare_plan import Comparison


def command(
    config: Annotated[Path, typer.Argument(help="TOML: the trainer's keys and \\[compare]; see configs/compare/.")],
    out: Annotated[
        Path | None, typer.Option(help="Directory of the runs and the report.", show_default="runs/<CONFIG's name>")
    ] = None,
    schemes: Annotated[
        str | None, typer.Option(help="Instead of the file's: none,w4a4,w1a1, or names of its arms.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Instead of the file's: 0,1,2 or 0-19.")] = None,
    rates: Annotated[
        str | None, typer.Option(help="Learning rates that every arm is tried at, instead of the file's: 1e-3,4e-3.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at once, each its own process.", show_default="1; on a GPU as many as fit"),
    ] = None,
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be trained and how long it takes; train nothing.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON object on stdout.")] = False,
) -> None:
    """Compare arms: same model, data, order, budget and rates, several seeds. Stopped, the same command goes on."""
    from bitquest.evaluation.compare import REPORT, RESULTS, TABLE, compare
    from bitquest.evaluation.compare_display import ConsoleDisplay
    from bitquest.evaluation.compare_file import load_comparison
    from bitquest.evaluation.compare_map import map_table
    from bitquest.evaluation.compare_tables import results_table, verdicts_table, words_of
    from bitquest.training.interrupt import stop_on_signals

    options = {"schemes": schemes, "seeds": seeds, "rates": rates}
    plan = load_comparison(config, set_ or [], **options, jobs=jobs, expect=expect or [])
    folder = out if out is not None else Path("runs") / _name(config)
    if dry_run:
        _foretell(plan, folder, json)
        return
    again = _command_line(config, folder, options | {"jobs": jobs}, expect or [], set_ or [])
    with stop_on_signals() as stop:
        result = compare(plan, folder, display=ConsoleDisplay(err), should_stop=stop, commands=[again])
    if json:
        print_json_object("compare", {"out": str(folder), **result.to_json()})
    if result.runs:
        print_table(map_table(result) if plan.is_map else results_table(result, narrow=True))
    if result.failures and stop.signal is None:
        _say(f"{len(result.runs)} of {plan.total_runs()} runs are finished; these failed:")
        for run, why in result.failures.items():
            _say(f"  {run}: {why}")
        _say(f"The same command tries them again:\n  {again}")
        raise typer.Exit(1)
    if not result.finished:
        _say(f"Stopped; {len(result.runs)} of {plan.total_runs()} runs are finished. Go on with:\n  {again}")
        raise typer.Exit(stop.exit_code)
    if result.verdicts:
        print_table(verdicts_table(result, narrow=True))
    _say(f"Written: {folder / REPORT}, {folder / RESULTS}, {folder / TABLE}")
    if not result.passed:
        failed = [words_of(plan, verdict.expectation) for verdict in result.verdicts if not verdict.passed]
        _say(f"Not as expected: {'; '.join(failed)}")
        raise typer.Exit(1)


def _foretell(plan: "Comparison", folder: Path, json: bool) -> None:
    from bitquest.evaluation.compare import check_plan
    from bitquest.evaluation.compare_dry import forecast, forecast_table

    check_plan(plan, folder)
    found = forecast(plan, folder)
    if json:
        print_json_object("compare", {"out": str(folder), "dry_run": True, **found.to_json()})
    print_table(forecast_table(found))


def _name(config: Path) -> str:
    """The comparison's name: the file's, or the directory's for a comparison's own compare.toml."""
    return config.absolute().parent.name if config.name == "compare.toml" else config.stem


def _command_line(
    config: Path, out: Path, options: Mapping[str, object], expect: list[str], overrides: list[str]
) -> str:
    words = ["bitquest", "compare", str(config), "--out", str(out)]
    words += [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    words += [word for chain in expect for word in ("--expect", chain)]
    words += [word for override in overrides for word in ("--set", override)]
    return shlex.join(words)


def _say(text: str) -> None:
    err.print(text, soft_wrap=True, highlight=False, markup=False)

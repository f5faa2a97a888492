"""`bitquest scaling`: fit the law of size, data and format to runs, and draw it."""

from pathlib import Path
from typing import Annotated

import typer

from bitquest.cli.console import err, print_json_object, print_table
from bitquest.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Fit the scaling law to runs, and draw what follows from it.")

LEAST_SAMPLES = 50  # below, the ends of an interval are the extremes of the samples
_LAW = "A law that `bitquest scaling fit` wrote; without, the one fitted to the QuEST paper's runs."


@app.command("fit")
def fit(
    runs: Annotated[list[Path], typer.Argument(help="A CSV of runs, run directories, comparisons; several add up.")],
    out: Annotated[Path | None, typer.Option(help="Write the law here (JSON), for plot, plan and bench.")] = None,
    formats: Annotated[
        str | None, typer.Option(help="Only these, comma-separated.", show_default="all that there are")
    ] = None,
    reference: Annotated[str, typer.Option(help="The format whose eff is 1.")] = "bf16",
    hold: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Keep A, alpha, B, beta or E at a value instead. Repeatable."),
    ] = None,
    huber: Annotated[float, typer.Option(help="Log residuals beyond this count linearly.")] = 0.02,
    starts: Annotated[int, typer.Option(min=1, max=10_000, help="Starts of the fit.")] = 32,
    bootstrap: Annotated[int, typer.Option(min=0, max=100_000, help="Samples for the intervals; 0: none.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Of the starts and samples.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the law as one JSON object on stdout.")] = False,
) -> None:
    """Fit L = A/(N·eff(P))^α + B/D^β + E: robust least squares on log losses, intervals by bootstrap."""
    from rich.progress import Progress

    from bitquest.benchmarks.results import check_place
    from bitquest.evaluation.scaling_fit import fit_law
    from bitquest.evaluation.scaling_runs import read_runs
    from bitquest.evaluation.scaling_table import constants_table, formats_table, remarks

    if out is not None:
        check_place(out)
    if not huber > 0:
        raise ConfigError(f"--huber {huber:g}: must be above 0 (a large value is plain least squares)")
    if 0 < bootstrap < LEAST_SAMPLES:
        raise ConfigError(
            f"--bootstrap {bootstrap}: fewer than {LEAST_SAMPLES} samples make no 95 % interval; 0 for none"
        )
    found = read_runs(runs)
    chosen = found.runs
    if formats is not None:
        wanted = _named(formats, found.formats)
        chosen = tuple(run for run in chosen if run.format in (*wanted, reference))
    for note in found.notes:
        _say(note)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("fitting", total=bootstrap)
        law = fit_law(
            chosen,
            reference=reference,
            held=_held(hold or []),
            huber=huber,
            starts=starts,
            samples=bootstrap,
            seed=seed,
            about=", ".join(path.name or str(path) for path in runs),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if out is not None:
        law.save(out)
    if json:
        print_json_object("scaling fit", {"notes": found.notes, "law": law.to_json(samples=False)})
    print_table(constants_table(law))
    print_table(formats_table(law))
    for remark in remarks(law):
        _say(remark)
    if out is not None:
        _say(f"Written: {out}")


@app.command("plot")
def plot(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Runs to mark, as for fit; without --law, they are fitted first.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the page, the PNG and the CSV files.")] = Path("scaling"),
    law: Annotated[Path | None, typer.Option(help=_LAW)] = None,
    formats: Annotated[
        str | None, typer.Option(help="Which to draw, comma-separated.", show_default="rotated ones, the front first")
    ] = None,
    tokens_per_parameter: Annotated[float, typer.Option(min=0.01, help="Training tokens of the lines.")] = 100.0,
    vocabulary: Annotated[int, typer.Option(min=2, max=10_000_000, help="Words of token table and head.")] = 32_000,
    json: Annotated[bool, typer.Option("--json", help="Print what was written as one JSON object.")] = False,
) -> None:
    """Draw loss against size, size at a loss, efficiency per bit, loss at equal memory: HTML, PNG, CSV."""
    import shlex
    import sys

    from bitquest.evaluation.figures import SERIES, require_matplotlib
    from bitquest.evaluation.scaling_charts import Drawn
    from bitquest.evaluation.scaling_fit import fit_law
    from bitquest.evaluation.scaling_fitted import load_law
    from bitquest.evaluation.scaling_report import formats_to_draw, write_scaling_report
    from bitquest.evaluation.scaling_runs import read_runs

    require_matplotlib()
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: there is a file of this name; choose another folder with --out")
    found = read_runs(runs or [])
    if law is None and found.runs:
        fitted = fit_law(found.runs, about=", ".join(path.name or str(path) for path in runs or []))
    else:
        fitted = load_law(law)
    chosen = (
        formats_to_draw(fitted, tokens_per_parameter, vocabulary)
        if formats is None
        else _named(formats, tuple(fitted.efficiencies))
    )
    if len(chosen) > SERIES + 1:
        raise ConfigError(f"--formats {formats}: at most {SERIES + 1} can be told apart in a chart")
    drawn = Drawn(fitted, chosen, tokens_per_parameter, vocabulary)
    again = shlex.join(["bitquest", *sys.argv[1:]])
    with err.status("drawing"):
        written = write_scaling_report(out, drawn, found.runs, commands=[again])
    if json:
        print_json_object("scaling plot", {"written": [str(path) for path in written], "formats": chosen})
    if drawn.left_out:
        _say(drawn.left_out)
    _say(f"Written: {written[0]}, and {len(written) - 1} PNG and CSV files beside it")


def _named(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names or not set(names) <= set(known):
        raise ConfigError(f"--formats {text}: there are {', '.join(known)}")
    return names


def _held(words: list[str]) -> dict[str, float]:
    held = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            held[name.strip()] = float(text)
        except ValueError:
            raise ConfigError(f"--hold {word}: write NAME=VALUE, for example --hold beta=0.241") from None
    return held


def _say(text: str) -> None:
    err.print(text, soft_wrap=True, highlight=False, markup=False)

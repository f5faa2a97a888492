"""The page of a scaling law: its charts and tables in one file, and each chart as PNG and CSV beside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bitquest.evaluation import figures
from bitquest.evaluation import report_page as html
from bitquest.evaluation.charts import Chart, write_charts
from bitquest.evaluation.plan import size_text
from bitquest.evaluation.report import environment
from bitquest.evaluation.report_page import Table
from bitquest.evaluation.scaling_charts import Drawn, on_some_front, rotated, scaling_charts
from bitquest.evaluation.scaling_fitted import FittedLaw
from bitquest.evaluation.scaling_runs import ScalingRun
from bitquest.evaluation.scaling_table import constants_table, formats_table, remarks
from bitquest.files import write_text_atomic

PAGE = "scaling.html"
_TITLES = {
    "loss-against-size": "Loss against size",
    "size-at-loss": "Size at a loss",
    "efficiency": "Efficiency per bit",
    "equal-memory": "Loss at equal memory",
}


def formats_to_draw(law: FittedLaw, tokens_per_parameter: float = 100.0, vocabulary: int = 32_000) -> tuple[str, ...]:
    """The reference and as many rotated formats as there are colours: those on a front first, then by falling eff."""
    names = rotated(law)
    front = on_some_front(Drawn(law, names, tokens_per_parameter, vocabulary))
    rest = [name for name in names if name != law.reference]
    chosen = sorted(rest, key=lambda name: (name not in front, -law.efficiencies[name]))[: figures.SERIES]
    return (law.reference, *(name for name in rest if name in chosen))


def write_scaling_report(
    folder: Path, drawn: Drawn, runs: Sequence[ScalingRun] = (), *, commands: Sequence[str] = ()
) -> list[Path]:
    """Write the page and the charts' PNG and CSV files into a folder, which is made; the paths, the page first.

    Raises MissingExtraError without matplotlib, OSError naming a path.
    """
    charts = scaling_charts(drawn, runs)
    law = drawn.law
    sections = [
        *(
            html.section(
                _TITLES[chart.name],
                html.figure(chart.svg, chart.caption),
                html.table(front_table(chart)) if chart.name == "size-at-loss" else "",
            )
            for chart in charts
        ),
        html.section("The law", html.table(constants_table(law)), html.table(formats_table(law))),
        html.section("Do it again", html.commands(commands), html.facts("Environment", environment())),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / PAGE
    write_text_atomic(page, html.page("Scaling law", _summary(law, charts), sections))
    return [page, *write_charts(charts, folder)]


def front_table(chart: Chart) -> Table:
    """Which format has the lowest loss at which packed size, of the chart `size-at-loss`."""
    found: list[list[Any]] = []
    for bits, name, size, _, loss, on_front in sorted(chart.rows, key=lambda row: (-row[0], row[2])):
        if on_front == "yes" and found and found[-1][:2] == [bits, name]:
            found[-1][3], found[-1][5] = size, loss
        elif on_front == "yes":
            found.append([bits, name, size, size, loss, loss])
    rows = [
        (f"{bits} bits", name, f"{size_text(first)} to {size_text(last)}", f"{worst:.2f} to {best:.2f}")
        for bits, name, first, last, worst, best in found
    ]
    note = "Neighbours differ by less than the law's uncertainty; sizes are those of the drawn shapes."
    return Table(("tables", "format", "packed size", "loss"), rows, title="The lowest line", note=note)


def _summary(law: FittedLaw, charts: Sequence[Chart]) -> str:
    source = law.about.get("source")
    return (f"Fitted to {source}. " if source else "") + " ".join(remarks(law))

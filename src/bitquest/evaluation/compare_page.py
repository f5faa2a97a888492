"""The report of a comparison: one self-contained page, and its figures as PNG with their numbers as CSV."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from bitquest.evaluation.charts import Chart, write_charts
from bitquest.evaluation.compare_charts import arms_chart, curves_chart, rates_chart, sizes_chart
from bitquest.evaluation.compare_map import map_chart, map_table
from bitquest.evaluation.compare_results import ComparisonResult
from bitquest.evaluation.compare_tables import claims_table, results_table, verdicts_table
from bitquest.evaluation.report import write_report
from bitquest.evaluation.runs import RunSummary, read_run

FIGURES = "figures"


def write_page(out: Path, page: Path, result: ComparisonResult, commands: Sequence[str]) -> None:
    """Write the report of a finished comparison in `out` to `page`, and its figures into out/figures/."""
    plan = result.plan
    packed = {arm.arm: arm.packed_bytes for arm in result.arms}
    runs = [
        read_run(out / run.run, name=plan.name(run.arm), packed_bytes=packed[run.arm], diverged=run.diverged)
        for arm in result.arms
        for run in result.chosen(arm.arm)
    ]
    charts = charts_of(result, runs)
    write_charts([chart for drawn in charts.values() for chart in drawn], out / FIGURES)
    write_report(
        page,
        f"Comparison: {out.absolute().name}",
        runs,
        summary=_summary(result),
        results=map_table(result) if plan.is_map else results_table(result),
        tables=[
            *([verdicts_table(result)] if result.verdicts else []),
            *([claims_table(result)] if result.claims else []),
        ],
        commands=commands,
        charts=charts,
    )


def charts_of(result: ComparisonResult, runs: Sequence[RunSummary]) -> Mapping[str, Sequence[Chart]]:
    """The charts of a report by the title of their section; `runs` are those at the arms' best rates."""
    if result.plan.is_map:
        return {"Results": [map_chart(result)]}
    charts = {
        "Results": [arms_chart(result), rates_chart(result)],
        "Training": [curves_chart(runs)],
        "Size against loss": [sizes_chart(runs)],
    }
    return {title: [chart for chart in drawn if chart is not None] for title, drawn in charts.items()}


def _summary(result: ComparisonResult) -> str:
    plan = result.plan
    count, seeds, train = len(plan.arms), len(plan.seeds), plan.base.train
    what = f"{count} arms" if count > 1 else f"The arm {plan.arms[0].name}"
    rates = ", ".join(f"{rate:g}" for rate in plan.rates)
    if plan.is_map:
        swept = f" Every arm at the learning rates {rates}."
    elif plan.rates:
        swept = f" Every arm was tried at the learning rates {rates} with seed {plan.seeds[0]}" + (
            ", and trained at its best with the others." if seeds > 1 else "."
        )
    else:
        swept = ""
    return (
        f"{what}, {seeds} seed{'s' * (seeds > 1)}, {train.steps} steps of {train.batch_size} × "
        f"{plan.base.data.context} tokens each. Runs of one seed share initial weights and the order of the data."
        f"{swept}"
    )

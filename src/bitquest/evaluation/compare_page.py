"""The report of a comparison: one self-contained page."""

from collections.abc import Sequence
from pathlib import Path

from bitquest.evaluation.compare_results import ComparisonResult
from bitquest.evaluation.compare_tables import claims_table, results_table, verdicts_table
from bitquest.evaluation.report import write_report
from bitquest.evaluation.runs import read_run


def write_page(out: Path, page: Path, result: ComparisonResult, commands: Sequence[str]) -> None:
    """Write the report of a finished comparison in `out` to `page`."""
    plan = result.plan
    packed = {arm.arm: arm.packed_bytes for arm in result.arms}
    runs = [
        read_run(out / run.run, name=plan.name(run.arm), packed_bytes=packed[run.arm], diverged=run.diverged)
        for arm in result.arms
        for run in result.chosen(arm.arm)
    ]
    count, seeds, steps = len(plan.arms), len(plan.seeds), plan.base.train.steps
    what = f"{count} arms" if count > 1 else f"The arm {plan.arms[0].name}"
    swept = f" Learning rates {', '.join(f'{rate:g}' for rate in plan.rates)} for every arm." if plan.rates else ""
    write_report(
        page,
        f"Comparison: {out.absolute().name}",
        runs,
        summary=f"{what}, {seeds} seed{'s' * (seeds > 1)}, {steps} steps of {plan.base.train.batch_size} × "
        f"{plan.base.data.context} tokens each. Runs of one seed share initial weights and the order of the data."
        f"{swept}",
        results=results_table(result),
        tables=[
            *([verdicts_table(result)] if result.verdicts else []),
            *([claims_table(result)] if result.claims else []),
        ],
        commands=commands,
    )

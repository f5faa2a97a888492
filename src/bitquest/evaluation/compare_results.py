"""The numbers of a comparison: one result per run, statistics over seeds, verdicts; as JSON, CSV and tables."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bitquest.evaluation.compare_plan import Comparison
from bitquest.evaluation.ordering import Verdict, judge
from bitquest.evaluation.report_page import Table

FORMAT, VERSION = "bitquest-comparison", 1


@dataclass(frozen=True)
class RunResult:
    """One run: losses in nats per token and bits per UTF-8 byte (None if it diverged), seconds of training steps."""

    scheme: str
    seed: int
    diverged: bool
    step: int
    val_loss: float | None
    bits_per_byte: float | None
    seconds: float
    run: str
    message: str | None = None


@dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None of one value), least and greatest."""

    mean: float
    std: float | None
    min: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread | None":
        """The spread of some values, None of none."""
        if not values:
            return None
        std = statistics.stdev(values) if len(values) > 1 else None
        return Spread(statistics.fmean(values), std, min(values), max(values))


@dataclass(frozen=True)
class SchemeResult:
    """All runs of a scheme. The spreads are over its finished runs; `difference` is the mean of its loss less the
    unquantized model's of the same seed, None where that was not trained. packed_bytes: `bitquest.export.packed_sizes`.
    """

    scheme: str
    name: str
    runs: int
    diverged: int
    val_loss: Spread | None
    bits_per_byte: Spread | None
    difference: float | None
    seconds: Spread | None
    packed_bytes: dict[str, int] | None = None


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison found so far: `finished` says whether every run was made."""

    plan: Comparison
    runs: tuple[RunResult, ...]
    schemes: tuple[SchemeResult, ...]
    verdicts: tuple[Verdict, ...]
    finished: bool

    @property
    def passed(self) -> bool:
        """Whether every expectation holds (none holds before the comparison is finished)."""
        return self.finished and all(verdict.passed for verdict in self.verdicts)

    def to_json(self) -> dict[str, Any]:
        """The contents of results.json."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "finished": self.finished,
            "passed": self.passed if self.plan.expect else None,
            "config": self.plan.base.to_dict(),
            "schemes": [asdict(scheme) for scheme in self.schemes],
            "runs": [asdict(run) for run in self.runs],
            "expectations": [
                {
                    "expectation": str(verdict.expectation),
                    "passed": verdict.passed,
                    "difference": verdict.difference,
                    "pooled_std": verdict.deviation,
                    "reason": verdict.reason,
                }
                for verdict in self.verdicts
            ],
        }

    def to_csv(self) -> str:
        """The contents of results.csv: a row per run; a cell that has no number is empty."""
        columns = ["scheme", "seed", "status", "step", "val_loss", "bits_per_byte", "seconds", "run"]
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for run in self.runs:
            row = asdict(run) | {"status": "diverged" if run.diverged else "finished"}
            writer.writerow(["" if row[column] is None else row[column] for column in columns])
        return file.getvalue()


def summarize(
    plan: Comparison, runs: Sequence[RunResult], packed: dict[str, dict[str, int]] | None = None
) -> ComparisonResult:
    """Statistics of the runs made so far, and, when all are made, whether the expectations hold."""
    reference = {run.seed: run.val_loss for run in runs if run.scheme == "none" and run.val_loss is not None}
    schemes = []
    for scheme in plan.schemes:
        own = [run for run in runs if run.scheme == scheme]
        good = [run for run in own if not run.diverged]
        gaps = [
            run.val_loss - reference[run.seed] for run in good if run.val_loss is not None and run.seed in reference
        ]
        schemes.append(
            SchemeResult(
                scheme=scheme,
                name=plan.name(scheme),
                runs=len(own),
                diverged=len(own) - len(good),
                val_loss=Spread.of([run.val_loss for run in good if run.val_loss is not None]),
                bits_per_byte=Spread.of([run.bits_per_byte for run in good if run.bits_per_byte is not None]),
                difference=statistics.fmean(gaps) if gaps else None,
                seconds=Spread.of([run.seconds for run in good]),
                packed_bytes=(packed or {}).get(scheme),
            )
        )
    finished = len(runs) == len(plan.runs())
    losses = {
        scheme: [run.val_loss if run.val_loss is not None else math.inf for run in runs if run.scheme == scheme]
        for scheme in plan.schemes
    }
    verdicts = tuple(judge(pair, losses) for pair in plan.expectations()) if finished else ()
    return ComparisonResult(plan, tuple(runs), tuple(schemes), verdicts, finished)


def results_table(result: ComparisonResult, *, narrow: bool = False) -> Table:
    """A row per scheme: what of divergences, losses, size and time there is to say.

    narrow: for a terminal, without what only the spread of a single scheme is looked at for.
    """
    schemes, several = result.schemes, len(result.plan.seeds) > 1
    columns: dict[str, list[str]] = {
        "scheme": [scheme.name for scheme in schemes],
        "diverged": [f"{s.diverged} of {s.runs}" for s in schemes],
        "validation loss": [_spread(s.val_loss) for s in schemes],
    }
    if several and (len(schemes) == 1 or not narrow):
        columns["least"] = [_number(s.val_loss.min if s.val_loss else None) for s in schemes]
        columns["greatest"] = [_number(s.val_loss.max if s.val_loss else None) for s in schemes]
    notes = ["losses in nats per token" + (", mean ± standard deviation over seeds" if several else "")]
    if any(s.difference is not None and s.scheme != "none" for s in schemes):
        columns["difference"] = [_number(s.difference, "+.4f") for s in schemes]
        notes.append("differences to the unquantized model with the same seeds")
    columns["bits per byte"] = [_number(s.bits_per_byte.mean if s.bits_per_byte else None) for s in schemes]
    if any(s.packed_bytes for s in schemes):
        columns["MB packed"] = [
            _number(s.packed_bytes["total_bytes"] / 1e6 if s.packed_bytes else None, ".2f") for s in schemes
        ]
    columns["seconds"] = [_number(s.seconds.mean if s.seconds else None, ",.1f") for s in schemes]
    note = "; ".join(notes)
    return Table(tuple(columns), tuple(zip(*columns.values(), strict=True)), note=note[0].upper() + note[1:] + ".")


def verdicts_table(result: ComparisonResult) -> Table:
    """A row per expectation."""
    rows = [
        (str(v.expectation), "passed" if v.passed else "failed", _number(v.difference, "+.4f"), v.reason)
        for v in result.verdicts
    ]
    note = "Inversions below two standard deviations, pooled over the seeds of the pair, pass a <=."
    return Table(("expectation", "verdict", "difference", "why"), rows, title="Expectations", note=note)


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "–"
    return f"{spread.mean:.4f}" if spread.std is None else f"{spread.mean:.4f} ± {spread.std:.4f}"


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)

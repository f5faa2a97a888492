"""The numbers of a comparison: one result per run, statistics over seeds, verdicts; as JSON and CSV."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bitquest.evaluation.compare_plan import Comparison, Run
from bitquest.evaluation.compare_runs import RunResult
from bitquest.evaluation.ordering import Verdict, judge

FORMAT, VERSION = "bitquest-comparison", 2


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
class ArmResult:
    """An arm's runs at its best rate (or all, without a sweep). The spreads are over those that did not diverge.

    rate: the best rate, None without a sweep or before it is known; at_edge: it is the least or greatest of several
    that were tried, so a better one may lie outside. difference: the mean of its loss less the unquantized arm's of the
    same seed, None where that was not trained. packed_bytes: `bitquest.export.packed_sizes`.
    """

    arm: str
    scheme: str
    name: str
    rate: float | None
    at_edge: bool
    runs: int
    diverged: int
    unstable: int
    val_loss: Spread | None
    bits_per_byte: Spread | None
    difference: float | None
    seconds: Spread | None
    packed_bytes: dict[str, int] | None = None


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison found so far: `finished` says whether every run was made.

    failures: by run, why those could not be made whose process died.
    """

    plan: Comparison
    runs: tuple[RunResult, ...]
    arms: tuple[ArmResult, ...]
    verdicts: tuple[Verdict, ...]
    finished: bool
    failures: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every expectation holds (none holds before the comparison is finished)."""
        return self.finished and all(verdict.passed for verdict in self.verdicts)

    def chosen(self, arm: str) -> list[RunResult]:
        """The runs that an arm's statistics are about: those at its best rate, one per seed."""
        rate = next(result.rate for result in self.arms if result.arm == arm)
        return [run for run in self.runs if run.arm == arm and (self.plan.is_map or run.rate == rate)]

    def to_json(self) -> dict[str, Any]:
        """The contents of results.json."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "finished": self.finished,
            "passed": self.passed if self.plan.expect else None,
            "config": self.plan.base.to_dict(),
            "rates": list(self.plan.rates),
            "map": self.plan.is_map,
            "arms": [asdict(arm) | {"set": list(self.plan.arm(arm.arm).overrides)} for arm in self.arms],
            "runs": [asdict(run) | {"diverged": run.diverged} for run in self.runs],
            "failures": dict(self.failures),
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
        columns = [
            "arm", "scheme", "seed", "rate", "status", "step", "val_loss", "bits_per_byte", "seconds", "run",
        ]  # fmt: skip
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for run in self.runs:
            row = asdict(run)
            writer.writerow(["" if row[column] is None else row[column] for column in columns])
        return file.getvalue()


def best_rates(plan: Comparison, results: Mapping[Run, RunResult]) -> dict[str, float]:
    """The best rate of every arm whose sweep on the first seed is complete.

    It is that of the lowest validation loss among the runs that stayed stable, or else among the unstable ones; where
    all diverged, the lowest rate, so that the other seeds show whether that was chance.
    """
    best: dict[str, float] = {}
    for arm in plan.keys if plan.rates and not plan.is_map else ():
        sweep = [results.get(Run(arm, plan.seeds[0], rate)) for rate in plan.rates]
        done = [run for run in sweep if run is not None]
        if len(done) == len(plan.rates):
            best[arm] = min(zip(plan.rates, done, strict=True), key=lambda pair: (*_rank(pair[1]), pair[0]))[0]
    return best


def _rank(run: RunResult) -> tuple[int, float]:
    return ("finished", "unstable", "diverged").index(run.status), run.val_loss if run.val_loss is not None else 0.0


def summarize(
    plan: Comparison,
    runs: Iterable[RunResult],
    packed: Mapping[str, dict[str, int]] | None = None,
    failures: Mapping[str, str] | None = None,
) -> ComparisonResult:
    """Statistics of the runs made so far, and, when all are made, whether the expectations hold."""
    by_run = {run.key: run for run in runs}
    best = best_rates(plan, by_run)
    order = [*plan.first_runs(), *plan.later_runs(best)]
    made = tuple(by_run[run] for run in order if run in by_run)
    chosen = {
        key: [run for run in made if run.arm == key and (not plan.rates or plan.is_map or run.rate == best.get(key))]
        for key in plan.keys
    }
    reference = {
        (run.seed, run.rate if plan.is_map else None): run.val_loss
        for run in chosen.get("none") or next((chosen[arm.key] for arm in plan.arms if arm.scheme == "none"), [])
        if run.val_loss is not None
    }
    arms = []
    for arm in plan.arms:
        own = chosen[arm.key]
        good = [run for run in own if run.val_loss is not None]
        gaps = [
            run.val_loss - reference[key]
            for run in good
            if run.val_loss is not None and (key := (run.seed, run.rate if plan.is_map else None)) in reference
        ]
        rate = best.get(arm.key)
        arms.append(
            ArmResult(
                arm=arm.key,
                scheme=arm.scheme,
                name=arm.name,
                rate=rate,
                at_edge=len(plan.rates) > 1 and rate in (min(plan.rates), max(plan.rates)),
                runs=len(own),
                diverged=sum(run.diverged for run in own),
                unstable=sum(run.status == "unstable" for run in own),
                val_loss=Spread.of([run.val_loss for run in good if run.val_loss is not None]),
                bits_per_byte=Spread.of([run.bits_per_byte for run in good if run.bits_per_byte is not None]),
                difference=statistics.fmean(gaps) if gaps else None,
                seconds=Spread.of([run.seconds for run in good]),
                packed_bytes=(packed or {}).get(arm.key),
            )
        )
    finished = len(made) == plan.total_runs()
    losses = {key: [math.inf if run.val_loss is None else run.val_loss for run in own] for key, own in chosen.items()}
    verdicts = tuple(judge(pair, losses) for pair in plan.expectations()) if finished else ()
    return ComparisonResult(plan, made, tuple(arms), verdicts, finished, failures or {})

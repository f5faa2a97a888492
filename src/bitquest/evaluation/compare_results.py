"""The numbers of a comparison: one result per run, statistics over seeds, verdicts; as JSON and CSV."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import combinations
from typing import Any

from bitquest.evaluation.compare_claims import Claim, claim
from bitquest.evaluation.compare_plan import Arm, Comparison, Run
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
    that were tried, so a better one may lie outside. difference, interval: its mean loss less that of the unquantized
    arm of the same model, data and, if there is one, recipe, and the 95 % interval (compare_claims.py); None without
    such an arm. packed_bytes: `bitquest.export.packed_sizes`.
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
    interval: tuple[float, float] | None
    seconds: Spread | None
    packed_bytes: dict[str, int] | None = None


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison found so far: `finished` says whether every run was made.

    claims: the difference of every pair of arms. failures: by run, why those could not be made whose process died.
    """

    plan: Comparison
    runs: tuple[RunResult, ...]
    arms: tuple[ArmResult, ...]
    verdicts: tuple[Verdict, ...]
    claims: tuple[Claim, ...]
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
            "claims": [asdict(claim) | {"separable": claim.separable} for claim in self.claims],
            "expectations": [
                {
                    "expectation": str(verdict.expectation),
                    "passed": verdict.passed,
                    "difference": verdict.difference,
                    "pooled_std": verdict.deviation,
                    "interval": None if verdict.claim is None else [verdict.claim.low, verdict.claim.high],
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
    losses = {key: {run.seed: run.val_loss for run in own if run.val_loss is not None} for key, own in chosen.items()}
    arms = []
    for arm in plan.arms:
        own = chosen[arm.key]
        good = [run for run in own if run.val_loss is not None]
        other = _reference(plan, arm)
        gap = claim(other, arm.key, losses) if other is not None else None
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
                difference=gap.difference if gap is not None else None,
                interval=gap.bounds if gap is not None else None,
                seconds=Spread.of([run.seconds for run in good]),
                packed_bytes=(packed or {}).get(arm.key),
            )
        )
    finished = len(made) == plan.total_runs()
    verdicts = tuple(_verdicts(plan, chosen)) if finished else ()
    claims = tuple(claim(a.key, b.key, losses) for a, b in combinations(plan.arms, 2) if not plan.is_map)
    return ComparisonResult(plan, made, tuple(arms), verdicts, claims, finished, failures or {})


def _verdicts(plan: Comparison, chosen: Mapping[str, Sequence[RunResult]]) -> Iterator[Verdict]:
    losses = {
        key: {run.seed: math.inf if run.val_loss is None else run.val_loss for run in own}
        for key, own in chosen.items()
    }
    strict = {
        key: {run.seed: losses[key][run.seed] if run.status == "finished" else math.inf for run in own}
        for key, own in chosen.items()
    }
    for pair in plan.expectations():
        yield judge(pair, strict if pair.second is None else losses)


def _reference(plan: Comparison, arm: Arm) -> str | None:
    """The unquantized arm to hold an arm against: alike but for the scheme, or else of the same model and data."""
    if plan.is_map:
        return None
    candidates = [other for other in plan.arms if other.scheme == "none"]
    alike = [other for other in candidates if replace(other.config, scheme=arm.scheme) == arm.config]
    near = [o for o in candidates if (o.config.model, o.config.data) == (arm.config.model, arm.config.data)]
    return next((other.key for other in (*alike, *near)), None)

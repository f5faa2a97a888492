"""`bitquest bench cpu`: what to measure, in which order, and whether the targets were met.

Everything is timed in one run, candidates taking turns; each case is checked against the definition before.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitquest.benchmarks.cpu_ceilings import measure_ceilings
from bitquest.benchmarks.cpu_check import WrongResultError
from bitquest.benchmarks.cpu_layers import measure_layer, measure_row
from bitquest.benchmarks.cpu_models import judge_model, measure_models
from bitquest.benchmarks.cpu_table import QUICK, ROW_SECONDS, ROW_TOKENS, Case, Goal, Sizes, chosen
from bitquest.benchmarks.cpu_timing import WARM, thread_counts, torch_threads
from bitquest.benchmarks.cpu_training import measure_memory, measure_step
from bitquest.benchmarks.train_step import StepShape
from bitquest.ops.backend import Backend, backend_report

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What to run, and how. `only` names cases or groups; empty: all. peers: the Python of llama-cpp-python."""

    only: tuple[str, ...] = ()
    threads: tuple[int, ...] = (1, 2)
    repetitions: int = 20
    quick: bool = False
    peers: str = ""
    ceilings: bool = False

    @property
    def sizes(self) -> Sizes:
        return QUICK if self.quick else Sizes()

    def cases(self) -> list[Case]:
        """The cases in order. Raises ConfigError naming one that does not exist."""
        return chosen(self.only)


@dataclass
class Bench:
    """Results so far. `say` is told what is being measured, `on_case` each case's result as it comes."""

    plan: Plan
    say: Say
    on_case: Callable[[str, dict[str, Any]], None]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    ceilings: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> None:
        """Measure every case; one that computes something else is reported as wrong, and has no speed."""
        threads, sizes = thread_counts(self.plan.threads), self.plan.sizes
        cases = self.plan.cases()
        if self.plan.ceilings:
            self.say("the machine's ceilings")
            self.ceilings = [measure_ceilings(number, sizes) for number in threads]
        for case in cases:
            if case.kind in ("layer", "row", "step", "memory"):
                self.say(case.title)
                self._take(case, self._measured(case, threads))
        whole = [case for case in cases if case.kind in ("decode", "prefill")]
        if whole:
            self.models = measure_models(whole, sizes, threads, self.plan.repetitions, self.plan.peers, self.say)
            for case in whole:
                rows = [row for row in self.models["rows"] if row["phase"] == case.kind]
                found = [
                    {"threads": row["threads"], "goals": [judge_model(case, goal, row) for goal in case.goals]}
                    for row in rows
                ]
                self._take(case, {"status": "measured", "rows": found})

    def _measured(self, case: Case, threads: Sequence[int]) -> dict[str, Any]:
        rows: list[dict[str, Any]] = []
        counts = threads[:1] if case.kind in ("row", "memory") else threads
        try:
            for number in counts:
                with torch_threads(number):
                    rows.append({"threads": number, **self._one(case)})
        except (WrongResultError, RuntimeError) as error:
            return {"status": "wrong", "reason": str(error)}
        return {"status": "measured", "rows": rows}

    def _one(self, case: Case) -> dict[str, Any]:
        sizes, repetitions = self.plan.sizes, self.plan.repetitions
        if case.kind == "layer":
            return measure_layer(case, sizes, repetitions)
        if case.kind == "row":
            return measure_row(case, sizes, repetitions, ROW_TOKENS)
        if case.kind == "memory":
            return measure_memory(case.scheme, sizes.step_width)
        shape = StepShape(sizes.step_width, sizes.step_layers, sizes.step_batch, sizes.step_context)
        return measure_step(case.scheme, shape, repetitions)

    def _take(self, case: Case, result: dict[str, Any]) -> None:
        self.results[case.name] = judged(case, result, not self.plan.quick)
        self.on_case(case.name, self.results[case.name])

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "quick": self.plan.quick,
            "sizes": vars(self.plan.sizes),
            "repetitions": self.plan.repetitions,
            "threads": thread_counts(self.plan.threads),
            "native_engine": next(report.reason for report in backend_report() if report.name == Backend.NATIVE),
            "ceilings": self.ceilings,
            "models": self.models,
            "cases": self.results,
        }


def judged(case: Case, result: dict[str, Any], real: bool = True) -> dict[str, Any]:
    """A result with its goals: what was reached (most threads, weights warm, by medians), and whether it suffices."""
    goals = case.goals
    if case.kind == "row":
        goals = (Goal("seconds", *ROW_SECONDS),)
    found = []
    for number, goal in enumerate(goals):
        measured = result["status"] == "measured"
        reached, baseline = _reached(case, result, number) if measured else (None, goal.against)
        verdict: dict[str, Any] = {"against": baseline, "target": goal.target, "beyond": goal.beyond}
        verdict["reached"] = reached
        if real and reached is not None:
            verdict["target_met"] = _suffices(case, reached, goal.target)
            verdict["beyond_met"] = _suffices(case, reached, goal.beyond)
        found.append(verdict)
    return {"title": case.title, "kind": case.kind, "goals": found, **result}


def _suffices(case: Case, reached: float, wanted: float | None) -> bool | None:
    if wanted is None:
        return None
    return reached <= wanted if case.kind == "row" else reached >= wanted


def _reached(case: Case, result: Mapping[str, Any], number: int) -> tuple[float | None, str]:
    """The figure that a goal is about, and the baseline it was measured against."""
    last = result["rows"][-1]
    against = case.goals[number].against if case.goals else "seconds"
    if case.kind == "layer":
        warm = next(row for row in last["rows"] if row["memory"] == WARM)
        speed = warm["speedup"]
        return (speed["engine"] if "engine" in speed else speed["layer"])["of_medians"], against
    if case.kind == "row":
        return last["seconds"]["a row"]["median_seconds"], against
    if case.kind == "memory":
        return last["ratio"], against
    if case.kind == "step":
        return last["speedup"]["of_medians"], against
    goal = last["goals"][number]
    return goal.get("of_medians"), goal.get("baseline", against)

"""What a verification found: one entry per check, and whether all of them held."""

import math
from dataclasses import dataclass, field
from typing import Any

from bitquest.nn import TableRounding

SHOWN = 5


@dataclass(frozen=True)
class Check:
    """One thing that was verified.

    passed: None where the check could not be run, because an earlier one failed. failures: each names the layer or
    tensor and the figure. figures: numbers for `--json`.
    """

    name: str
    passed: bool | None
    summary: str
    failures: tuple[str, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(name: str, summary: str, failures: list[str], figures: dict[str, Any] | None = None) -> "Check":
        """Passed if there are no failures; of many failures the first few are kept, and how many there are."""
        kept = failures[:SHOWN]
        if len(failures) > SHOWN:
            kept.append(f"and {len(failures) - SHOWN} more")
        return Check(name, not failures, summary, tuple(kept), figures or {})

    @staticmethod
    def not_run(name: str) -> "Check":
        return Check(name, None, "not run: the two are not the same kind of model")

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "summary": self.summary,
            "failures": list(self.failures),
            "figures": {key: _finite(value) for key, value in self.figures.items()},
        }


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON has not, as null."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class VerifyReport:
    """All checks of one packed model against the run it came from, in the order they were made.

    rounding: how embedding and head were rounded after training, None if they were not. All checks are then against
    the trained model whose tables were rounded in the same way.
    """

    run: str
    packed: str
    step: int
    checks: tuple[Check, ...]
    rounding: TableRounding | None = None

    @property
    def passed(self) -> bool:
        """Whether every check was run and held."""
        return all(check.passed is True for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.passed is False)

    @property
    def tables(self) -> str | None:
        """What was done to embedding and head, in words; None if they are as trained."""
        return None if self.rounding is None else f"rounded after training at export ({self.rounding.bits} bits)"

    def check(self, name: str) -> Check:
        """The check of that name."""
        return next(check for check in self.checks if check.name == name)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "run": self.run,
            "packed": self.packed,
            "step": self.step,
            "passed": self.passed,
            "tables": None if self.rounding is None else {**self.rounding.to_json(), "summary": self.tables},
            "checks": [check.to_json() for check in self.checks],
        }

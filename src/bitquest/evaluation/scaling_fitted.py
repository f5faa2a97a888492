"""A fitted scaling law: its constants, how sure they are, what it was fitted to; as JSON, and read back.

Intervals come from bootstrap samples of the constants, which the file keeps: one line of S numbers for each sample.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitquest.errors import DataError
from bitquest.evaluation.scaling_law import ScalingLaw, efficiency_in
from bitquest.evaluation.scaling_runs import ScalingRun
from bitquest.files import write_text_atomic

Array = NDArray[np.float64]
Interval = tuple[float, float]

FORMAT, VERSION = "bitquest-scaling-law", 1
CONSTANTS = ("A", "alpha", "B", "beta", "E")
PAPER = Path(__file__).with_name("quest_paper_law.json")  # `bitquest scaling fit` of the paper's 104 runs
LEVEL = 0.95
_NORMAL = tuple(NormalDist().inv_cdf((i + 0.5) / 19) for i in range(19))


@dataclass(frozen=True)
class FittedRange:
    """Least and greatest of what the law was fitted to; beyond it the law extrapolates."""

    parameters: Interval
    tokens: Interval
    tokens_per_parameter: Interval
    losses: Interval

    @staticmethod
    def of(runs: Sequence[ScalingRun]) -> "FittedRange":
        """The range of some runs."""

        def ends(values: list[float]) -> Interval:
            return min(values), max(values)

        return FittedRange(
            ends([float(run.parameters) for run in runs]),
            ends([float(run.tokens) for run in runs]),
            ends([run.tokens / run.parameters for run in runs]),
            ends([run.loss for run in runs]),
        )

    def beyond(self, parameters: float, tokens: float) -> list[str]:
        """In words, which of size, tokens and their ratio lie outside; a tenth beyond the ends is not counted."""
        found = []
        for what, value, (low, high), form in (
            ("size", parameters, self.parameters, short_count),
            ("tokens", tokens, self.tokens, short_count),
            ("tokens per parameter", tokens / parameters, self.tokens_per_parameter, lambda ratio: f"{ratio:.3g}"),
        ):
            if value < low / 1.1 or value > high * 1.1:
                times = value / high if value > high else low / value
                side = "above" if value > high else "below"
                found.append(f"{what} {form(value)} is {times:.3g} times {side} the fit's {form(low)} to {form(high)}")
        return found


@dataclass(frozen=True)
class FittedLaw:
    """A law and its uncertainty. `samples`: S rows of A, α, B, β, E and eff of each format, in `efficiencies`' order.

    residual_std: of log losses, degrees of freedom counted: how far a run lies from the law. e_range: the E that fit
    as well as the best one; it begins at 0 where E is not identifiable. held: constants that were not fitted.
    """

    law: ScalingLaw
    efficiencies: Mapping[str, float]
    reference: str
    runs: Mapping[str, int]
    range: FittedRange
    residual_std: float
    sum_of_squares: float
    samples: tuple[tuple[float, ...], ...]
    e_range: Interval
    held: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def e_is_identifiable(self) -> bool:
        """Whether an E of 0 fits worse than chance explains."""
        return "E" in self.held or self.e_range[0] > 0

    def efficiency(self, format_name: str) -> tuple[float, str]:
        """eff(P), and the fitted format it is of. Raises ConfigError for a format that has none."""
        return efficiency_in(format_name, self.efficiencies)

    def loss(self, parameters: float, tokens: float, format_name: str) -> float:
        """Expected loss in nats per token."""
        return self.law.loss(parameters, tokens, self.efficiency(format_name)[0])

    def losses(self, parameters: float, tokens: float, format_name: str) -> Array:
        """The loss under every bootstrap sample, (S,)."""
        name = self.efficiency(format_name)[1]
        table = np.array(self.samples).reshape(len(self.samples), -1)
        a, alpha, b, beta, e = table[:, :5].T
        eff = table[:, 5 + list(self.efficiencies).index(name)]
        return np.asarray(a / (parameters * eff) ** alpha + b / tokens**beta + e)

    def loss_interval(self, parameters: float, tokens: float, format_name: str) -> Interval | None:
        """Where a run's loss lies with 95 %: the law's uncertainty and a run's scatter around it. None without samples.

        What lies beyond the fitted range may be wrong in ways that no interval shows.
        """
        if not self.samples:
            return None
        scatter = np.exp(self.residual_std * np.array(_NORMAL))
        return _percentiles(np.outer(self.losses(parameters, tokens, format_name), scatter).ravel())

    def constant_interval(self, name: str) -> Interval | None:
        """95 % interval of A, alpha, B, beta or E; None where it was held or there are no samples."""
        if name in self.held or not self.samples:
            return None
        return _percentiles(np.array(self.samples)[:, CONSTANTS.index(name)])

    def efficiency_interval(self, format_name: str) -> Interval | None:
        """95 % interval of a fitted format's eff; None for the reference, whose eff is 1 by definition."""
        if format_name == self.reference or not self.samples:
            return None
        return _percentiles(np.array(self.samples)[:, 5 + list(self.efficiencies).index(format_name)])

    def to_json(self, *, samples: bool = True) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal law (without samples: one that has no intervals)."""
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "constants": dict(zip(CONSTANTS, _values(self.law), strict=True)),
            "intervals": {name: self.constant_interval(name) for name in CONSTANTS if name != "E"},
            "E_range": self.e_range,
            "E_identifiable": self.e_is_identifiable,
            "reference": self.reference,
            "formats": {
                name: {"eff": eff, "interval": self.efficiency_interval(name), "runs": self.runs[name]}
                for name, eff in self.efficiencies.items()
            },
            "range": vars(self.range),
            "sum_of_squares": self.sum_of_squares,
            "residual_std": self.residual_std,
            "held": self.held,
            "about": dict(self.about),
        }
        if samples:
            fields["samples"] = [[_rounded(value) for value in sample] for sample in self.samples]
        return fields

    @staticmethod
    def from_json(fields: Any) -> "FittedLaw":
        """The law that `to_json` described. Raises DataError for anything else."""
        if not isinstance(fields, dict) or fields.get("format") != FORMAT:
            raise DataError("not a scaling law: `bitquest scaling fit … --out law.json` writes one")
        if fields.get("version") != VERSION:
            raise DataError(f"a scaling law of version {fields.get('version')!r}; this program reads {VERSION}")
        try:
            formats = fields["formats"]
            law = FittedLaw(
                law=ScalingLaw(*(float(fields["constants"][name]) for name in CONSTANTS)),
                efficiencies={name: float(value["eff"]) for name, value in formats.items()},
                reference=fields["reference"],
                runs={name: int(value["runs"]) for name, value in formats.items()},
                range=FittedRange(**{name: (float(a), float(b)) for name, (a, b) in fields["range"].items()}),
                residual_std=float(fields["residual_std"]),
                sum_of_squares=float(fields["sum_of_squares"]),
                samples=tuple(tuple(map(float, sample)) for sample in fields.get("samples", ())),
                e_range=(float(fields["E_range"][0]), float(fields["E_range"][1])),
                held=tuple(fields["held"]),
                about=dict(fields["about"]),
            )
            widths = {len(sample) for sample in law.samples}
            numbers = [*_values(law.law), *law.efficiencies.values(), *(v for s in law.samples for v in s)]
            if widths - {5 + len(formats)} or not all(math.isfinite(value) for value in numbers):
                raise ValueError
            return law
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError("a damaged scaling law: fit it again with `bitquest scaling fit`") from None

    def save(self, path: Path) -> None:
        """Write the law, a sample a line; a file that is there is replaced in one go."""
        fields = self.to_json(samples=False)
        rows = [[_rounded(value) for value in sample] for sample in self.samples]
        text = json.dumps(fields, indent=1, ensure_ascii=False)
        lines = ",\n  ".join(json.dumps(row, separators=(",", ":")) for row in rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, f'{text[:-2]},\n "samples": [\n  {lines}\n ]\n}}\n')


def load_law(path: Path | None) -> FittedLaw:
    """The law of a file, or, for None, the fit to the QuEST paper's runs. Raises DataError naming the file."""
    where = PAPER if path is None else path
    if where.is_dir():
        raise DataError(f"{where}: this is a folder; name the file that `bitquest scaling fit … --out` wrote")
    try:
        return FittedLaw.from_json(json.loads(where.read_text(encoding="utf-8")))
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise DataError(f"{where}: not JSON; `bitquest scaling fit … --out law.json` writes a law") from None
    except DataError as error:
        raise DataError(f"{where}: {error}") from None


def short_count(value: float) -> str:
    """1.23M, 45B, 6.7T: three digits and a letter."""
    for letter, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * unit:
            return f"{value / unit:.3g}{letter}" if value < 999.5 * unit else f"{value / unit:.0f}{letter}"
    return f"{value:.3g}"


def _percentiles(values: Array) -> Interval:
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


def _values(law: ScalingLaw) -> tuple[float, ...]:
    return law.a, law.alpha, law.b, law.beta, law.e


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")

"""The quantizer of one operand: five independent frozen values, and the reasons why a combination makes no sense."""

from dataclasses import dataclass
from typing import Any

from bitquest.errors import ConfigError
from bitquest.numerics.estimators import Estimator, Trust, estimator_from_json
from bitquest.numerics.grids import Grid, UniformGrid, grid_from_json
from bitquest.numerics.scaling import (
    GaussianMSE,
    Granularity,
    Learned,
    PerGroup,
    PerRow,
    ScaleRule,
    TwoLevel,
    granularity_from_json,
    scale_rule_from_json,
)
from bitquest.numerics.sparsity import Dense, Sparsity, sparsity_from_json


@dataclass(frozen=True)
class Quantizer:
    """How one operand becomes codes: grid, granularity, scale rule, gradient estimator and sparsity.

    Raises ConfigError for a scale rule the grid cannot use. Whether a row of some width can be shared out among groups
    and patterns is checked by `check(width)`, when a layer is made.
    """

    grid: Grid = UniformGrid(4)
    granularity: Granularity = PerRow()
    scale: ScaleRule = GaussianMSE()
    estimator: Estimator = Trust()
    sparsity: Sparsity = Dense()

    def __post_init__(self) -> None:
        self.scale.check(self.grid)
        if isinstance(self.scale, TwoLevel) and not isinstance(self.granularity, PerGroup):
            raise ConfigError("TwoLevel scales are a group's factor times a shared scale: take PerGroup(size)")

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.grid.bits

    @property
    def is_learned(self) -> bool:
        """Whether the step is a parameter of the module."""
        return isinstance(self.scale, Learned)

    @property
    def is_sparse(self) -> bool:
        return not isinstance(self.sparsity, Dense)

    def check(self, width: int) -> None:
        """Raise ConfigError if rows of `width` elements do not fit the groups or the sparsity pattern."""
        self.granularity.check(width)
        self.sparsity.check(width)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal quantizer."""
        return {
            "grid": self.grid.to_json(),
            "granularity": self.granularity.to_json(),
            "scale": self.scale.to_json(),
            "estimator": self.estimator.to_json(),
            "sparsity": self.sparsity.to_json(),
        }

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Quantizer":
        """The quantizer that `to_json` described. Raises ConfigError naming what is not understood."""
        wanted = {"grid", "granularity", "scale", "estimator", "sparsity"}
        if not isinstance(fields, dict) or set(fields) != wanted:
            raise ConfigError(f"a quantizer has the keys {sorted(wanted)}, not {fields!r}")
        return Quantizer(
            grid_from_json(fields["grid"]),
            granularity_from_json(fields["granularity"]),
            scale_rule_from_json(fields["scale"]),
            estimator_from_json(fields["estimator"]),
            sparsity_from_json(fields["sparsity"]),
        )

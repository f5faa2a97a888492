"""Gradient estimators: which elements pass the gradient back through the rounding.

Each gives a mask M over the rotated values x_h; the gradient is (G ⊙ M)Hᵀ (METHOD, "Backward"). Values and
quantized values are in units of the step Δ here, so a threshold is a plain number.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.grids import Grid

EVERYWHERE = (-math.inf, math.inf)


def _within(x_in_steps: Tensor, low: float, high: float) -> Tensor:
    # Two comparisons into one-byte results: cheaper than |x|, which writes a float tensor. NaN is outside.
    return torch.ge(x_in_steps, low).logical_and_(torch.le(x_in_steps, high))


def _positive(name: str, value: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 < value <= sys.float_info.max):
        raise ConfigError(f"{name} must be a positive finite number, not {value!r}")


@dataclass(frozen=True)
class StraightThrough:
    """Every element passes its gradient (Bengio et al., arXiv 1308.3432)."""

    def range(self, grid: Grid) -> tuple[float, float] | None:
        """The interval of x/Δ in which M = 1, or None where it takes |x_q − x_h| to tell."""
        return EVERYWHERE

    def range_of_dropped(self, grid: Grid) -> tuple[float, float]:
        """The same for an element that N:M sparsity sets to zero."""
        return EVERYWHERE

    def to_json(self) -> dict[str, Any]:
        return {"kind": "straight_through"}


@dataclass(frozen=True)
class Clip:
    """M = 1[|x_h| ≤ ratio·s]. Under N:M sparsity a zeroed element obeys the same rule."""

    ratio: float = 1.0

    def __post_init__(self) -> None:
        _positive("the clip ratio", self.ratio)

    def range(self, grid: Grid) -> tuple[float, float] | None:
        return self.range_of_dropped(grid)

    def range_of_dropped(self, grid: Grid) -> tuple[float, float]:
        limit = self.ratio * grid.max_level
        return (-limit, limit)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "clip", "ratio": float(self.ratio)}


@dataclass(frozen=True)
class Inside:
    """M = 1 from the lowest to the highest level: on a lopsided grid, such as −2, −1, 0, 1, more than Clip(1.0) masks.

    The mask of LSQ (arXiv 1902.08153, eq. 5). Under N:M sparsity a zeroed element obeys the same rule.
    """

    def range(self, grid: Grid) -> tuple[float, float] | None:
        return self.range_of_dropped(grid)

    def range_of_dropped(self, grid: Grid) -> tuple[float, float]:
        return (grid.levels[0], grid.levels[-1])

    def to_json(self) -> dict[str, Any]:
        return {"kind": "inside"}


@dataclass(frozen=True)
class Trust:
    """M = 1[|x_q − x_h| ≤ T], T = factor × half the outermost gap of the grid (Δ/2 on a uniform grid).

    Where no interior value can be further than T from its level, M masks clipped outliers only and is evaluated as
    such: the difference of two nearly equal numbers would mask interior values by rounding alone. An element that N:M
    sparsity sets to zero is |x_h| away from what it became.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        _positive("the trust factor", self.factor)

    def range(self, grid: Grid) -> tuple[float, float] | None:
        reach = self.threshold(grid)
        if 2 * reach < grid.largest_gap:
            return None
        return (grid.levels[0] - reach, grid.levels[-1] + reach)

    def range_of_dropped(self, grid: Grid) -> tuple[float, float]:
        reach = self.threshold(grid)
        return (-reach, reach)

    def threshold(self, grid: Grid) -> float:
        """T/Δ."""
        return self.factor * grid.outer_gap / 2

    def to_json(self) -> dict[str, Any]:
        return {"kind": "trust", "factor": float(self.factor)}


Estimator = StraightThrough | Clip | Inside | Trust
ALL_ESTIMATORS: tuple[Estimator, ...] = (
    StraightThrough(),
    Clip(),
    Clip(1.3),
    Inside(),
    Trust(),
    Trust(0.5),
    Trust(2.0),
)


def passes_everything(estimator: Estimator, grid: Grid) -> bool:
    """Whether M = 1 for all values, so that nobody has to store it."""
    return estimator.range(grid) == estimator.range_of_dropped(grid) == EVERYWHERE


def mask_before_rounding(estimator: Estimator, x_in_steps: Tensor, grid: Grid, kept: Tensor | None) -> Tensor | None:
    """M (bool) where x alone decides it, else None: then `mask_after_rounding` does. Empty: every element passes."""
    limits = estimator.range(grid)
    if limits is None:
        return None
    if passes_everything(estimator, grid):
        return torch.empty(0, dtype=torch.bool, device=x_in_steps.device)
    mask, limits_of_dropped = _within(x_in_steps, *limits), estimator.range_of_dropped(grid)
    if kept is None or limits == limits_of_dropped:
        return mask
    return torch.where(kept, mask, _within(x_in_steps, *limits_of_dropped))


def mask_after_rounding(estimator: Estimator, x_in_steps: Tensor, q_in_steps: Tensor, grid: Grid) -> Tensor:
    """M (bool) from the distance between a value and what it became."""
    assert isinstance(estimator, Trust), "the other estimators decide before rounding"
    return (q_in_steps - x_in_steps).abs_() <= estimator.threshold(grid)


def estimator_from_json(fields: dict[str, Any]) -> Estimator:
    """The estimator that `to_json` described."""
    match fields:
        case {"kind": "straight_through", **rest} if not rest:
            return StraightThrough()
        case {"kind": "clip", "ratio": ratio, **rest} if not rest:
            return Clip(ratio)
        case {"kind": "inside", **rest} if not rest:
            return Inside()
        case {"kind": "trust", "factor": factor, **rest} if not rest:
            return Trust(factor)
    raise ConfigError(
        f"not an estimator: {fields!r}; expected kind 'straight_through', 'clip' (ratio), 'inside' or 'trust' (factor)"
    )

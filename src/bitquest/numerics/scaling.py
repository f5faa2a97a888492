"""Granularity: which elements share a step. Scale rules: how large that step is.

A step Δ has the shape of its operand's leading dimensions: (…, 1) per row, (…, K/size) per group, (1, …, 1) per tensor.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.grids import TERNARY, Grid, UniformGrid

EPSILON = 1e-8  # METHOD: s = α·σ + 1e-8, so that a row of zeros has a step


@dataclass(frozen=True)
class PerTensor:
    """One step for the whole tensor."""

    def check(self, width: int) -> None:
        """Raise ConfigError where a row of `width` cannot be shared out."""

    def grouped(self, x: Tensor) -> Tensor:
        """x viewed so that its last dimension holds the elements that share a step."""
        return x.reshape(*([1] * (x.dim() - 1)), -1)

    def step_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * len(shape)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "tensor"}


@dataclass(frozen=True)
class PerRow:
    """One step per row: per token of an activation, per output channel of a weight."""

    def check(self, width: int) -> None:
        """Every width will do."""

    def grouped(self, x: Tensor) -> Tensor:
        return x

    def step_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], 1)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "row"}


@dataclass(frozen=True)
class PerGroup:
    """One step for every `size` consecutive elements of a row."""

    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.size, int) or self.size not in (32, 64, 128):
            raise ConfigError(f"the size of a group is a whole number: 32, 64 or 128, not {self.size!r}")

    def check(self, width: int) -> None:
        if width % self.size:
            raise ConfigError(f"groups of {self.size} do not divide a row of width {width}")

    def grouped(self, x: Tensor) -> Tensor:
        self.check(x.shape[-1])
        return x.unflatten(-1, (-1, self.size))

    def step_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-1], shape[-1] // self.size)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "group", "size": self.size}


@dataclass(frozen=True)
class GaussianMSE:
    """s = α·σ + 1e-8 with σ = sqrt(mean x²): the clip that is best for Gaussian values (METHOD, step 2 and 3)."""

    def step(self, grouped: Tensor, grid: Grid) -> Tensor:
        """Δ (…, 1) of rotated values (…, elements sharing a step), float32."""
        sigma = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True).div_(grouped.shape[-1] ** 0.5)
        return sigma.mul_(grid.clip_multiplier).add_(EPSILON).div_(grid.max_level)

    def check(self, grid: Grid) -> None:
        """Raise ConfigError where the rule has no meaning on this grid."""

    def to_json(self) -> dict[str, Any]:
        return {"kind": "gaussian_mse"}


@dataclass(frozen=True)
class AbsMax:
    """s = max|x| + 1e-8: nothing is clipped."""

    def step(self, grouped: Tensor, grid: Grid) -> Tensor:
        return grouped.abs().amax(-1, keepdim=True).add_(EPSILON).div_(grid.max_level)

    def check(self, grid: Grid) -> None:
        """Every grid will do."""

    def to_json(self) -> dict[str, Any]:
        return {"kind": "absmax"}


@dataclass(frozen=True)
class AbsMean:
    """s = mean|x| + 1e-8: the scale of BinaryConnect-style 1-bit and of BitNet b1.58's ternary weights."""

    def step(self, grouped: Tensor, grid: Grid) -> Tensor:
        return grouped.abs().mean(-1, keepdim=True).add_(EPSILON).div_(grid.max_level)

    def check(self, grid: Grid) -> None:
        if not (grid == TERNARY or (isinstance(grid, UniformGrid) and grid.bits == 1)):
            raise ConfigError(
                "AbsMean puts the outermost level at mean|x|, which only a 1-bit or ternary grid can use; "
                "take GaussianMSE() or AbsMax() for more levels"
            )

    def to_json(self) -> dict[str, Any]:
        return {"kind": "absmean"}


STARTS = ("gaussian", "lsq", "three_sigma", "absmax", "absmean", "stretched")
GRADIENTS = ("lsq", "lsq_features", "pact", "elastic")


@dataclass(frozen=True)
class Learned:
    """Δ is a parameter of the module. The fields say where training starts and which gradient the papers give it.

    start, with Q the outermost positive level (1 for the two levels of 1 bit):
    "gaussian" GaussianMSE(); "lsq" Δ = 2·mean|x|/√Q (arXiv 1902.08153, section 2.1); "three_sigma" Δ = max|μ ± 3σ| over
    half the number of levels (LSQ+, 2004.09576, eq. 10); "absmax" Q·Δ = max|x|; "absmean" the outermost level at
    mean|x|; "stretched" (Q + ½)·Δ = max|x|, where the intervals of the outermost levels end (ParetoQ, 2502.02631).

    gradient, summed over the elements that share Δ, G that of x_q, M the estimator's mask:
    "lsq" G ⊙ (x_q − x_h ⊙ M)/Δ over √(N·Q), N the number of those elements (LSQ, section 2.2); "lsq_features" the same
    with N the width of a row, LSQ's N for activations; "pact" G ⊙ (1 − M) ⊙ x_q/Δ: only clipped elements reach the clip
    (PACT, 1805.06085, eq. 3, two-sided); "elastic" G ⊙ x_q/Δ over √(N·Q): ParetoQ's at 1 bit.

    offset: x_q = Q((x_h − β)/Δ)·Δ + β with a learned β, for activations (LSQ+). Raises ConfigError for unknown names.
    """

    start: str = "gaussian"
    gradient: str = "lsq"
    offset: bool = False

    def __post_init__(self) -> None:
        if self.start not in STARTS or self.gradient not in GRADIENTS or not isinstance(self.offset, bool):
            raise ConfigError(
                f"a learned step starts at {', '.join(STARTS)}, has the gradient of {', '.join(GRADIENTS)}, "
                f"and an offset or none (true or false), not {self.start!r}, {self.gradient!r}, {self.offset!r}"
            )

    def step(self, grouped: Tensor, grid: Grid) -> Tensor:
        """Δ (…, 1) where training starts, of rotated values (…, elements sharing a step), float32."""
        largest = grid.levels[-1]
        if self.start == "gaussian":
            return GaussianMSE().step(grouped, grid)
        if self.start == "three_sigma":
            spread, mean = torch.var_mean(grouped, dim=-1, correction=0, keepdim=True)
            return mean.abs_().add_(spread.sqrt_(), alpha=3).add_(EPSILON).div_(len(grid.levels) / 2)
        if self.start in ("lsq", "absmean"):
            mean = grouped.abs().mean(-1, keepdim=True).add_(EPSILON)
            return mean.mul_(2 / max(largest, 1.0) ** 0.5) if self.start == "lsq" else mean.div_(largest)
        reach = largest + 0.5 if self.start == "stretched" else largest
        return grouped.abs().amax(-1, keepdim=True).add_(EPSILON).div_(reach)

    def check(self, grid: Grid) -> None:
        """Every grid will do."""

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"kind": "learned"}
        if self == Learned():
            return plain
        return plain | {"start": self.start, "gradient": self.gradient, "offset": self.offset}


Granularity = PerTensor | PerRow | PerGroup
ScaleRule = GaussianMSE | AbsMax | AbsMean | Learned
ALL_GRANULARITIES: tuple[Granularity, ...] = (PerTensor(), PerRow(), PerGroup(32), PerGroup(64), PerGroup(128))
ALL_SCALE_RULES: tuple[ScaleRule, ...] = (GaussianMSE(), AbsMax(), AbsMean(), Learned())


def granularity_from_json(fields: dict[str, Any]) -> Granularity:
    """The granularity that `to_json` described."""
    match fields:
        case {"kind": "tensor", **rest} if not rest:
            return PerTensor()
        case {"kind": "row", **rest} if not rest:
            return PerRow()
        case {"kind": "group", "size": size, **rest} if not rest:
            return PerGroup(size)
    raise ConfigError(f"not a granularity: {fields!r}; expected kind 'tensor', 'row' or 'group' (size)")


def scale_rule_from_json(fields: dict[str, Any]) -> ScaleRule:
    """The scale rule that `to_json` described."""
    for rule in ALL_SCALE_RULES:
        if fields == rule.to_json():
            return rule
    match fields:
        case {"kind": "learned", "start": str(start), "gradient": str(gradient), "offset": bool(offset), **rest} if (
            not rest
        ):
            return Learned(start, gradient, offset)
    raise ConfigError(f"not a scale rule: {fields!r}; expected kind 'gaussian_mse', 'absmax', 'absmean' or 'learned'")

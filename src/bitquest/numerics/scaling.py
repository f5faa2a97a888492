"""Granularity: which elements share a step. Scale rules: how large that step is.

A step Δ has the shape of its operand's leading dimensions: (…, 1) per row, (…, K/size) per group, (1, …, 1) per tensor.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.grids import TERNARY, Grid, UniformGrid

E4M3_MIN, E4M3_MAX = 2.0**-9, 448.0  # the smallest and the largest positive number of E4M3
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
        if not isinstance(self.size, int) or self.size not in (16, 32, 64, 128):
            raise ConfigError(f"the size of a group is a whole number: 16, 32, 64 or 128, not {self.size!r}")

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


@dataclass(frozen=True)
class PowerOfTwo:
    """Δ = 2^(⌊log2 max|x|⌋ − ⌊log2(largest level)⌋): the shared scale of OCP Microscaling (MX) v1.0, section 6.3.

    An E8M0 number. With FP4 in groups of 32 this is MXFP4: what lies between 6Δ and 8Δ is clipped to 6Δ. The exponent
    is kept within −126 … 127, so that Δ is a normal float32 (E8M0 has −127 too); a group of zeros takes the smallest.
    """

    def step(self, grouped: Tensor, grid: Grid) -> Tensor:
        peak = grouped.abs().amax(-1, keepdim=True)
        # |x| = m·2^e with m in [½, 1). Of zero frexp gives e = 0.
        exponent = torch.frexp(peak).exponent.sub_(math.frexp(grid.max_level)[1])
        exponent = torch.where(peak == 0, -126, exponent.clamp_(-126, 127))
        step = exponent.add_(127).to(torch.int32).bitwise_left_shift_(23).view(torch.float32)  # exactly 2^exponent
        return torch.where(peak.isfinite(), step, peak)  # NaN and infinity stay visible

    def check(self, grid: Grid) -> None:
        """Every grid will do."""

    def to_json(self) -> dict[str, Any]:
        return {"kind": "power_of_two"}


@dataclass(frozen=True)
class TwoLevel:
    """Δ of a group is an E4M3 number times a float32 scale that many groups share: NVFP4's scales, in groups of 16.

    The float32 scale is max|x|/(448 · largest level) over what shares it, so that the group with the largest value
    takes the largest E4M3 number; a group's own factor is max|x|/(largest level · scale), rounded to E4M3, at least its
    smallest, 2^−9. Source: NVIDIA, arXiv 2509.25149, appendix. shared: "tensor", for weights, or "row", for
    activations: over a whole activation tensor a token would see later ones.
    """

    shared: str = "tensor"

    def __post_init__(self) -> None:
        if self.shared not in ("tensor", "row"):
            raise ConfigError(f"the float32 scale of TwoLevel is shared by a 'tensor' or a 'row', not {self.shared!r}")

    def step(self, grouped: Tensor, grid: Grid) -> Tensor:
        """Δ (…, groups, 1) of rotated values (…, groups, elements of a group), float32."""
        peak = grouped.abs().amax(-1, keepdim=True)
        over_all = peak.amax() if self.shared == "tensor" else peak.amax(-2, keepdim=True)
        scale = over_all.add(EPSILON).div_(E4M3_MAX * grid.max_level)
        factor = peak.div_(scale).div_(grid.max_level).clamp_(E4M3_MIN, E4M3_MAX)
        return factor.to(torch.float8_e4m3fn).to(torch.float32).mul_(scale)

    def check(self, grid: Grid) -> None:
        """Every grid will do."""

    def to_json(self) -> dict[str, Any]:
        return {"kind": "two_level", "shared": self.shared}


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

    What the module holds is Δ times `unit`. Adam moves every parameter by about the learning rate, whatever factor its
    gradient has, so it undoes LSQ's 1/√(N·Q), whose purpose is that a step changes as fast, relative to itself, as the
    weights do; a step of many bits, far smaller than the weights, would jump by more than itself. √Q·Δ, which starts at
    2·mean|x|, keeps that purpose at every width. PACT's parameter is the clip α = Q·Δ. Of plain Learned() it is Δ.
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

    def unit(self, grid: Grid) -> float:
        """The module's parameter over Δ."""
        if self == Learned():
            return 1.0
        return grid.levels[-1] if self.gradient == "pact" else max(grid.levels[-1], 1.0) ** 0.5

    def check(self, grid: Grid) -> None:
        """Every grid will do."""

    def to_json(self) -> dict[str, Any]:
        plain: dict[str, Any] = {"kind": "learned"}
        if self == Learned():
            return plain
        return plain | {"start": self.start, "gradient": self.gradient, "offset": self.offset}


Granularity = PerTensor | PerRow | PerGroup
ScaleRule = GaussianMSE | AbsMax | AbsMean | PowerOfTwo | TwoLevel | Learned
ALL_GRANULARITIES: tuple[Granularity, ...] = (
    PerTensor(),
    PerRow(),
    PerGroup(16),
    PerGroup(32),
    PerGroup(64),
    PerGroup(128),
)
ALL_SCALE_RULES: tuple[ScaleRule, ...] = (
    GaussianMSE(),
    AbsMax(),
    AbsMean(),
    PowerOfTwo(),
    TwoLevel("tensor"),
    TwoLevel("row"),
    Learned(),
    Learned("lsq", "lsq_features", offset=True),
)


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
    raise ConfigError(
        f"not a scale rule: {fields!r}; expected kind 'gaussian_mse', 'absmax', 'absmean', 'power_of_two', "
        "'two_level' (shared) or 'learned' (start, gradient, offset)"
    )

"""Grids: the numbers a quantized value may take, in units of the step Δ.

A grid knows its levels, how a value becomes a code and back, and at which multiple of σ a Gaussian is best clipped.
Codes are int8, centred: c in [−2^(b−1), 2^(b−1) − 1]; files store u = c + 2^(b−1).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.multipliers import PAPER_FP4, PAPER_TERNARY, PAPER_UNIFORM, gaussian_step, lloyd_max_levels


@dataclass(frozen=True)
class UniformGrid:
    """2^bits equally spaced levels without a zero (mid-rise): ±½Δ, ±1½Δ, …, ±s with s = Δ(2^bits − 1)/2.

    bits: 1 to 8. exact: clip where the Gaussian error is least, instead of at the paper's multiplier.
    Source: METHOD, "Forward"; arXiv 2502.05003.
    """

    bits: int
    exact: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ConfigError(f"UniformGrid takes 1 to 8 bits, not {self.bits!r}")

    @property
    def levels(self) -> tuple[float, ...]:
        """All levels in units of Δ, increasing."""
        half = 2 ** (self.bits - 1)
        return tuple(c + 0.5 for c in range(-half, half))

    @property
    def max_level(self) -> float:
        """The largest level, s/Δ."""
        return (2**self.bits - 1) / 2

    @cached_property
    def clip_multiplier(self) -> float:
        """α = s/σ for Gaussian values."""
        return gaussian_step(self.levels) * self.max_level if self.exact else PAPER_UNIFORM[self.bits]

    @property
    def largest_gap(self) -> float:
        return 1.0

    @property
    def outer_gap(self) -> float:
        return 1.0

    def encode(self, x_in_steps: Tensor) -> Tensor:
        """Codes (int8) of values given in units of Δ: c = round(x/Δ + ½) − 1, half to even, clamped to the grid."""
        if self.bits == 1:  # the same in exact arithmetic: zero is the only threshold and maps down
            return (x_in_steps > 0).to(torch.int8).sub_(1)
        half = 2 ** (self.bits - 1)
        return (x_in_steps + 0.5).round_().sub_(1).clamp_(-half, half - 1).to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        """Levels (float32, units of Δ) of codes."""
        return codes.to(torch.float32).add_(0.5)

    def nearest_(self, x_in_steps: Tensor) -> Tensor:
        """decode(encode(x)) in place on a float tensor in units of Δ, without the detour over int8."""
        if self.bits == 1:
            # sign(x) − ½ clamped to ±½ is +½ above zero and −½ at or below it.
            return x_in_steps.sign_().sub_(0.5).clamp_(-0.5, 0.5)
        half = 2 ** (self.bits - 1)
        return x_in_steps.add_(0.5).round_().clamp_(1 - half, half).sub_(0.5)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "uniform", "bits": self.bits, "exact": self.exact}


@dataclass(frozen=True)
class CodebookGrid:
    """Any increasing list of 2 to 256 levels, in units of Δ; a value goes to the nearest, ties to the lower one.

    name: what people call it; "ternary" and "fp4" are clipped at the paper's multipliers, others at the exact optimum
    for a Gaussian. exact: take the exact optimum for these two as well.
    """

    name: str
    levels: tuple[float, ...]
    exact: bool = False

    def __post_init__(self) -> None:
        if not all(isinstance(level, int | float) and not isinstance(level, bool) for level in self.levels):
            raise ConfigError(f"the levels of codebook {self.name!r} must be numbers: {self.levels}")
        try:
            levels = tuple(float(level) for level in self.levels)
        except OverflowError:
            raise ConfigError(f"codebook {self.name!r} has a level that is too large") from None
        if not 2 <= len(levels) <= 256:
            raise ConfigError(f"codebook {self.name!r} has {len(levels)} levels; 2 to 256 are possible")
        if not all(math.isfinite(level) for level in levels):
            raise ConfigError(f"codebook {self.name!r} has a level that is not finite: {levels}")
        if any(a >= b for a, b in pairwise(levels)):
            raise ConfigError(f"the levels of codebook {self.name!r} must increase strictly: {levels}")
        if levels[-1] <= 0:
            raise ConfigError(f"the largest level of codebook {self.name!r} must be positive: it sets the scale")
        object.__setattr__(self, "levels", levels)

    def __repr__(self) -> str:
        levels: object = self.levels
        if len(self.levels) > 16:
            levels = f"({self.levels[0]:g}, …, {self.levels[-1]:g}), {len(self.levels)} of them"
        return f"CodebookGrid(name={self.name!r}, levels={levels}, exact={self.exact})"

    @property
    def bits(self) -> int:
        """Bits a code takes: ⌈log2(number of levels)⌉."""
        return (len(self.levels) - 1).bit_length()

    @property
    def max_level(self) -> float:
        return max(abs(self.levels[0]), abs(self.levels[-1]))

    @cached_property
    def clip_multiplier(self) -> float:
        """α = s/σ for Gaussian values."""
        if self == TERNARY:
            return PAPER_TERNARY
        if self == FP4:
            return PAPER_FP4
        return gaussian_step(self.levels) * self.max_level

    @property
    def _gaps(self) -> list[float]:
        return [b - a for a, b in pairwise(self.levels)]

    @property
    def largest_gap(self) -> float:
        return max(self._gaps)

    @property
    def outer_gap(self) -> float:
        """The gap before the outermost level, which scales the trust threshold (the wider one if the two differ)."""
        return max(self._gaps[0], self._gaps[-1])

    def _index(self, x_in_steps: Tensor) -> Tensor:
        middles = [(a + b) / 2 for a, b in pairwise(self.levels)]
        bounds = torch.tensor(middles, dtype=torch.float32, device=x_in_steps.device)
        return torch.bucketize(x_in_steps, bounds, out_int32=True)

    def encode(self, x_in_steps: Tensor) -> Tensor:
        """Codes (int8): index of the nearest level − 2^(bits−1), for values in units of Δ."""
        return self._index(x_in_steps).sub_(2 ** (self.bits - 1)).to(torch.int8)

    def decode(self, codes: Tensor) -> Tensor:
        """Levels (float32, units of Δ) of codes."""
        table = torch.tensor(self.levels, dtype=torch.float32, device=codes.device)
        return table[codes.to(torch.int64) + 2 ** (self.bits - 1)]

    def nearest_(self, x_in_steps: Tensor) -> Tensor:
        """decode(encode(x)) in place on a float tensor in units of Δ."""
        table = torch.tensor(self.levels, dtype=torch.float32, device=x_in_steps.device)
        return x_in_steps.copy_(table[self._index(x_in_steps)])

    def to_json(self) -> dict[str, Any]:
        return {"kind": "codebook", "name": self.name, "levels": list(self.levels), "exact": self.exact}


TERNARY = CodebookGrid("ternary", (-1.0, 0.0, 1.0))
_FP4_POSITIVE = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP4 = CodebookGrid("fp4", (*(-level for level in reversed(_FP4_POSITIVE)), 0.0, *_FP4_POSITIVE))


def integer_grid(bits: int, symmetric: bool = False) -> CodebookGrid:
    """The integers of two's complement, with a zero: −2^(bits−1), …, 2^(bits−1) − 1. bits: 2 to 8.

    symmetric: without the lowest one. The grid of LSQ (arXiv 1902.08153) and, symmetric at 8 bits, of BitNet's
    activations. Beside `UniformGrid` it spends a level on one side to have a zero.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
        raise ConfigError(f"integer_grid takes 2 to 8 bits, not {bits!r}: at 1 bit it would have no positive level")
    half = 2 ** (bits - 1)
    name = f"int{bits}-symmetric" if symmetric else f"int{bits}"
    return CodebookGrid(name, tuple(float(level) for level in range(1 - half if symmetric else -half, half)))


INT8_SYMMETRIC = integer_grid(8, symmetric=True)


def lloyd_max_grid(bits: int) -> CodebookGrid:
    """The 2^bits levels of least error for Gaussian values, in units of σ (Lloyd 1982, Max 1960). bits: 1 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ConfigError(f"lloyd_max_grid takes 1 to 8 bits, not {bits!r}")
    return CodebookGrid(f"lloyd{bits}", lloyd_max_levels(bits))


def _e4m3() -> tuple[float, ...]:
    """Zero and the finite numbers of E4M3: three bits of mantissa, exponents from −6 to 8, subnormals, 448 at most."""
    subnormal = [mantissa / 8 * 2.0**-6 for mantissa in range(1, 8)]
    normal = [(1 + mantissa / 8) * 2.0**exponent for exponent in range(-6, 9) for mantissa in range(8)]
    positive = [*subnormal, *normal][:-1]  # the last pattern is NaN
    return (*(-level for level in reversed(positive)), 0.0, *positive)


# OCP 8-bit floating point, E4M3 (arXiv 2209.05433): 253 different numbers.
FP8 = CodebookGrid("fp8", _e4m3())

Grid = UniformGrid | CodebookGrid
ALL_GRIDS: tuple[Grid, ...] = (
    *(UniformGrid(bits) for bits in range(1, 9)),
    UniformGrid(8, exact=True),
    TERNARY,
    FP4,
    integer_grid(2),
    INT8_SYMMETRIC,
    lloyd_max_grid(3),
    FP8,
    CodebookGrid("lopsided", (-1.0, -0.25, 0.5, 2.0)),
)


def grid_from_json(fields: dict[str, Any]) -> Grid:
    """The grid that `to_json` described."""
    match fields:
        case {"kind": "uniform", "bits": bits, "exact": bool(exact), **rest} if not rest:
            return UniformGrid(bits, exact)
        case {"kind": "codebook", "name": str(name), "levels": list(levels), "exact": bool(exact), **rest} if not rest:
            return CodebookGrid(name, tuple(levels), exact)
    raise ConfigError(
        f"not a grid: {fields!r}; expected kind 'uniform' (bits, exact) or 'codebook' (name, levels, exact)"
    )

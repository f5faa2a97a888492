"""Earlier methods of training on few bits, each as its paper defines it, composed from the axes of numerics.

A method gives the quantizer of a weight and of an activation, at a width or on a grid that is named beside it. Where it
differs from its paper, a comment says how and why; docs/howto/rivals.md is the table.
"""

from collections.abc import Callable
from dataclasses import dataclass

from bitquest.errors import ConfigError
from bitquest.numerics.estimators import Clip, Inside, StraightThrough, Trust
from bitquest.numerics.grids import INT8_SYMMETRIC, TERNARY, Grid, UniformGrid, integer_grid
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.scaling import AbsMax, AbsMean, Learned, PerRow, PerTensor

Operand = Callable[[int, Grid | None], Quantizer]  # from bits, and the grid if the scheme names one


@dataclass(frozen=True)
class Method:
    """How a method quantizes both operands. source: where it is defined."""

    weight: Operand
    activation: Operand
    source: str


def _integers(bits: int, grid: Grid | None) -> Grid:
    """LSQ's signed grid. At 1 bit its Q_P is 0 and its formulas divide by it: there it is ±Δ/2."""
    if grid is not None:
        return grid
    return UniformGrid(1) if bits == 1 else integer_grid(bits)


# --- LSQ: Esser et al., Learned Step Size Quantization, arXiv 1902.08153 ---------------------------------------------
# The paper has one step per layer; here a weight has one per row, and `-tensor` gives the paper's.


def _lsq_weight(bits: int, grid: Grid | None) -> Quantizer:
    return Quantizer(_integers(bits, grid), PerRow(), Learned("lsq", "lsq"), Inside())


def _lsq_activation(bits: int, grid: Grid | None) -> Quantizer:
    return Quantizer(_integers(bits, grid), PerTensor(), Learned("lsq", "lsq_features"), Inside())


# --- LSQ+: Bhalgat et al., arXiv 2004.09576 --------------------------------------------------------------------------
# Weights symmetric, started at three standard deviations; activations with an offset, started at the least error.


def _lsq_plus_weight(bits: int, grid: Grid | None) -> Quantizer:
    return Quantizer(_integers(bits, grid), PerRow(), Learned("three_sigma", "lsq"), Inside())


def _lsq_plus_activation(bits: int, grid: Grid | None) -> Quantizer:
    return Quantizer(_integers(bits, grid), PerTensor(), Learned("gaussian", "lsq_features", offset=True), Inside())


# --- PACT: Choi et al., arXiv 1805.06085 -----------------------------------------------------------------------------
# Activations: 2^b levels from −α to α, which is UniformGrid; the paper's are behind a ReLU, from 0 to α. α starts at
# the Gaussian fit, not high above all values: only clipped elements and weight decay move it, which takes long.
# Weights per DoReFa (1606.06160), as in the paper: the same grid up to the largest weight of the tensor, at 1 bit
# ±mean|w|, straight-through. DoReFa's tanh is left out (tanh w = w(1 − w²/3 + …), and |w| is a few hundredths here),
# and so is its stretching of every weight to [−1, 1], which presumes a batch normalization behind the layer.


def _pact_weight(bits: int, grid: Grid | None) -> Quantizer:
    grid = UniformGrid(bits) if grid is None else grid
    return Quantizer(grid, PerTensor(), AbsMean() if bits == 1 else AbsMax(), StraightThrough())


def _pact_activation(bits: int, grid: Grid | None) -> Quantizer:
    grid = UniformGrid(bits) if grid is None else grid
    return Quantizer(grid, PerTensor(), Learned("gaussian", "pact"), Clip(1.0))


# --- ParetoQ: Liu et al., arXiv 2502.02631 ---------------------------------------------------------------------------
# 1 bit: elastic binarization, α·sign(w). 1.58 and 2 bits: SEQ, whose levels and mask in units of α are those of the
# mid-rise (at 1.58 bits ternary) grid and of Trust() in units of Δ = 2α/k, k the number of levels. From 3 bits on: LSQ.
# The paper quantizes weights only; activations take the same function with one step per layer.


def _paretoq(bits: int, grid: Grid | None, granularity: PerRow | PerTensor) -> Quantizer:
    if grid is not None and grid != TERNARY:
        raise ConfigError("paretoq has grids of its own; only -ternary can be named beside it")
    lsq = "lsq" if isinstance(granularity, PerRow) else "lsq_features"
    if bits == 1:
        return Quantizer(UniformGrid(1), granularity, Learned("absmean", "elastic"), Clip(1.0))
    if bits == 2:
        return Quantizer(grid or UniformGrid(2), granularity, Learned("stretched", lsq), Trust())
    return Quantizer(integer_grid(bits), granularity, Learned("absmax", lsq), Inside())


def _paretoq_weight(bits: int, grid: Grid | None) -> Quantizer:
    return _paretoq(bits, grid, PerRow())


def _paretoq_activation(bits: int, grid: Grid | None) -> Quantizer:
    return _paretoq(bits, grid, PerTensor())


# --- BitNet b1.58: Ma et al., arXiv 2402.17764 -----------------------------------------------------------------------


def _bitnet_weight(bits: int, grid: Grid | None) -> Quantizer:
    if bits != 2 or grid not in (None, TERNARY):
        raise ConfigError("bitnet has ternary weights, whose codes have 2 bits: write w2")
    return Quantizer(TERNARY, PerTensor(), AbsMean(), StraightThrough())


def _bitnet_activation(bits: int, grid: Grid | None) -> Quantizer:
    if bits != 8 or grid not in (None, TERNARY):
        raise ConfigError("bitnet has 8-bit activations: write a8")
    return Quantizer(INT8_SYMMETRIC, PerRow(), AbsMax(), StraightThrough())


METHODS: dict[str, Method] = {
    "lsq": Method(_lsq_weight, _lsq_activation, "arXiv 1902.08153"),
    "lsq+": Method(_lsq_plus_weight, _lsq_plus_activation, "arXiv 2004.09576"),
    "pact": Method(_pact_weight, _pact_activation, "arXiv 1805.06085"),
    "paretoq": Method(_paretoq_weight, _paretoq_activation, "arXiv 2502.02631"),
    "bitnet": Method(_bitnet_weight, _bitnet_activation, "arXiv 2402.17764"),
}

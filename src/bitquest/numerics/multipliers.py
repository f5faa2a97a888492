"""Where to clip a Gaussian: the multiplier α of a grid, s = α·σ.

For x ~ N(0, 1) and levels l_i in units of the step Δ, the nearest-level quantizer has cells bounded by the midpoints
m_i·Δ. Its mean squared error E(Δ) = Σ_i ∫_cell (x − Δ·l_i)² φ(x) dx is stationary where

    Δ · Σ l_i² P_i(Δ)  =  Σ l_i M_i(Δ),        P_i = ∫_cell φ,   M_i = ∫_cell x φ = φ(lower) − φ(upper),

because the derivative of the cell bounds cancels at midpoints. All of it is in closed form with the error function.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from statistics import NormalDist

# METHOD: the paper's multipliers, the default, so that results compare (arXiv 2502.05003 and the authors' code).
PAPER_UNIFORM = {
    1: 0.7978845587,
    2: 1.4935346200,
    3: 2.0510683541,
    4: 2.5139305786,
    5: 2.9160938835,
    6: 3.2765972826,
    7: 3.6010497188,
    8: 3.8849386788,
}
PAPER_TERNARY = 1.2240089519
PAPER_FP4 = 6 * 0.48707917  # the paper states the step's multiplier; the largest level is 6 steps


def _density(x: float) -> float:
    return 0.0 if math.isinf(x) else math.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _distribution(x: float) -> float:
    # The smaller tail is computed, never one minus it, so that far cells keep their digits.
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _cell_moments(levels: Sequence[float], step: float) -> list[tuple[float, float, float]]:
    """(level, P_i, M_i) of every cell at this step."""
    bounds = [-math.inf, *((a + b) / 2 * step for a, b in pairwise(levels)), math.inf]
    moments = []
    for level, low, high in zip(levels, bounds[:-1], bounds[1:], strict=True):
        if low > 0:  # mirror: differences of small tails instead of differences of numbers near one
            probability = _distribution(-low) - _distribution(-high)
        else:
            probability = _distribution(high) - _distribution(low)
        moments.append((level, probability, _density(low) - _density(high)))
    return moments


def gaussian_mse(levels: Sequence[float], step: float) -> float:
    """Mean squared error of rounding N(0, 1) to the nearest of `levels`·`step`. Levels increasing, in units of Δ."""
    moments = _cell_moments(levels, step)
    quadratic = sum(level * level * probability for level, probability, _ in moments)
    linear = sum(level * first for level, _, first in moments)
    return 1 - 2 * step * linear + step * step * quadratic


@cache
def gaussian_step(levels: tuple[float, ...]) -> float:
    """The step Δ (in units of σ) that minimises `gaussian_mse`, to about 1e-14 relative.

    The global minimum is bracketed on a geometric scan first: a codebook may have several stationary points.
    """
    scan = [10 ** (-4 + 6 * i / 600) / max(abs(level) for level in levels) for i in range(601)]
    best = min(range(1, len(scan) - 1), key=lambda i: gaussian_mse(levels, scan[i]))
    low, high = scan[best - 1], scan[best + 1]

    def slope(step: float) -> float:
        moments = _cell_moments(levels, step)
        return step * sum(lv * lv * p for lv, p, _ in moments) - sum(lv * m for lv, _, m in moments)

    for _ in range(100):
        middle = 0.5 * (low + high)
        if slope(middle) < 0:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


@cache
def lloyd_max_levels(bits: int) -> tuple[float, ...]:
    """The 2^bits levels (in units of σ, increasing, symmetric) of the least squared error for N(0, 1), to 9 digits.

    Lloyd (1982) and Max (1960): each level is the mean of its cell, and cells end halfway between levels. Newton's
    method on these equations for the positive half, from the density φ^(1/3) that is best for many levels (Panter and
    Dite, 1951); where a step of it leads away, each level moves to the mean of its cell instead (Lloyd's method, which
    converges for every log-concave density, but slowly).
    """
    half = 2 ** (bits - 1)
    levels = [3**0.5 * NormalDist().inv_cdf((half + i + 0.5) / (2 * half)) for i in range(half)]
    cells = _positive_cells(levels)
    for _ in range(500):
        newton = _newton_change(levels, cells)
        for part in (1.0, 0.5, 0.25, 0.125):
            trial = [level - part * step for level, step in zip(levels, newton, strict=True)]
            increasing = trial[0] > 0 and all(a < b for a, b in pairwise(trial))
            if increasing and _worst(_positive_cells(trial), trial) <= _worst(cells, levels):
                break
        else:
            trial = [moment / probability for probability, moment in cells]
        change = max(abs(a - b) for a, b in zip(levels, trial, strict=True))
        levels, cells = trial, _positive_cells(trial)
        if change < 1e-14:
            break
    positive = [round(level, 9) for level in levels]
    return (*(-level for level in reversed(positive)), *positive)


def _bounds(levels: Sequence[float]) -> list[float]:
    return [0.0, *((a + b) / 2 for a, b in pairwise(levels)), math.inf]


def _positive_cells(levels: Sequence[float]) -> list[tuple[float, float]]:
    """(P_i, M_i) of the cells of positive levels, the first of which begins at zero."""
    pairs = pairwise(_bounds(levels))
    return [(_distribution(-low) - _distribution(-high), _density(low) - _density(high)) for low, high in pairs]


def _worst(cells: list[tuple[float, float]], levels: Sequence[float]) -> float:
    """The largest distance of a level from the mean of its cell."""
    return max(abs(level - moment / probability) for level, (probability, moment) in zip(levels, cells, strict=True))


def _newton_change(levels: Sequence[float], cells: list[tuple[float, float]]) -> list[float]:
    """What Newton's method subtracts from the levels: l_i·P_i − M_i = 0, whose derivative is tridiagonal."""
    bounds = _bounds(levels)
    # ∂(l·P − M)/∂bound is ±(l − bound)·φ(bound), and a bound between two levels moves by half of each.
    lower = [-(level - bound) * _density(bound) / 2 for level, bound in zip(levels, bounds[:-1], strict=True)]
    upper = [
        0.0 if math.isinf(b) else (level - b) * _density(b) / 2 for level, b in zip(levels, bounds[1:], strict=True)
    ]
    lower[0] = 0.0  # zero stays where it is
    diagonal = [cell[0] + low + high for cell, low, high in zip(cells, lower, upper, strict=True)]
    known = [level * cell[0] - cell[1] for level, cell in zip(levels, cells, strict=True)]
    for i in range(1, len(levels)):
        factor = lower[i] / diagonal[i - 1]
        diagonal[i] -= factor * upper[i - 1]
        known[i] -= factor * known[i - 1]
    for i in reversed(range(len(levels))):
        known[i] = (known[i] - (upper[i] * known[i + 1] if i + 1 < len(levels) else 0.0)) / diagonal[i]
    return known

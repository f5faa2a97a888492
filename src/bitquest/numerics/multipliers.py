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

"""α_b against METHOD's table: the paper's by default, the exact ones derived."""

import math

import pytest
import torch

from bitquest.numerics import ALL_GRIDS, FP4, TERNARY, CodebookGrid, UniformGrid, gaussian_mse, gaussian_step
from bitquest.numerics.multipliers import PAPER_FP4, PAPER_TERNARY

PAPER = [0.7978845587, 1.4935346200, 2.0510683541, 2.5139305786, 2.9160938835, 3.2765972826, 3.6010497188, 3.8849386788]
EXACT = [math.sqrt(2 / math.pi), 1.49353003, 2.05106805, 2.51400460, 2.91615125, 3.27798480, 3.61109720, 3.92220442]
MSE = {1: 0.363380, 2: 0.118846, 3: 0.037440, 4: 0.011543, 8: 0.0000878}


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_papers_multipliers_are_the_default(bits: int) -> None:
    assert UniformGrid(bits).clip_multiplier == PAPER[bits - 1]


@pytest.mark.parametrize("bits", range(1, 9))
def test_exact_multipliers_are_derived(bits: int) -> None:
    assert UniformGrid(bits, exact=True).clip_multiplier == pytest.approx(EXACT[bits - 1], abs=1.1e-8)


@pytest.mark.parametrize("bits", MSE)
def test_gaussian_error_of_the_papers_grids(bits: int) -> None:
    grid = UniformGrid(bits)
    assert gaussian_mse(grid.levels, grid.clip_multiplier / grid.max_level) == pytest.approx(MSE[bits], rel=2e-3 / bits)


def test_eight_bits_cost_what_method_says() -> None:
    paper, exact = UniformGrid(8), UniformGrid(8, exact=True)
    assert gaussian_mse(paper.levels, paper.clip_multiplier / paper.max_level) == pytest.approx(8.7822e-5, abs=1e-9)
    assert gaussian_mse(exact.levels, exact.clip_multiplier / exact.max_level) == pytest.approx(8.7686e-5, abs=1e-9)


def test_ternary_and_fp4() -> None:
    assert TERNARY.clip_multiplier == PAPER_TERNARY == 1.2240089519
    assert gaussian_step(TERNARY.levels) == pytest.approx(1.22400636, abs=6e-9)
    assert gaussian_mse(TERNARY.levels, PAPER_TERNARY) == pytest.approx(0.190174, abs=1e-6)
    assert FP4.clip_multiplier == PAPER_FP4 == 6 * 0.48707917
    assert gaussian_step(FP4.levels) == pytest.approx(0.48707917, abs=2e-8)
    assert gaussian_mse(FP4.levels, 0.48707917) == pytest.approx(0.0126849, abs=1e-7)
    assert CodebookGrid("ternary", TERNARY.levels, exact=True).clip_multiplier == gaussian_step(TERNARY.levels)


@pytest.mark.parametrize("grid", ALL_GRIDS, ids=str)
def test_the_derived_step_is_a_minimum_and_matches_samples(grid: object) -> None:
    levels = grid.levels  # type: ignore[attr-defined]
    step = gaussian_step(levels)
    best = gaussian_mse(levels, step)
    assert best < gaussian_mse(levels, step * 1.001)
    assert best < gaussian_mse(levels, step * 0.999)
    x = torch.special.ndtri((torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000)
    nearest = torch.tensor(levels, dtype=torch.float64)
    error = (x.unsqueeze(-1) - nearest * step).abs().amin(-1).square().mean()
    assert float(error) == pytest.approx(best, rel=0.03)

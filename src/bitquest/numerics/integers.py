"""Exact integer arithmetic: the integer behind each level, so that a layer is one integer product and one scale.

A level is unit · (factor·a + offset) with `a` an int8. Uniform grids up to 7 bits: a = 2c + 1, an odd integer, unit ½.
8 bits: ±255 does not fit int8, so a = c, factor 2, offset 1, corrected by row sums:
(2c + 1)(2d + 1) = 4cd + 2c + 2d + 1. Ternary: a = c. FP4: a = 2·level ∈ {0, ±1, ±2, ±3, ±4, ±6, ±8, ±12}.
Source: METHOD, "Exact integer arithmetic".
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from bitquest.numerics.grids import CodebookGrid, Grid, UniformGrid


@dataclass(frozen=True)
class IntegerForm:
    """level = unit · (factor·a + offset); for codebooks `table` maps u = c + 2^(bits−1) to a."""

    unit: float
    factor: int
    offset: int
    bits: int
    table: tuple[int, ...] | None = None

    @property
    def largest(self) -> int:
        """Upper bound of |factor·a + offset|, for choosing an accumulator that cannot overflow."""
        if self.table is not None:
            return max(abs(a) for a in self.table)
        return int(2**self.bits - 1)

    def of_codes(self, codes: Tensor, kept: Tensor | None = None) -> Tensor:
        """The int8 factors `a` of codes (…, K); dropped elements are 0 (which only offset 0 can represent)."""
        if self.table is not None:
            table = torch.tensor(self.table, dtype=torch.int8, device=codes.device)
            a = table[codes.to(torch.int64) + 2 ** (self.bits - 1)]
        elif self.offset:
            a = codes
        else:
            a = codes * 2 + 1
        return a if kept is None else a * kept


def integer_form(grid: Grid) -> IntegerForm | None:
    """The integers of a grid, or None for a codebook whose levels are no small multiples of a common unit."""
    if isinstance(grid, UniformGrid):
        return IntegerForm(0.5, 2, 1, 8) if grid.bits == 8 else IntegerForm(0.5, 1, 0, grid.bits)
    return _codebook_form(grid)


def _codebook_form(grid: CodebookGrid) -> IntegerForm | None:
    for parts in (1, 2, 4, 8, 16):
        scaled = [level * parts for level in grid.levels]
        if all(level == int(level) and abs(level) <= 127 for level in scaled):
            return IntegerForm(1 / parts, 1, 0, grid.bits, tuple(int(level) for level in scaled))
    return None

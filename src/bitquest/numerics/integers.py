"""Exact integer arithmetic: the integer behind each level, so that a layer is one integer product and one scale.

A level is unit · (factor·a + offset) with `a` an int8. Uniform grids up to 7 bits: a = 2c + 1, an odd integer, unit ½.
8 bits: ±255 does not fit int8, so a = c, factor 2, offset 1, corrected by row sums:
(2c + 1)(2d + 1) = 4cd + 2c + 2d + 1. Ternary: a = c. FP4: a = 2·level ∈ {0, ±1, ±2, ±3, ±4, ±6, ±8, ±12}.
Source: METHOD, "Exact integer arithmetic".
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from bitquest.numerics.grids import CodebookGrid, Grid, UniformGrid
from bitquest.numerics.rotations import without_autocast

_EXACT_PART = 1024  # elements: 1024 · 128² = 2^24


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


def integer_product(x_a: Tensor, w_a: Tensor) -> Tensor:
    """Σ_k x_a[t, k]·w_a[n, k] as int32 (T, N), from int8 (T, K) and (N, K). Exact for K < 2^17."""
    if x_a.device.type != "cuda":
        if x_a.device.type == "cpu" and not _torch_is_exact():
            return _product_of_floats(x_a, w_a)
        if x_a.shape[1] == 1:  # a column is its own transpose in memory, which the CPU kernel reads wrongly
            x_a, w_a = (torch.nn.functional.pad(a, (0, 1)) for a in (x_a, w_a))
        return torch._int_mm(x_a, w_a.t())
    # The CUDA kernel wants more than 16 rows and multiples of 8; zeros add nothing.
    tokens, width, channels = x_a.shape[0], x_a.shape[1], w_a.shape[0]
    x_a = torch.nn.functional.pad(x_a, (0, -width % 8, 0, max(32 - tokens, 0)))
    w_a = torch.nn.functional.pad(w_a, (0, -width % 8, 0, -channels % 8))
    return torch._int_mm(x_a, w_a.t())[:tokens, :channels]


@cache
def _torch_is_exact() -> bool:
    """Whether torch's int8 product is one here: without VNNI, oneDNN saturates sums of pairs at 16 bits."""
    extremes = torch.tensor([-128, -127, 127], dtype=torch.int8, device="cpu")
    for one in extremes:
        for other in extremes:
            product = torch._int_mm(one.expand(32, 64).contiguous(), other.expand(32, 64).contiguous().t())
            if bool((product != 64 * int(one) * int(other)).any()):
                return False
    return True


def _product_of_floats(x_a: Tensor, w_a: Tensor) -> Tensor:
    """The same from float32 products over parts of K so short that every partial sum is an integer below 2^24."""
    total = torch.zeros(x_a.shape[0], w_a.shape[0], dtype=torch.int32, device=x_a.device)
    for x_part, w_part in zip(x_a.split(_EXACT_PART, 1), w_a.split(_EXACT_PART, 1), strict=True):
        total += float_linear(x_part.to(torch.float32), w_part.to(torch.float32)).to(torch.int32)
    return total


def _dot(x_a: Tensor, w_a: Tensor, x_form: IntegerForm, w_form: IntegerForm) -> Tensor:
    """Σ (p·a + q)(r·b + s) = pr·Σab + ps·Σa + qr·Σb + qs·K over one scale group, as float32 of an exact integer."""
    total = integer_product(x_a, w_a)
    if not x_form.offset and not w_form.offset and x_form.factor == w_form.factor == 1:
        return total.to(torch.float32)
    width = x_a.shape[1]
    wide = width * x_form.largest * w_form.largest >= 2**31
    dtype = torch.int64 if wide else torch.int32
    total = total.to(dtype) * (x_form.factor * w_form.factor)
    if w_form.offset:
        total += x_a.sum(1, dtype=dtype).unsqueeze(1) * (x_form.factor * w_form.offset)
    if x_form.offset:
        total += w_a.sum(1, dtype=dtype) * (x_form.offset * w_form.factor)
    return total.add_(width * x_form.offset * w_form.offset).to(torch.float32)


def integer_linear(
    x_a: Tensor, x_step: Tensor, w_a: Tensor, w_step: Tensor, x_form: IntegerForm, w_form: IntegerForm
) -> Tensor:
    """x Wᵀ (T, N), float32, from int8 factors (T, K), (N, K) and their steps: one integer dot per scale group.

    Steps are (T, 1) or (T, groups), and (N, 1), (N, groups) or (1, 1); the finer grouping must subdivide the coarser.
    """
    groups = max(x_step.shape[-1], w_step.shape[-1])
    size = x_a.shape[-1] // groups
    result: Tensor | None = None
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        x_scale = x_step[:, g * x_step.shape[-1] // groups].unsqueeze(-1)
        w_scale = w_step[:, g * w_step.shape[-1] // groups]
        dot = _dot(x_a[:, part].contiguous(), w_a[:, part], x_form, w_form)
        dot.mul_(x_scale * (x_form.unit * w_form.unit)).mul_(w_scale)
        result = dot if result is None else result.add_(dot)
    assert result is not None
    return result


def float_linear(x: Tensor, w: Tensor) -> Tensor:
    """x Wᵀ in float32 for float32 operands, autocast or not."""
    with without_autocast(x.device.type):
        return torch.nn.functional.linear(x, w)


def weight_only_linear(x_h: Tensor, w_a: Tensor, w_step: Tensor, w_form: IntegerForm) -> Tensor:
    """x_h Wᵀ (T, N) for float x_h (T, K) in rotated space: float times integers, one scale per channel or group."""
    groups = w_step.shape[-1]
    size = x_h.shape[-1] // groups
    result: Tensor | None = None
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        integers = w_a[:, part].to(torch.float32)
        if w_form.offset or w_form.factor != 1:
            integers.mul_(w_form.factor).add_(w_form.offset)
        product = float_linear(x_h[:, part], integers).mul_(w_step[:, g] * w_form.unit)
        result = product if result is None else result.add_(product)
    assert result is not None
    return result

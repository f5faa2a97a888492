"""The heart of QuEST: what a layer does to each of its two operands, forward and backward.

A linear layer computes y = x Wᵀ. QuEST trains it with both x and W reduced to a few bits, in four moves:

1. Rotate. x_h = xH, W_h = WH, with H orthonormal and block-diagonal (rotations.py). Since HHᵀ = I the product is
   unchanged, (xH)(WH)ᵀ = xWᵀ, but every rotated value is a sum of many: rows look Gaussian, outliers are gone.
2. Scale. σ is the root mean square of a row (or group); a Gaussian on a grid of 2^b levels is best clipped at
   s = α·σ, α known in closed form (multipliers.py, scaling.py). The grid's step is Δ = 2s/(2^b − 1).
3. Round to the nearest level (grids.py). The levels are Δ(c + ½): odd multiples of Δ/2, no zero. So the integers
   2c + 1 carry everything, and a packed layer multiplies integers and scales once (integers.py).
4. In the backward pass pretend that rounding was the identity, but only where it can be trusted: where |x_q − x_h| is
   at most half a step, which on a dense uniform grid is everything but clipped outliers (estimators.py). With G the
   gradient with respect to x_q,

       ∂L/∂x = (G ⊙ M) Hᵀ,         M, σ and s constants to autograd.

   A learned step (LSQ) also receives ∂L/∂Δ = Σ G ⊙ (x_q − x_h ⊙ M)/Δ over the elements that share it; other methods
   give it other gradients (scaling.py, `Learned`).

This file is the definition: `fake_quantize_forward` and `fake_quantize_backward` say it in float32, whatever the
dtype that comes in, and every faster path is tested against them. Sizes: x is (…, K), steps are (…, 1), (…, K/group)
or (1, …, 1). Source: METHOD; Panferov et al., arXiv 2502.05003.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.estimators import mask_after_rounding, mask_before_rounding
from bitquest.numerics.grids import Grid
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import Rotation
from bitquest.numerics.scaling import EPSILON, Learned


class Encoded(NamedTuple):
    """An operand as integers: the value is step · level(code) where kept, else zero."""

    codes: Tensor  # int8 (…, K), centred; 0 where not kept
    step: Tensor  # float32 Δ, (…, 1), (…, K/group) or (1, …, 1)
    kept: Tensor | None  # bool (…, K) under N:M sparsity


class FakeQuantized(NamedTuple):
    """What the forward pass leaves for the next layer and for its own backward pass."""

    values: Tensor  # (…, K) in rotated space, dtype of the input
    mask: Tensor  # bool (…, K): M; empty when every element passes
    residual: Tensor  # float32 (…, K): ∂x_q/∂Δ of each element for a learned step; else empty


def _in_steps(
    x: Tensor, quantizer: Quantizer, rotation: Rotation, step: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rotate and scale: x_h/Δ grouped by shared step (ours to overwrite), Δ as (…, 1), and kept, grouped alike."""
    if not x.is_floating_point():
        raise ConfigError(f"only floating-point tensors are quantized, not {x.dtype}")
    quantizer.check(x.shape[-1])
    x_h = rotation.apply(x)
    kept = quantizer.sparsity.kept(x_h)
    grouped = quantizer.granularity.grouped(x_h)
    if step is None:
        delta = quantizer.scale.step(grouped, quantizer.grid)
    else:
        delta = step.unsqueeze(-1) if grouped.dim() > x.dim() else step
    ours = x_h.data_ptr() != x.data_ptr()
    if kept is not None:
        kept = kept.reshape(grouped.shape)
    return (grouped.div_(delta) if ours else grouped / delta), delta, kept


def fake_quantize_forward(
    x: Tensor, quantizer: Quantizer, rotation: Rotation, step: Tensor | None = None
) -> FakeQuantized:
    """Steps 1 to 3. x (…, K) of any float dtype; `step` replaces the scale rule's Δ (learned or frozen).

    Raises ConfigError if x is no float or K does not fit the rotation, the groups or the sparsity pattern.
    """
    grid = quantizer.grid
    t, delta, kept = _in_steps(x, quantizer, rotation, step)
    mask = mask_before_rounding(quantizer.estimator, t, grid, kept)
    learned = step is not None and quantizer.is_learned
    before = t.clone() if mask is None or learned else None
    q = grid.nearest_(t)
    if kept is not None:
        q.mul_(kept)
    residual = torch.empty(0, dtype=torch.float32, device=x.device)
    if before is not None:
        if mask is None:
            mask = mask_after_rounding(quantizer.estimator, before, q, grid)
        if learned:
            residual = _residual(q, before, mask, quantizer).reshape(x.shape)
    assert mask is not None
    values = q.mul_(delta).reshape(x.shape).to(x.dtype)
    return FakeQuantized(values, mask.reshape(x.shape) if mask.numel() else mask, residual)


def _residual(q: Tensor, before: Tensor, mask: Tensor, quantizer: Quantizer) -> Tensor:
    """∂x_q/∂Δ of every element, by the rule of the learned step. q, before in units of Δ; an empty mask: all pass."""
    assert isinstance(quantizer.scale, Learned)
    match quantizer.scale.gradient:
        case "pact":
            return q * ~mask if mask.numel() else torch.zeros_like(q)
        case "elastic":
            return q.clone()
    return q - (before * mask if mask.numel() else before)


def fake_quantize_backward(gradient: Tensor, mask: Tensor, rotation: Rotation) -> Tensor:
    """Step 4: (G ⊙ M)Hᵀ, in the gradient's dtype. An empty mask passes everything."""
    trusted = gradient * mask if mask.numel() else gradient
    return rotation.inverse(trusted).to(gradient.dtype)


def step_gradient(gradient: Tensor, residual: Tensor, step_shape: torch.Size, quantizer: Quantizer) -> Tensor:
    """∂L/∂Δ of a learned step, shaped as the step, float32. LSQ's is divided by √(N · largest level), see `Learned`."""
    assert isinstance(quantizer.scale, Learned)
    product = gradient.to(torch.float32) * residual
    grouped = quantizer.granularity.grouped(product)
    summed = grouped.sum(-1, keepdim=True).reshape(step_shape)
    if quantizer.scale.gradient == "pact":
        return summed
    elements = residual.shape[-1] if quantizer.scale.gradient == "lsq_features" else grouped.shape[-1]
    return summed.div_((elements * quantizer.grid.levels[-1]) ** 0.5)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor | None, quantizer: Quantizer, rotation: Rotation) -> Tensor:
        made = fake_quantize_forward(x, quantizer, rotation, step)
        ctx.save_for_backward(made.mask, made.residual)
        ctx.quantizer, ctx.rotation = quantizer, rotation
        ctx.step_shape = step.shape if step is not None and quantizer.is_learned else None
        return made.values

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        mask, residual = ctx.saved_tensors
        d_step = None
        if ctx.step_shape is not None:
            d_step = step_gradient(gradient, residual, ctx.step_shape, ctx.quantizer)
        return fake_quantize_backward(gradient, mask, ctx.rotation), d_step, None, None


def fake_quantize(x: Tensor, quantizer: Quantizer, rotation: Rotation, step: Tensor | None = None) -> Tensor:
    """Quantized values of x (…, K) in rotated space, in x's dtype; the gradient arrives in x's own space.

    step: a given Δ instead of the scale rule's; for a `Learned` quantizer it is differentiable.
    """
    result: Tensor = _FakeQuantize.apply(x, step, quantizer, rotation.resolve(x.shape[-1]))
    return result


def encode(x: Tensor, quantizer: Quantizer, rotation: Rotation, step: Tensor | None = None) -> Encoded:
    """Codes, step and kept mask of x (…, K): the integers behind `fake_quantize`. No gradient."""
    with torch.no_grad():
        rotation = rotation.resolve(x.shape[-1])
        t, delta, kept = _in_steps(x, quantizer, rotation, step)
        codes = quantizer.grid.encode(t)
        if kept is not None:
            codes, kept = codes * kept, kept.reshape(x.shape)
        shape = quantizer.granularity.step_shape(tuple(x.shape)) if step is None else tuple(step.shape)
        return Encoded(codes.reshape(x.shape), delta.reshape(shape), kept)


_FITTED, _ROUNDS = 1 << 14, 10  # values looked at, and rounds of fitting from each start
_TAILS = (0.0, 0.01, 0.05, 0.15)  # shares of the values left outside the levels at a start, on either side


def fit_offset(x_h: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Where LSQ+ starts: step (1, 1) and offset (1,), float32, of least ‖Q((x_h − β)/Δ)·Δ + β − x_h‖² (section 3.2).

    x_h: (…, K) rotated. From levels that span all values (the paper's other choice), or all but a share at either end,
    it alternates between the nearest levels and, given those, the line of least squares; the best end counts.
    """
    values = x_h.detach().to(torch.float32).flatten()
    values = values[:: -(-values.numel() // _FITTED)]
    lowest, highest = quantizer.grid.levels[0], quantizer.grid.levels[-1]
    lows, highs = (torch.quantile(values, values.new_tensor(ends)) for ends in (_TAILS, [1 - t for t in _TAILS]))
    step = ((highs - lows.unsqueeze(1)) / (highest - lowest)).clamp_min(EPSILON).reshape(-1, 1)
    offset = lows.repeat_interleave(len(_TAILS)).unsqueeze(1) - step * lowest
    for _ in range(_ROUNDS):
        levels = quantizer.grid.nearest_((values - offset) / step)
        spread, middle = torch.var_mean(levels, dim=1, correction=0, keepdim=True)
        slope = ((levels - middle) * values).mean(1, keepdim=True) / spread
        moved = slope > 0  # not where all values lie on one level
        step = torch.where(moved, slope, step)
        offset = torch.where(moved, values.mean() - slope * middle, offset)
    error = (quantizer.grid.nearest_((values - offset) / step) * step + offset - values).square().mean(1)
    best = int(error.argmin())
    return step[best].reshape(1, 1), offset[best].reshape(1)


def quantize(x: Tensor, quantizer: Quantizer, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """int8 codes c (…, K) and float32 step Δ of x. For sparse quantizers use `encode`, which returns the mask too."""
    if quantizer.is_sparse:
        raise ConfigError("codes alone cannot say what N:M sparsity dropped; use encode(), which returns the kept mask")
    codes, step, _ = encode(x, quantizer, rotation)
    return codes, step


def dequantize(codes: Tensor, step: Tensor, grid: Grid, kept: Tensor | None = None) -> Tensor:
    """Values (float32, rotated space) of codes (…, K) with steps (…, 1), (…, K/group) or (1, …, 1)."""
    values = grid.decode(codes)
    groups = step.shape[-1]
    if groups == 1:
        values.mul_(step)
    else:
        values = values.unflatten(-1, (groups, -1)).mul_(step.unsqueeze(-1)).flatten(-2)
    return values if kept is None else values.mul_(kept)

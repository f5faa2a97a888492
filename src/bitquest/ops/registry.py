"""One schema per operation, with numerics as its default backend: what layers call, and what faster kernels implement.

A quantizer crosses the schema as its JSON text and a rotation as its block size (1: none), so that `torch.compile`,
CUDA graphs and exported programs see plain values. Faster backends register the same operators for their device.
"""

import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bitquest.numerics.estimators import passes_everything
from bitquest.numerics.fake_quant import fake_quantize_backward, fake_quantize_forward, step_gradient
from bitquest.numerics.grids import Grid
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import rotation_from_block


@lru_cache(maxsize=256)
def quantizer_text(quantizer: Quantizer) -> str:
    """The quantizer as the operators take it."""
    return json.dumps(quantizer.to_json(), separators=(",", ":"))


@lru_cache(maxsize=256)
def parse_quantizer(text: str) -> Quantizer:
    """The quantizer that `quantizer_text` wrote."""
    return Quantizer.from_json(json.loads(text))


@lru_cache(maxsize=256)
def grid_text(grid: Grid) -> str:
    """The grid as the operators take it."""
    return json.dumps(grid.to_json(), separators=(",", ":"))


# --- fake_quantize -------------------------------------------------------------------------------------------------


@torch.library.custom_op("bitquest::fake_quantize", mutates_args=())
def fake_quantize_op(x: Tensor, step: Tensor | None, quantizer: str, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values, mask, residual) of `numerics.fake_quant.fake_quantize_forward`."""
    made = fake_quantize_forward(x, parse_quantizer(quantizer), rotation_from_block(block), step)
    return made.values, made.mask, made.residual


@fake_quantize_op.register_fake
def _(x: Tensor, step: Tensor | None, quantizer: str, block: int) -> tuple[Tensor, Tensor, Tensor]:
    q = parse_quantizer(quantizer)
    mask = x.new_empty(0 if passes_everything(q.estimator, q.grid) else x.shape, dtype=torch.bool)
    residual = x.new_empty(x.shape if step is not None and q.is_learned else 0, dtype=torch.float32)
    return x.new_empty(x.shape), mask, residual


@torch.library.custom_op("bitquest::fake_quantize_backward", mutates_args=())
def fake_quantize_backward_op(gradient: Tensor, mask: Tensor, block: int) -> Tensor:
    """(G ⊙ M)Hᵀ."""
    result = fake_quantize_backward(gradient, mask, rotation_from_block(block))
    return result.clone() if result.data_ptr() == gradient.data_ptr() else result


@fake_quantize_backward_op.register_fake
def _(gradient: Tensor, mask: Tensor, block: int) -> Tensor:
    return gradient.new_empty(gradient.shape)


@torch.library.custom_op("bitquest::step_gradient", mutates_args=())
def step_gradient_op(gradient: Tensor, residual: Tensor, step: Tensor, quantizer: str) -> Tensor:
    """∂L/∂Δ of a learned step."""
    return step_gradient(gradient, residual, step.shape, parse_quantizer(quantizer))


@step_gradient_op.register_fake
def _(gradient: Tensor, residual: Tensor, step: Tensor, quantizer: str) -> Tensor:
    return step.new_empty(step.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    _, step, ctx.quantizer, ctx.block = inputs
    _, mask, residual = output
    ctx.mark_non_differentiable(mask, residual)
    ctx.learned = step is not None and parse_quantizer(ctx.quantizer).is_learned
    ctx.save_for_backward(mask, residual, step if ctx.learned else None)


def _backward(ctx: Any, gradient: Tensor, *_: Any) -> Any:
    mask, residual, step = ctx.saved_tensors
    d_x = fake_quantize_backward_op(gradient, mask, ctx.block) if ctx.needs_input_grad[0] else None
    d_step = step_gradient_op(gradient, residual, step, ctx.quantizer) if ctx.learned else None
    return d_x, d_step, None, None


fake_quantize_op.register_autograd(_backward, setup_context=_save)


# --- rotate --------------------------------------------------------------------------------------------------------


@torch.library.custom_op("bitquest::rotate", mutates_args=())
def rotate_op(x: Tensor, block: int) -> Tensor:
    """xH in x's dtype, computed in float32."""
    rotated = rotation_from_block(block).apply(x).to(x.dtype)
    return rotated.clone() if rotated.data_ptr() == x.data_ptr() else rotated


@rotate_op.register_fake
def _(x: Tensor, block: int) -> Tensor:
    return x.new_empty(x.shape)


def _save_block(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.block = inputs[1]


def _rotate_back(ctx: Any, gradient: Tensor) -> Any:
    return rotate_op(gradient, ctx.block), None  # H is symmetric


rotate_op.register_autograd(_rotate_back, setup_context=_save_block)

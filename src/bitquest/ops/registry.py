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
from bitquest.numerics.fake_quant import encode as encode_reference
from bitquest.numerics.fake_quant import fake_quantize_backward, fake_quantize_forward, step_gradient
from bitquest.numerics.grids import Grid, grid_from_json
from bitquest.numerics.integers import IntegerForm, integer_form
from bitquest.numerics.integers import integer_linear as integer_linear_reference
from bitquest.numerics.integers import weight_only_linear as weight_only_linear_reference
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import rotation_from_block


@lru_cache(maxsize=256)
def quantizer_text(quantizer: Quantizer) -> str:
    """The quantizer as the operators take it."""
    return json.dumps(quantizer.to_json(), separators=(",", ":"))


@lru_cache(maxsize=256)
def _quantizer(text: str) -> Quantizer:
    return Quantizer.from_json(json.loads(text))


@lru_cache(maxsize=256)
def grid_text(grid: Grid) -> str:
    """The grid as the operators take it."""
    return json.dumps(grid.to_json(), separators=(",", ":"))


@lru_cache(maxsize=256)
def _form(text: str) -> IntegerForm:
    form = integer_form(grid_from_json(json.loads(text)))
    assert form is not None, "layers ask for the integer path only where the grid has integers"
    return form


# --- fake_quantize -------------------------------------------------------------------------------------------------


@torch.library.custom_op("bitquest::fake_quantize", mutates_args=())
def fake_quantize_op(x: Tensor, step: Tensor | None, quantizer: str, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values, mask, residual) of `numerics.fake_quant.fake_quantize_forward`."""
    made = fake_quantize_forward(x, _quantizer(quantizer), rotation_from_block(block), step)
    return made.values, made.mask, made.residual


@fake_quantize_op.register_fake
def _(x: Tensor, step: Tensor | None, quantizer: str, block: int) -> tuple[Tensor, Tensor, Tensor]:
    q = _quantizer(quantizer)
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
    return step_gradient(gradient, residual, step.shape, _quantizer(quantizer))


@step_gradient_op.register_fake
def _(gradient: Tensor, residual: Tensor, step: Tensor, quantizer: str) -> Tensor:
    return step.new_empty(step.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    _, step, ctx.quantizer, ctx.block = inputs
    _, mask, residual = output
    ctx.mark_non_differentiable(mask, residual)
    ctx.learned = step is not None and _quantizer(ctx.quantizer).is_learned
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


# --- integers ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("bitquest::encode", mutates_args=())
def encode_op(x: Tensor, step: Tensor | None, quantizer: str, block: int) -> tuple[Tensor, Tensor]:
    """int8 codes (…, K) and float32 step of a dense operand."""
    codes, delta, _ = encode_reference(x, _quantizer(quantizer), rotation_from_block(block), step)
    return codes, delta.clone() if step is not None else delta


@encode_op.register_fake
def _(x: Tensor, step: Tensor | None, quantizer: str, block: int) -> tuple[Tensor, Tensor]:
    shape = _quantizer(quantizer).granularity.step_shape(tuple(x.shape)) if step is None else step.shape
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("bitquest::integer_linear", mutates_args=())
def integer_linear_op(
    x_codes: Tensor, x_step: Tensor, w_factors: Tensor, w_step: Tensor, x_grid: str, w_grid: str
) -> Tensor:
    """x Wᵀ (T, N) float32 from codes (T, K) of the activation and integer factors (N, K) of the weight."""
    x_form, w_form = _form(x_grid), _form(w_grid)
    return integer_linear_reference(x_form.of_codes(x_codes), x_step, w_factors, w_step, x_form, w_form)


@integer_linear_op.register_fake
def _(x_codes: Tensor, x_step: Tensor, w_factors: Tensor, w_step: Tensor, x_grid: str, w_grid: str) -> Tensor:
    return x_codes.new_empty((x_codes.shape[0], w_factors.shape[0]), dtype=torch.float32)


@torch.library.custom_op("bitquest::weight_only_linear", mutates_args=())
def weight_only_linear_op(x_h: Tensor, w_factors: Tensor, w_step: Tensor, w_grid: str) -> Tensor:
    """x_h Wᵀ (T, N) float32 from rotated float32 x_h (T, K) and integer factors (N, K) of the weight."""
    return weight_only_linear_reference(x_h, w_factors, w_step, _form(w_grid))


@weight_only_linear_op.register_fake
def _(x_h: Tensor, w_factors: Tensor, w_step: Tensor, w_grid: str) -> Tensor:
    return x_h.new_empty((x_h.shape[0], w_factors.shape[0]), dtype=torch.float32)

"""The engines as operators: one torch.library schema per operation, the backend named by a constant string.

Layers call these and never an engine itself, so that `torch.compile` sees ordinary operators with fake kernels, and
CUDA graphs see nothing but launches. Parts of QuantizedRows that were not asked for are empty tensors here.
T rows, K elements of a row, G scale groups, N out_features.
"""

import json
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from bitquest.numerics.estimators import passes_everything
from bitquest.numerics.grids import Grid, grid_from_json
from bitquest.numerics.packing import packed_width
from bitquest.ops.backend import engine
from bitquest.ops.linear_spec import LinearSpec
from bitquest.ops.registry import parse_quantizer
from bitquest.ops.rows import PARTS, Prologue, QuantizedRows, RMSNorm, SwiGLU


@lru_cache(maxsize=64)
def _wanted(want: str) -> frozenset[str]:
    return frozenset(want.split(","))


@lru_cache(maxsize=64)
def _grid(text: str) -> Grid:
    return grid_from_json(json.loads(text))


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch kernels on the GPU that the tensor is on, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def _prologue(norm_weight: Tensor | None, eps: float, up: Tensor | None) -> Prologue | None:
    if norm_weight is not None:
        return RMSNorm(norm_weight, eps)
    return None if up is None else SwiGLU(up)


def _operands(prologue: Prologue | None) -> tuple[Tensor | None, float, Tensor | None]:
    """A prologue as operators take it: norm_weight, eps, up."""
    if isinstance(prologue, RMSNorm):
        return prologue.weight, prologue.eps, None
    return None, 0.0, None if prologue is None else prologue.up


def _empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=x.device)


@torch.library.custom_op("bitquest::quantize_rows", mutates_args=())
def quantize_rows_op(
    x: Tensor,
    step: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    up: Tensor | None,
    quantizer: str,
    block: int,
    want: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(factors, packed, step, mask, sums) of x (T, K) behind its prologue; `want` lists parts, comma-separated."""
    with on_device(x):
        rows = engine(backend).quantize_rows(
            x, parse_quantizer(quantizer), block, _wanted(want), step, _prologue(norm_weight, eps, up)
        )
    delta = rows.step.clone() if step is not None and rows.step.data_ptr() == step.data_ptr() else rows.step
    return (
        _empty(x, torch.int8) if rows.factors is None else rows.factors,
        _empty(x, torch.uint8) if rows.packed is None else rows.packed,
        delta,
        _empty(x, torch.uint8) if rows.mask is None else rows.mask,
        _empty(x, torch.int32) if rows.sums is None else rows.sums,
    )


@quantize_rows_op.register_fake
def _(
    x: Tensor,
    step: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    up: Tensor | None,
    quantizer: str,
    block: int,
    want: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, parts, (rows, width) = parse_quantizer(quantizer), _wanted(want), x.shape
    step_shape = q.granularity.step_shape((rows, width)) if step is None else tuple(step.shape)

    def made(part: str, columns: int, dtype: torch.dtype) -> Tensor:
        return x.new_empty((rows, columns) if part in parts else 0, dtype=dtype)

    mask = made("mask", packed_width(width, 1), torch.uint8)
    if passes_everything(q.estimator, q.grid):
        mask = x.new_empty(0, dtype=torch.uint8)
    return (
        made("factors", width, torch.int8),
        made("packed", packed_width(width, q.bits), torch.uint8),
        x.new_empty(step_shape, dtype=torch.float32),
        mask,
        made("sums", step_shape[-1], torch.int32),
    )


def quantize_rows(
    x: Tensor,
    quantizer: str,
    block: int,
    want: frozenset[str],
    backend: str,
    step: Tensor | None = None,
    prologue: Prologue | None = None,
) -> QuantizedRows:
    """The operator, with the parts that were not asked for as None."""
    asked = ",".join(part for part in PARTS if part in want)
    factors, packed, delta, mask, sums = quantize_rows_op(
        x, step, *_operands(prologue), quantizer, block, asked, backend
    )
    return QuantizedRows(
        factors if "factors" in want else None,
        packed if "packed" in want else None,
        delta,
        mask if "mask" in want else None,
        sums if "sums" in want else None,
    )


@torch.library.custom_op("bitquest::rotate_rows", mutates_args=())
def rotate_rows_op(
    x: Tensor, norm_weight: Tensor | None, eps: float, up: Tensor | None, block: int, backend: str
) -> Tensor:
    """x (T, K) behind its prologue, rotated, float32."""
    with on_device(x):
        rotated = engine(backend).rotate(x, block, _prologue(norm_weight, eps, up))
    return rotated.clone() if rotated.data_ptr() == x.data_ptr() else rotated


@rotate_rows_op.register_fake
def _(x: Tensor, norm_weight: Tensor | None, eps: float, up: Tensor | None, block: int, backend: str) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def rotate_rows(x: Tensor, block: int, backend: str, prologue: Prologue | None = None) -> Tensor:
    """The operator, its prologue as one value."""
    rotated: Tensor = rotate_rows_op(x, *_operands(prologue), block, backend)
    return rotated


@torch.library.custom_op("bitquest::dequantize_rows", mutates_args=())
def dequantize_rows_op(
    factors: Tensor | None, packed: Tensor | None, step: Tensor, grid: str, width: int, dtype: torch.dtype, backend: str
) -> Tensor:
    """Values (T, K) in rotated space, in `dtype`, from packed codes or from factors."""
    rows = QuantizedRows(factors, packed, step, None, None)
    with on_device(step):
        return engine(backend).dequantize_rows(rows, _grid(grid), width, dtype)


@dequantize_rows_op.register_fake
def _(
    factors: Tensor | None, packed: Tensor | None, step: Tensor, grid: str, width: int, dtype: torch.dtype, backend: str
) -> Tensor:
    held = factors if factors is not None else packed
    assert held is not None
    return held.new_empty((held.shape[0], width), dtype=dtype)


@torch.library.custom_op("bitquest::mask_rotate", mutates_args=())
def mask_rotate_op(gradient: Tensor, mask: Tensor | None, block: int, dtype: torch.dtype, backend: str) -> Tensor:
    """(G ⊙ M)Hᵀ of G (T, K) in `dtype`, M as bits."""
    with on_device(gradient):
        return engine(backend).mask_rotate(gradient, mask, block, dtype)


@mask_rotate_op.register_fake
def _(gradient: Tensor, mask: Tensor | None, block: int, dtype: torch.dtype, backend: str) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=dtype)


@torch.library.custom_op("bitquest::packed_linear", mutates_args=())
def packed_linear_op(
    x: list[Tensor | None], weight: list[Tensor], bias: Tensor | None, spec: str, dtype: torch.dtype, backend: str
) -> Tensor:
    """y (T, N) in `dtype`. x: [rotated float32 rows], or [factors, packed, step, sums] of quantized ones."""
    made = LinearSpec.of(spec)
    rows: Tensor | QuantizedRows
    if len(x) == 1:
        assert x[0] is not None
        rows = x[0]
    else:
        rows = _rows(x)
    with on_device(weight[0]):
        return engine(backend).linear(made, rows, tuple(weight), bias, dtype)


@packed_linear_op.register_fake
def _(
    x: list[Tensor | None], weight: list[Tensor], bias: Tensor | None, spec: str, dtype: torch.dtype, backend: str
) -> Tensor:
    held = next(part for part in x if part is not None)
    return held.new_empty((held.shape[0], LinearSpec.of(spec).out_features), dtype=dtype)


def packed_linear(
    x: QuantizedRows | Tensor,
    weight: tuple[Tensor, ...],
    bias: Tensor | None,
    spec: LinearSpec,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The operator on quantized rows, or on rotated floats."""
    parts: list[Tensor | None] = [x] if isinstance(x, Tensor) else [x.factors, x.packed, x.step, x.sums]
    y: Tensor = packed_linear_op(parts, list(weight), bias, spec.text, dtype, backend)
    return y


@torch.library.custom_op("bitquest::rows_linear", mutates_args=())
def rows_linear_op(
    x: list[Tensor | None], w: list[Tensor | None], bias: Tensor | None, spec: str, dtype: torch.dtype, backend: str
) -> Tensor:
    """y (T, N) in `dtype` from [factors, packed, step, sums] of both operands."""
    rows = _rows(x)
    with on_device(rows.step):
        return engine(backend).linear_rows(LinearSpec.of(spec), rows, _rows(w), bias, dtype)


@rows_linear_op.register_fake
def _(
    x: list[Tensor | None], w: list[Tensor | None], bias: Tensor | None, spec: str, dtype: torch.dtype, backend: str
) -> Tensor:
    held = next(part for part in x if part is not None)
    return held.new_empty((held.shape[0], LinearSpec.of(spec).out_features), dtype=dtype)


def _rows(parts: list[Tensor | None]) -> QuantizedRows:
    factors, packed, step, sums = parts
    assert step is not None
    return QuantizedRows(factors, packed, step, None, sums)


def rows_linear(
    x: QuantizedRows, w: QuantizedRows, bias: Tensor | None, spec: LinearSpec, dtype: torch.dtype, backend: str
) -> Tensor:
    """The operator on the rows of both operands."""
    y: Tensor = rows_linear_op(
        [x.factors, x.packed, x.step, x.sums], [w.factors, w.packed, w.step, w.sums], bias, spec.text, dtype, backend
    )
    return y


@torch.library.custom_op("bitquest::prologue_backward", mutates_args=())
def prologue_backward_op(
    gradient: Tensor,
    mask: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    up: Tensor | None,
    block: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dx, d norm_weight or d up) from the gradient of x_q."""
    prologue = _prologue(norm_weight, eps, up)
    assert prologue is not None
    with on_device(x):
        return engine(backend).prologue_backward(gradient, mask, x, prologue, block)


@prologue_backward_op.register_fake
def _(
    gradient: Tensor,
    mask: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    up: Tensor | None,
    block: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    other = norm_weight if norm_weight is not None else up
    assert other is not None
    return x.new_empty(x.shape), other.new_empty(other.shape)

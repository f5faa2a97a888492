"""Training on integers: the product of the forward pass runs on codes, the backward pass keeps codes and mask bits.

The forward value is that of fake quantization up to float rounding: Σ Δ_x·level_x · Δ_w·level_w, summed exactly as
integers and scaled once. For its backward pass an operand leaves b bits of code and one bit of mask per element and a
step per row, against three float tensors in plain autograd; values are made from codes again where a gradient needs
them:

    ∂L/∂x = (G Ŵ ⊙ M_x) Hᵀ,      ∂L/∂W = (Gᵀ X̂ ⊙ M_w) Hᵀ        (numerics/fake_quant.py)

Autograd sees the input through a handle: a tensor of x's shape without memory of its own, whose gradient is x_q's.
Layers that read one input share its rows and its handle, so their gradients are added before the one rotation back.
T tokens, K in_features, N out_features.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bitquest.nn.quantizer import may_be_kept
from bitquest.numerics.integers import integer_form
from bitquest.numerics.quantizer import Quantizer
from bitquest.ops.backend import Backend, engine
from bitquest.ops.engine_ops import (
    dequantize_rows_op,
    mask_rotate_op,
    prologue_backward_op,
    quantize_rows,
    rows_linear,
)
from bitquest.ops.linear_spec import LinearSpec
from bitquest.ops.registry import grid_text, quantizer_text
from bitquest.ops.rows import Prologue, QuantizedRows, RMSNorm, SwiGLU, flattened


class TrainingPlan:
    """How one layer trains on integers: its specification, who quantizes each operand, and which parts are made."""

    def __init__(self, spec: LinearSpec, backend: Backend) -> None:
        assert spec.weight is not None and spec.activation is not None
        made = engine(backend.value)
        self.spec, self.backend = spec, backend.value
        self.input = _OperandPlan(spec.activation, spec.block, made.row_parts(spec), backend)
        self.weight = _OperandPlan(spec.weight, spec.block, made.row_parts(spec), backend)


class _OperandPlan:
    """One operand: the texts its operators take, the parts its product reads, and what the backward pass keeps."""

    def __init__(self, quantizer: Quantizer, block: int, parts: frozenset[str], backend: Backend) -> None:
        self.text, self.grid = quantizer_text(quantizer), grid_text(quantizer.grid)
        self.block, self.backend = block, backend.value
        refused = engine(backend.value).refuses_rows(quantizer, block)
        self.quantizing = backend.value if refused is None else Backend.TORCH.value
        # Codes cannot say what N:M sparsity dropped; the integers can. 8-bit integers are their codes.
        form = integer_form(quantizer.grid)
        self.keeps = "factors" if quantizer.is_sparse or (form is not None and form.bits == 8) else "packed"
        self.want = parts | {self.keeps, "mask"}
        self.key = ("integers", self.text, block, self.quantizing, self.want)

    def quantize(self, x: Tensor, prologue: Prologue | None = None) -> QuantizedRows:
        return quantize_rows(x, self.text, self.block, self.want, self.quantizing, None, prologue)

    def kept(self, rows: QuantizedRows) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """What the backward pass needs to make the values again."""
        if self.keeps == "packed":
            return None, rows.packed, rows.step
        return rows.factors, None, rows.step

    def values(self, factors: Tensor | None, packed: Tensor | None, step: Tensor, width: int, dtype: Any) -> Tensor:
        made: Tensor = dequantize_rows_op(factors, packed, step, self.grid, width, dtype, self.backend)
        return made


class InputRows(NamedTuple):
    """An input as rows, and the handle by which autograd knows it."""

    handle: Tensor
    rows: QuantizedRows


class _Handle(torch.autograd.Function):
    """x in, a handle of x_q out; the gradient of x_q in, that of x (and of the prologue's other operand) out."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor | None,
        up: Tensor | None,
        mask: Tensor,
        eps: float,
        block: int,
        dtype: torch.dtype,
        backend: str,
    ) -> Tensor:
        fused = norm_weight is not None or up is not None
        ctx.save_for_backward(mask, *((x, norm_weight, up) if fused else ()))
        ctx.eps, ctx.block, ctx.backend, ctx.dtype = eps, block, backend, x.dtype
        return x.new_empty((), dtype=dtype).expand(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        mask, *fused = ctx.saved_tensors
        if not fused:
            return mask_rotate_op(gradients[0], mask, ctx.block, ctx.dtype, ctx.backend), *[None] * 7
        x, norm_weight, up = fused
        d_x, d_other = prologue_backward_op(gradients[0], mask, x, norm_weight, ctx.eps, up, ctx.block, ctx.backend)
        others = (d_other, None) if up is None else (None, d_other)
        return d_x, *others, *[None] * 5


def quantize_input(plan: _OperandPlan, x: Tensor, dtype: torch.dtype, prologue: Prologue | None = None) -> InputRows:
    """Rows of x (…, K), and their handle (T, K) in the dtype that gradients arrive in."""
    x_TK = x.reshape(-1, x.shape[-1])
    norm_weight, eps, up = None, 0.0, None
    if isinstance(prologue, RMSNorm):
        norm_weight, eps = prologue
    elif isinstance(prologue, SwiGLU):
        up = prologue.up.reshape(-1, x.shape[-1])
    with torch.no_grad():
        rows = plan.quantize(x_TK.detach(), flattened(prologue))
    assert rows.mask is not None
    handle: Tensor = _Handle.apply(x_TK, norm_weight, up, rows.mask, eps, plan.block, dtype, plan.backend)
    return InputRows(handle, rows)


class _Product(torch.autograd.Function):
    """y (T, N) from rows of both operands; gradients from their codes and mask bits."""

    @staticmethod
    def forward(
        ctx: Any,
        handle: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x: QuantizedRows,
        w: QuantizedRows,
        plan: TrainingPlan,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.plan, ctx.dtypes = plan, (handle.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.save_for_backward(*plan.input.kept(x), *plan.weight.kept(w), w.mask)
        return rows_linear(x, w, None if bias is None else bias.detach(), plan.spec, dtype, plan.backend)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        g_TN, plan, (of_handle, of_weight, of_bias) = gradients[0], ctx.plan, ctx.dtypes
        *kept, w_mask = ctx.saved_tensors
        x_kept, w_kept, width, dtype = kept[:3], kept[3:], plan.spec.in_features, g_TN.dtype
        d_handle = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_handle = (g_TN @ plan.weight.values(*w_kept, width, dtype)).to(of_handle)
        if ctx.needs_input_grad[1]:
            d_rotated = g_TN.t() @ plan.input.values(*x_kept, width, dtype)
            d_weight = mask_rotate_op(d_rotated, w_mask, plan.spec.block, of_weight, plan.backend)
        if of_bias is not None and ctx.needs_input_grad[2]:
            d_bias = g_TN.sum(0).to(of_bias)
        return d_handle, d_weight, d_bias, None, None, None, None


def multiply(
    plan: TrainingPlan, x: InputRows, weight: Tensor, w: QuantizedRows, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y (T, N) in `dtype`, with gradients to the input's handle, the weight (N, K) and the bias (N,)."""
    y: Tensor = _Product.apply(x.handle, weight, bias, x.rows, w, plan, dtype)
    return y


def output_dtype(x: torch.dtype, device: str) -> torch.dtype:
    """What F.linear would return: autocast's dtype inside autocast, else the input's."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x


# --- a weight's rows, made once per optimizer step -------------------------------------------------------------------


class _Cached(NamedTuple):
    weight: "weakref.ref[Tensor]"
    key: tuple[Any, ...]
    rows: QuantizedRows


class WeightRows:
    """The rows of one layer's weight: cached while the weight is what it was, or held through an optimizer step."""

    def __init__(self) -> None:
        self._cached: _Cached | None = None
        self.held: QuantizedRows | None = None
        self.is_held = False

    def forget(self) -> None:
        """Drop what was computed."""
        self._cached, self.held, self.is_held = None, None, False

    def get(
        self, weight: Tensor, plan: _OperandPlan, state: Callable[[Tensor], tuple[int, ...]] | None
    ) -> QuantizedRows:
        """Rows of the weight (N, K). `state` tells whether the weight changed; None: quantize afresh."""
        if self.is_held:
            assert self.held is not None
            return self.held
        with torch.no_grad():
            if state is None or not may_be_kept(weight.device):
                return plan.quantize(weight.detach())
            key, cached = (state(weight), weight.dtype, plan.key), self._cached
            if cached is None or cached.weight() is not weight or cached.key != key:
                cached = self._cached = _Cached(weakref.ref(weight), key, plan.quantize(weight.detach()))
            return cached.rows

    def hold(self, weight: Tensor, plan: _OperandPlan) -> None:
        """Quantize now, into memory that stays the same from step to step, and use that until `release`."""
        with torch.no_grad():
            rows = plan.quantize(weight.detach())
            if self.held is not None and _same_shapes(self.held, rows):
                for mine, new in zip(self.held, rows, strict=True):
                    if mine is not None and new is not None:
                        mine.copy_(new)
            else:
                self.held = rows
        self.is_held, self._cached = True, None

    def release(self) -> None:
        """Look at the weight again from now on; the memory stays for the next `hold`."""
        self.is_held = False


def _same_shapes(a: QuantizedRows, b: QuantizedRows) -> bool:
    return all(
        (x is None) == (y is None) and (x is None or y is None or (x.shape == y.shape and x.device == y.device))
        for x, y in zip(a, b, strict=True)
    )


@runtime_checkable
class HoldsWeight(Protocol):
    """A layer that can quantize its weight ahead of the forward passes that use it."""

    def hold_weight(self) -> None: ...

    def release_weight(self) -> None: ...


@contextmanager
def weights_held(model: nn.Module) -> Iterator[None]:
    """Quantize each weight that trains on integers once, for every forward pass inside: the micro-batches of one step.

    For compiled models, which cannot watch a weight for changes; the rows keep their memory from step to step, so that
    nothing is compiled or captured again. The weights must not change inside.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, HoldsWeight)]
    try:
        for layer in layers:
            layer.hold_weight()
        yield
    finally:
        for layer in layers:
            layer.release_weight()

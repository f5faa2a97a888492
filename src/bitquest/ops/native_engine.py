"""The compiled CPU kernels as an engine: rows in native.py, products in native_linear.py, whole cases chosen here."""

import torch
from torch import Tensor

from bitquest.numerics.grids import Grid
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import MAX_BLOCK
from bitquest.numerics.scaling import PerTensor
from bitquest.ops import native, native_linear
from bitquest.ops.engine import Parts, TorchEngine
from bitquest.ops.linear_spec import LinearSpec
from bitquest.ops.rows import PackedWeight, Prologue, QuantizedRows, prologue_gradients


class NativeEngine:
    """Weights in the layout of this machine's kernels; activations quantized in one pass over each row."""

    def __init__(self) -> None:
        self._reference = TorchEngine()

    def refuses(self, spec: LinearSpec) -> str | None:
        if spec.weight_form is None:
            return "it multiplies weights whose grid has integers"
        if spec.activation is not None:
            if spec.input_form is None:
                return "it multiplies activations whose grid has integers"
            return native.refuses_rows(spec.activation, spec.block)
        return None if spec.block <= MAX_BLOCK else f"it rotates in blocks of up to {MAX_BLOCK}"

    def refuses_training(self, spec: LinearSpec) -> str | None:
        return self._reference.refuses_training(spec) or self.refuses(spec)

    def refuses_rows(self, quantizer: Quantizer, block: int) -> str | None:
        if isinstance(quantizer.granularity, PerTensor):
            return "one step for a whole tensor takes two passes"
        return native.refuses_rows(quantizer, block)

    def input_parts(self, spec: LinearSpec) -> frozenset[str]:
        if spec.activation is None or spec.weight_form is None:
            return frozenset()
        parts = {"packed" if spec.activation.bits == 1 else "factors"}
        return frozenset(parts | {"sums"} if spec.weight_form.offset else parts)

    def row_parts(self, spec: LinearSpec) -> frozenset[str]:
        assert spec.weight is not None and spec.activation is not None
        dense_bits = spec.weight.bits == spec.activation.bits == 1 and not spec.weight.is_sparse
        return frozenset({"packed"} if dense_bits else {"factors"})

    def quantize_rows(
        self,
        x: Tensor,
        quantizer: Quantizer,
        block: int,
        want: frozenset[str],
        step: Tensor | None = None,
        prologue: Prologue | None = None,
    ) -> QuantizedRows:
        return native.quantize_rows(x, quantizer, block, want, step, prologue)

    def rotate(self, x: Tensor, block: int, prologue: Prologue | None = None) -> Tensor:
        return native.rotate(x, block, prologue)

    def dequantize_rows(self, rows: QuantizedRows, grid: Grid, width: int, dtype: torch.dtype) -> Tensor:
        if rows.packed is None:
            return self._reference.dequantize_rows(rows, grid, width, dtype)
        return native.dequantize_rows(rows.packed, rows.step, grid, width, dtype)

    def mask_rotate(self, gradient: Tensor, mask: Tensor | None, block: int, dtype: torch.dtype) -> Tensor:
        return native.mask_rotate(gradient, mask, block, dtype)

    def prologue_backward(
        self, gradient: Tensor, mask: Tensor, x: Tensor, prologue: Prologue, block: int
    ) -> tuple[Tensor, Tensor]:
        return prologue_gradients(native.mask_rotate(gradient, mask, block, torch.float32), x, prologue)

    def prepare(self, spec: LinearSpec, weight: PackedWeight) -> Parts:
        assert spec.weight_form is not None and weight.step is not None
        step = weight.step.expand(spec.out_features, -1)
        made = native_linear.prepare(
            step, spec.weight_form, spec.input_form, spec.in_features, packed=weight.packed, kept=weight.kept
        )
        return (made,)

    def linear(
        self, spec: LinearSpec, x: QuantizedRows | Tensor, weight: Parts, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return native_linear.linear(weight[0], x, spec.out_features, spec.in_features, spec.input_form, bias, dtype)

    def linear_rows(
        self, spec: LinearSpec, x: QuantizedRows, w: QuantizedRows, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        assert spec.weight_form is not None
        step = w.step.expand(spec.out_features, -1)
        source = {"factors": w.factors}
        if w.packed is not None and (w.factors is None or _is_laid_out_as_packed(spec)):
            source = {"packed": w.packed}
        elif spec.weight is not None and spec.weight.is_sparse and w.factors is not None:
            source["kept"] = w.factors != 0  # odd integers are zero only where nothing was kept
        made = native_linear.prepare(step, spec.weight_form, spec.input_form, spec.in_features, **source)
        return self.linear(spec, x, (made,), bias, dtype)


def _is_laid_out_as_packed(spec: LinearSpec) -> bool:
    """Whether the layout takes the packed codes nearly as they are: ten times faster than from factors."""
    weight, form = spec.weight, spec.weight_form
    assert weight is not None and form is not None
    return weight.bits in (1, 2, 4) and form.table is None and not weight.is_sparse

"""What a backend offers to linear layers: rows to integers, integers times packed weights, and the way back.

An engine is stateless: what it prepares once per weight it hands back as tensors, which the layer keeps. Operators
reach it by the backend's name (engine_ops.py), so that compiled graphs see plain values. `TorchEngine` is the
reference: numerics, step by step; every other engine is tested against it.
"""

from typing import Protocol

import torch
from torch import Tensor

from bitquest.numerics.fake_quant import dequantize, encode, fake_quantize_forward
from bitquest.numerics.grids import Grid
from bitquest.numerics.integers import float_linear, integer_form, integer_linear, weight_only_linear
from bitquest.numerics.packing import pack, unpack
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import rotation_from_block
from bitquest.ops.linear_spec import LinearSpec
from bitquest.ops.rows import PackedWeight, Prologue, QuantizedRows, apply_prologue, prologue_gradients

Parts = tuple[Tensor, ...]


class Engine(Protocol):
    """One backend. Rows are two-dimensional, sizes as in rows.py; nothing here records gradients."""

    def refuses(self, spec: LinearSpec) -> str | None:
        """Why packed layers of this kind do not run here, None if they do."""

    def refuses_training(self, spec: LinearSpec) -> str | None:
        """Why layers of this kind are not trained on integers here, None if they are."""

    def refuses_rows(self, quantizer: Quantizer, block: int) -> str | None:
        """Why `quantize_rows` does not take such operands, None if it does."""

    def input_parts(self, spec: LinearSpec) -> frozenset[str]:
        """Which parts of a quantized input `linear` reads."""

    def row_parts(self, spec: LinearSpec) -> frozenset[str]:
        """Which parts of both operands `linear_rows` reads."""

    def quantize_rows(
        self,
        x: Tensor,
        quantizer: Quantizer,
        block: int,
        want: frozenset[str],
        step: Tensor | None = None,
        prologue: Prologue | None = None,
    ) -> QuantizedRows:
        """x (T, K), behind the prologue, rotated, scaled, rounded and masked; the wanted parts of it."""

    def rotate(self, x: Tensor, block: int, prologue: Prologue | None = None) -> Tensor:
        """x (T, K), behind the prologue, rotated, float32: the input of a layer whose activations stay floats."""

    def dequantize_rows(self, rows: QuantizedRows, grid: Grid, width: int, dtype: torch.dtype) -> Tensor:
        """Values (T, K) in rotated space from the packed codes (or the factors) and steps."""

    def mask_rotate(self, gradient: Tensor, mask: Tensor | None, block: int, dtype: torch.dtype) -> Tensor:
        """(G ⊙ M)Hᵀ of G (T, K) and M as bits, in the dtype asked for. No mask, or an empty one: all of it passes."""

    def prepare(self, spec: LinearSpec, weight: PackedWeight) -> Parts:
        """The weight in the layout `linear` reads, made once."""

    def linear(
        self, spec: LinearSpec, x: QuantizedRows | Tensor, weight: Parts, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """y (T, N) in the dtype asked for, from quantized rows (or rotated floats) and a prepared weight."""

    def linear_rows(
        self, spec: LinearSpec, x: QuantizedRows, w: QuantizedRows, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """The same for training, where the weight's rows were quantized a moment ago."""

    def prologue_backward(
        self, gradient: Tensor, mask: Tensor, x: Tensor, prologue: Prologue, block: int
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x (T, K) and of the prologue's other operand, in their dtypes, from that of x_q."""


class TorchEngine:
    """The reference, on any device torch has."""

    def refuses(self, spec: LinearSpec) -> str | None:
        return None

    def refuses_training(self, spec: LinearSpec) -> str | None:
        if spec.weight_form is None or spec.input_form is None:
            return "training on integers needs a weight and an activation whose grids have integers"
        for quantizer in (spec.weight, spec.activation):
            if quantizer is not None and quantizer.is_learned:
                return "a learned step needs the rounding errors, which the integers do not keep"
        if spec.weight is not None and spec.weight.is_sparse and spec.weight.bits == 8:
            return "sparse 8-bit weights have no int8 form"
        return None

    def refuses_rows(self, quantizer: Quantizer, block: int) -> str | None:
        return None

    def row_parts(self, spec: LinearSpec) -> frozenset[str]:
        return frozenset({"factors"})

    def input_parts(self, spec: LinearSpec) -> frozenset[str]:
        both = spec.weight_form is not None and spec.input_form is not None
        return frozenset({"factors" if both else "packed"})

    def quantize_rows(
        self,
        x: Tensor,
        quantizer: Quantizer,
        block: int,
        want: frozenset[str],
        step: Tensor | None = None,
        prologue: Prologue | None = None,
    ) -> QuantizedRows:
        x, rotation = apply_prologue(x, prologue), rotation_from_block(block)
        codes, delta, kept = encode(x, quantizer, rotation, step)
        form, factors, packed, mask, sums = integer_form(quantizer.grid), None, None, None, None
        if {"factors", "sums"} & want:
            assert form is not None, "only a grid with integers has factors"
            factors = form.of_codes(codes, kept)
        if "packed" in want:
            packed = pack(codes, quantizer.bits, trusted=True)
        if "mask" in want:
            bits = fake_quantize_forward(x, quantizer, rotation, step).mask
            mask = mask_bits(bits) if bits.numel() else torch.empty(0, dtype=torch.uint8, device=x.device)
        if "sums" in want and factors is not None:
            sums = factors.unflatten(-1, (delta.shape[-1], -1)).sum(-1, dtype=torch.int32)
        return QuantizedRows(factors if "factors" in want else None, packed, delta, mask, sums)

    def rotate(self, x: Tensor, block: int, prologue: Prologue | None = None) -> Tensor:
        return rotation_from_block(block).apply(apply_prologue(x, prologue))

    def dequantize_rows(self, rows: QuantizedRows, grid: Grid, width: int, dtype: torch.dtype) -> Tensor:
        if rows.packed is not None:
            return dequantize(unpack(rows.packed, grid.bits, width, trusted=True), rows.step, grid).to(dtype)
        form = integer_form(grid)
        assert form is not None and rows.factors is not None
        levels = rows.factors.to(torch.float32).mul_(form.factor).add_(form.offset).mul_(form.unit)
        scaled = levels.unflatten(-1, (rows.step.shape[-1], -1)) * rows.step.unsqueeze(-1)
        return scaled.reshape(levels.shape).to(dtype)

    def mask_rotate(self, gradient: Tensor, mask: Tensor | None, block: int, dtype: torch.dtype) -> Tensor:
        trusted = gradient.to(torch.float32)
        if mask is not None and mask.numel():
            trusted = trusted * bits_to_mask(mask, gradient.shape[-1])
        rotated = rotation_from_block(block).inverse(trusted).to(dtype)
        return rotated.clone() if rotated.data_ptr() == gradient.data_ptr() else rotated

    def prepare(self, spec: LinearSpec, weight: PackedWeight) -> Parts:
        if weight.float_weight is not None:
            return (weight.float_weight,)
        assert weight.packed is not None and weight.step is not None and spec.weight is not None
        codes = unpack(weight.packed, spec.weight.bits, spec.in_features)
        if spec.weight_form is None or (spec.activation is not None and spec.input_form is None):
            return (dequantize(codes, weight.step, spec.weight.grid, weight.kept),)
        step = weight.step.expand(spec.out_features, -1).contiguous()
        return (spec.weight_form.of_codes(codes, weight.kept), step)

    def linear(
        self, spec: LinearSpec, x: QuantizedRows | Tensor, weight: Parts, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if isinstance(x, Tensor):
            if len(weight) == 1:
                y = float_linear(x, weight[0])
            else:
                factors, step = weight
                assert spec.weight_form is not None
                y = weight_only_linear(x, factors, step, spec.weight_form)
        elif len(weight) == 1:
            assert spec.activation is not None
            y = float_linear(self.dequantize_rows(x, spec.activation.grid, spec.in_features, torch.float32), weight[0])
        else:
            assert x.factors is not None and spec.input_form is not None and spec.weight_form is not None
            x_step = x.step.expand(x.factors.shape[0], -1)
            factors, step = weight
            y = integer_linear(x.factors, x_step, factors, step, spec.input_form, spec.weight_form)
        return (y if bias is None else y + bias).to(dtype)

    def linear_rows(
        self, spec: LinearSpec, x: QuantizedRows, w: QuantizedRows, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        assert w.factors is not None
        return self.linear(spec, x, (w.factors, w.step.expand(spec.out_features, -1)), bias, dtype)

    def prologue_backward(
        self, gradient: Tensor, mask: Tensor, x: Tensor, prologue: Prologue, block: int
    ) -> tuple[Tensor, Tensor]:
        inner = self.mask_rotate(gradient, mask, block, torch.float32)
        return prologue_gradients(inner, x, prologue)


def mask_bits(mask: Tensor) -> Tensor:
    """bool (T, K) to uint8 (T, ⌈K/8⌉), least significant bit first."""
    return pack(mask.to(torch.int8) - 1, 1, trusted=True)


def bits_to_mask(bits: Tensor, width: int) -> Tensor:
    """uint8 (T, ⌈K/8⌉) back to bool (T, K)."""
    return unpack(bits, 1, width, trusted=True) == 0

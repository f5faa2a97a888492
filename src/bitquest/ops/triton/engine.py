"""The Triton kernels as an engine: which kernel runs a layer at which number of tokens.

Weights stay packed on the device. Up to `FEW` tokens a product reads them as they are (few_bit_linear.py); with more,
arithmetic is what takes time, so they are unpacked to int8 for the s8 product (unpack.py, int8_linear.py) or, for float
activations, to the output's floats for cuBLAS.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.grids import CodebookGrid, Grid, UniformGrid
from bitquest.numerics.integers import IntegerForm, integer_form
from bitquest.numerics.packing import pack, unpack
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import MAX_BLOCK
from bitquest.numerics.scaling import PerTensor
from bitquest.ops.engine import Parts, TorchEngine
from bitquest.ops.linear_spec import LinearSpec
from bitquest.ops.rows import PackedWeight, Prologue, QuantizedRows
from bitquest.ops.triton.dequantize import dequantize_rows
from bitquest.ops.triton.few_bit_forms import weight_form
from bitquest.ops.triton.few_bit_linear import a8_linear, packed_sums, weight_only_linear
from bitquest.ops.triton.int8_linear import int8_linear
from bitquest.ops.triton.quantize import MAX_LEVELS, quantize_rows, refuses_rule, rotate_rows
from bitquest.ops.triton.quantize_backward import mask_rotate, prologue_backward
from bitquest.ops.triton.tiles import MAX_WIDTH
from bitquest.ops.triton.unpack import unpack_factors

FEW = 32  # tokens
_SMALL_WIDTH, _LARGE_SHARED = 16384, 227 * 1024  # float32 rows longer than this take this many bytes (tiles.py)
_STORED = (1, 2, 4, 8)  # widths whose fields do not straddle bytes


class TritonEngine:
    """CUDA devices from Ampere on, and the interpreter."""

    def __init__(self) -> None:
        self._reference = TorchEngine()

    # --- what there is -------------------------------------------------------------------------------------------

    def refuses(self, spec: LinearSpec) -> str | None:
        if spec.weight is None or spec.weight_form is None:
            return "it multiplies quantized weights whose grid has integers"
        if spec.activation is None:
            if spec.weight.is_sparse:
                return "float activations times N:M sparse weights have no kernel"
            return self._refuses_shape(spec)
        if spec.input_form is None:
            return "it multiplies activations whose grid has integers"
        return self.refuses_rows(spec.activation, spec.block, given=spec.activation.is_learned) or (
            self._refuses_shape(spec)
        )

    def _refuses_shape(self, spec: LinearSpec) -> str | None:
        if spec.in_features > MAX_WIDTH:
            return f"rows go up to {MAX_WIDTH} elements"
        if spec.in_features > _SMALL_WIDTH and torch.cuda.is_available() and _shared_bytes() < _LARGE_SHARED:
            return f"rows of more than {_SMALL_WIDTH} elements need more shared memory than this GPU has"
        for quantizer in (spec.weight, spec.activation):
            reason = None if quantizer is None else refuses_rule(quantizer, given=True)
            if reason is not None:
                return reason
        if spec.weight is not None and not spec.weight.is_sparse:
            try:
                weight_form(_stored(spec))
            except ConfigError as error:
                return str(error)
        return None if spec.block <= MAX_BLOCK else f"rotations go up to blocks of {MAX_BLOCK}"

    def refuses_training(self, spec: LinearSpec) -> str | None:
        return self._reference.refuses_training(spec) or self.refuses(spec)

    def refuses_rows(self, quantizer: Quantizer, block: int, given: bool = False) -> str | None:
        if quantizer.is_sparse:
            return "N:M sparsity is not chosen in the fused kernels"
        reason = refuses_rule(quantizer, given)
        if reason is not None:
            return reason
        if isinstance(quantizer.granularity, PerTensor) and not given:
            return "a step for a whole tensor takes two passes"
        if isinstance(quantizer.grid, CodebookGrid) and len(quantizer.grid.levels) > MAX_LEVELS:
            return f"codebooks go up to {MAX_LEVELS} levels"
        return None if block <= MAX_BLOCK else f"rotations go up to blocks of {MAX_BLOCK}"

    def input_parts(self, spec: LinearSpec) -> frozenset[str]:
        if spec.activation is None or spec.weight_form is None:
            return frozenset()
        return frozenset({"factors", "sums"} if _stored_form(spec).offset else {"factors"})

    def row_parts(self, spec: LinearSpec) -> frozenset[str]:
        assert spec.weight_form is not None and spec.input_form is not None
        return frozenset({"factors", "sums"} if spec.weight_form.offset or spec.input_form.offset else {"factors"})

    # --- rows ----------------------------------------------------------------------------------------------------

    def quantize_rows(
        self,
        x: Tensor,
        quantizer: Quantizer,
        block: int,
        want: frozenset[str],
        step: Tensor | None = None,
        prologue: Prologue | None = None,
    ) -> QuantizedRows:
        return quantize_rows(x, quantizer, block, want=want, prologue=prologue, step=step)

    def rotate(self, x: Tensor, block: int, prologue: Prologue | None = None) -> Tensor:
        return rotate_rows(x, block, prologue=prologue, dtype=torch.float32)

    def dequantize_rows(self, rows: QuantizedRows, grid: Grid, width: int, dtype: torch.dtype) -> Tensor:
        codes = rows.packed if rows.packed is not None else rows.factors
        assert codes is not None
        return dequantize_rows(codes, rows.step, grid, width, dtype=dtype)

    def mask_rotate(self, gradient: Tensor, mask: Tensor | None, block: int, dtype: torch.dtype) -> Tensor:
        return mask_rotate(gradient, mask, block, dtype=dtype)

    def prologue_backward(
        self, gradient: Tensor, mask: Tensor, x: Tensor, prologue: Prologue, block: int
    ) -> tuple[Tensor, Tensor]:
        return prologue_backward(gradient, mask, x, prologue, block)

    # --- products ------------------------------------------------------------------------------------------------

    def prepare(self, spec: LinearSpec, weight: PackedWeight) -> Parts:
        """(packed, step, Σ of the factors of each group[, kept]), in the width that kernels read."""
        assert weight.packed is not None and weight.step is not None and spec.weight is not None
        grid, stored = spec.weight.grid, _stored(spec)
        packed = weight.packed
        if stored != grid:  # the same codes, so the same levels, in wider fields
            packed = pack(unpack(packed, grid.bits, spec.in_features), stored.bits)
        step = weight.step.expand(spec.out_features, -1).contiguous()
        if weight.kept is not None:
            factors = unpack_factors(packed, stored, spec.in_features, weight.kept)
            return packed, step, _group_sums(factors, _groups(spec, step)), weight.kept
        return packed, step, packed_sums(packed, spec.in_features, stored, _groups(spec, step))

    def linear(
        self, spec: LinearSpec, x: QuantizedRows | Tensor, weight: Parts, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        packed, step, sums, *kept = weight
        stored, width = _stored(spec), spec.in_features
        if isinstance(x, Tensor):
            if x.shape[0] <= FEW:
                return weight_only_linear(x, packed, step, stored, bias=bias, out_dtype=dtype)
            values = dequantize_rows(packed, step, stored, width, dtype=dtype)
            return F.linear(x.to(dtype), values, None if bias is None else bias.to(dtype))
        assert x.factors is not None and spec.input_form is not None
        tokens = x.factors.shape[0]
        x_step = x.step.expand(tokens, -1)
        if tokens <= FEW and not kept:
            return a8_linear(
                x.factors, x_step, x.sums, packed, step, spec.input_form, stored,
                w_sums=sums, bias=bias, out_dtype=dtype,
            )  # fmt: skip
        factors = unpack_factors(packed, stored, width, kept[0] if kept else None)
        return int8_linear(
            x.factors, x_step, factors, step, spec.input_form, _stored_form(spec),
            x_sums=x.sums, w_sums=sums, bias=bias, out_dtype=dtype,
        )  # fmt: skip

    def linear_rows(
        self, spec: LinearSpec, x: QuantizedRows, w: QuantizedRows, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        assert x.factors is not None and w.factors is not None
        assert spec.input_form is not None and spec.weight_form is not None
        return int8_linear(
            x.factors, x.step.expand(x.factors.shape[0], -1), w.factors, w.step.expand(spec.out_features, -1),
            spec.input_form, spec.weight_form, x_sums=x.sums, w_sums=w.sums, bias=bias, out_dtype=dtype,
        )  # fmt: skip


@cache
def _shared_bytes() -> int:
    return int(torch.cuda.get_device_properties().shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _stored(spec: LinearSpec) -> Grid:
    """The grid in whose codes a weight is stored: a uniform one of b bits has the levels c + ½ of every wider one.

    Sparse weights stay as they are: 8-bit integers have no zero.
    """
    assert spec.weight is not None
    grid = spec.weight.grid
    if isinstance(grid, UniformGrid) and grid.bits not in _STORED and not spec.weight.is_sparse:
        return UniformGrid(next(bits for bits in _STORED if bits > grid.bits))
    return grid


def _stored_form(spec: LinearSpec) -> IntegerForm:
    form = integer_form(_stored(spec))
    assert form is not None, "refused otherwise"
    return form


def _groups(spec: LinearSpec, step: Tensor) -> int:
    """Scale groups of a row, by the finer of the two groupings."""
    groups = [step.shape[1]]
    if spec.activation is not None:
        groups.append(spec.activation.granularity.step_shape((1, spec.in_features))[-1])
    return max(groups)


def _group_sums(factors: Tensor, groups: int) -> Tensor:
    return factors.unflatten(-1, (groups, -1)).sum(-1, dtype=torch.int32)

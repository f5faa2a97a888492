"""The Triton engine with CUDA kernels where the hardware has units that Triton does not reach: 1-bit products.

On Hopper wgmma (hopper.py), before it mma.sync (one_bit.py); up to `FEW_BITS` tokens the packed rows are read by xor
and popcount (few_bit_linear.py). Everything else is the Triton engine's.
"""

import torch
from torch import Tensor

from bitquest.numerics.scaling import PerGroup
from bitquest.ops.cuda.hopper import b1_linear_hopper, refuses
from bitquest.ops.cuda.one_bit import B1Weight, b1_linear, b1_row_sums, prepare_b1_weight
from bitquest.ops.engine import Parts
from bitquest.ops.linear_spec import LinearSpec
from bitquest.ops.rows import PackedWeight, QuantizedRows
from bitquest.ops.triton.engine import TritonEngine
from bitquest.ops.triton.few_bit_linear import b1_vector

FEW_BITS = 16  # tokens up to which reading the weights takes longer than multiplying; not measured yet


class CudaEngine(TritonEngine):
    """NVIDIA GPUs of compute capability 8.0 to 9.0."""

    def input_parts(self, spec: LinearSpec) -> frozenset[str]:
        return frozenset({"packed", "sums"}) if _is_one_bit(spec) else super().input_parts(spec)

    def row_parts(self, spec: LinearSpec) -> frozenset[str]:
        return frozenset({"packed", "sums"}) if _is_one_bit(spec) else super().row_parts(spec)

    def prepare(self, spec: LinearSpec, weight: PackedWeight) -> Parts:
        if not _is_one_bit(spec):
            return super().prepare(spec, weight)
        assert weight.packed is not None and weight.step is not None
        step = weight.step.expand(spec.out_features, -1).contiguous()
        bits, sums = prepare_b1_weight(weight.packed, spec.in_features)
        return bits, step, sums

    def linear(
        self, spec: LinearSpec, x: QuantizedRows | Tensor, weight: Parts, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if not _is_one_bit(spec):
            return super().linear(spec, x, weight, bias, dtype)
        assert isinstance(x, QuantizedRows)
        bits, step, sums = weight
        return _one_bit(spec, x, bits, step, sums, bias, dtype)

    def linear_rows(
        self, spec: LinearSpec, x: QuantizedRows, w: QuantizedRows, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if not _is_one_bit(spec):
            return super().linear_rows(spec, x, w, bias, dtype)
        assert w.packed is not None
        step = w.step.expand(spec.out_features, -1)
        sums = b1_row_sums(w.packed, spec.in_features) if w.sums is None else w.sums
        return _one_bit(spec, x, w.packed, step, sums, bias, dtype)


def _is_one_bit(spec: LinearSpec) -> bool:
    """Both operands dense, of one bit, a scale for each row."""
    operands = (spec.weight, spec.activation)
    return all(
        q is not None and q.bits == 1 and not q.is_sparse and not isinstance(q.granularity, PerGroup) for q in operands
    )


def _one_bit(
    spec: LinearSpec,
    x: QuantizedRows,
    bits: Tensor,
    step: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y (T, N) from packed 1-bit rows of both operands and Σ ±1 of each row."""
    assert x.packed is not None
    tokens, width = x.packed.shape[0], spec.in_features
    x_step = x.step.expand(tokens, -1).contiguous()
    if tokens <= FEW_BITS:
        return b1_vector(x.packed, x_step, bits, step, width, bias=bias, out_dtype=dtype)
    x_sums = b1_row_sums(x.packed, width) if x.sums is None else x.sums.reshape(-1)
    sums = sums.reshape(-1)
    if refuses(x.packed.device) is None:
        return b1_linear_hopper(x.packed, x_step, x_sums, bits, step, sums, width, bias=bias, out_dtype=dtype)
    weight = B1Weight(bits, sums)
    return b1_linear(x.packed, x_step, weight, step, width, bias=bias, out_dtype=dtype, x_sums=x_sums)

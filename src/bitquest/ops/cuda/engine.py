"""The Triton engine with CUDA kernels where the hardware has units that Triton does not reach.

Above `FEW` tokens, dense operands of 1 and 2 bits run as 1-bit products (wgmma on Hopper; mma.sync before it, W1A1
only), and weights of the 2:4 and 4:8-pair patterns on Hopper's sparse int8 units. Up to `FEW_BITS` tokens W1A1 reads
its packed rows by xor and popcount. The rest is the Triton engine's, and so is a kernel that fails its self-check.
"""

from functools import cached_property

import torch
from torch import Tensor

from bitquest.numerics.grids import UniformGrid
from bitquest.numerics.integers import integer_form
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.scaling import PerGroup
from bitquest.numerics.sparsity import NofM
from bitquest.ops.cuda.hopper import b1_linear_hopper, refuses
from bitquest.ops.cuda.one_bit import B1Weight, b1_linear, b1_row_sums, prepare_b1_weight
from bitquest.ops.cuda.planes import plane_sums, planes_linear, planes_of
from bitquest.ops.cuda.self_check import is_right
from bitquest.ops.cuda.sparse import SparseWeight, arrange_activation, prepare_sparse_weight, sparse_linear
from bitquest.ops.engine import Parts
from bitquest.ops.linear_spec import LinearSpec
from bitquest.ops.rows import PackedWeight, QuantizedRows
from bitquest.ops.triton.engine import FEW, TritonEngine
from bitquest.ops.triton.few_bit_linear import b1_vector
from bitquest.ops.triton.unpack import unpack_factors

FEW_BITS = 16  # tokens up to which reading 1-bit weights takes longer than multiplying; not measured yet


class CudaEngine(TritonEngine):
    """NVIDIA GPUs of compute capability 8.0 to 9.0. Choices are for the device that is current at the first use."""

    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    @cached_property
    def _one_bit(self) -> str | None:
        """The kernel for 1-bit products, if one is right here."""
        names = ("b1_wgmma", "b1_mma") if refuses(self.device()) is None else ("b1_mma",)
        return next((name for name in names if is_right(name, self.device())), None)

    @cached_property
    def _has_planes(self) -> bool:
        return refuses(self.device()) is None and is_right("planes", self.device())

    @cached_property
    def _has_sparse(self) -> bool:
        return refuses(self.device()) is None and is_right("sparse", self.device())

    def kernel(self, spec: LinearSpec) -> str | None:
        """Which CUDA kernel runs such a layer: "bits", "planes", "sparse", or None for Triton's."""
        w, x = spec.weight, spec.activation
        if w is None or x is None or isinstance(w.granularity, PerGroup) or isinstance(x.granularity, PerGroup):
            return None
        if w.is_sparse:
            return "sparse" if self._runs_sparse(spec, w) else None
        if not (isinstance(w.grid, UniformGrid) and isinstance(x.grid, UniformGrid) and max(w.bits, x.bits) <= 2):
            return None
        if w.bits == x.bits == 1:
            return "bits" if self._one_bit is not None else None
        return "planes" if self._has_planes else None

    def _runs_sparse(self, spec: LinearSpec, w: Quantizer) -> bool:
        pattern, form = w.sparsity, spec.weight_form
        known = isinstance(pattern, NofM) and (pattern.n, pattern.m) == (2, 4)
        return known and form is not None and form.offset == 0 and spec.in_features % 8 == 0 and self._has_sparse

    def input_parts(self, spec: LinearSpec) -> frozenset[str]:
        match self.kernel(spec):
            case "bits":
                return frozenset({"packed", "sums"})
            case "planes":  # factors for few tokens
                return frozenset({"packed", "sums", "factors"})
        return super().input_parts(spec)

    def row_parts(self, spec: LinearSpec) -> frozenset[str]:
        """Training multiplies 1-bit rows as bits, everything else as int8: planes and patterns are made per weight."""
        return frozenset({"packed", "sums"}) if self.kernel(spec) == "bits" else super().row_parts(spec)

    def prepare(self, spec: LinearSpec, weight: PackedWeight) -> Parts:
        kernel = self.kernel(spec)
        if kernel is None:
            return super().prepare(spec, weight)
        assert weight.packed is not None and weight.step is not None and spec.weight is not None
        step = weight.step.expand(spec.out_features, -1).contiguous()
        if kernel == "bits":
            bits, sums = prepare_b1_weight(weight.packed, spec.in_features)
            return bits, step, sums
        if kernel == "planes":
            cut = planes_of(weight.packed, spec.weight.bits, spec.in_features)
            return (*super().prepare(spec, weight), cut, plane_sums(cut, spec.in_features))
        assert weight.kept is not None
        factors = unpack_factors(weight.packed, spec.weight.grid, spec.in_features, weight.kept)
        made = prepare_sparse_weight(factors, weight.kept, _is_paired(spec.weight))
        return (*super().prepare(spec, weight), made.values, made.places, made.sums)

    def linear(
        self, spec: LinearSpec, x: QuantizedRows | Tensor, weight: Parts, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        kernel = self.kernel(spec)
        if kernel is None or isinstance(x, Tensor):
            return super().linear(spec, x, weight, bias, dtype)
        if kernel == "bits":
            bits, step, sums = weight
            return self._bits(spec, x, bits, step, sums, bias, dtype)
        packed, step, plain_sums, *own = weight
        assert x.factors is not None
        if x.factors.shape[0] <= FEW:
            kept = own[:1] if kernel == "sparse" else []
            return super().linear(spec, x, (packed, step, plain_sums, *kept), bias, dtype)
        if kernel == "planes":
            return self._planes(spec, x, own[0], step, own[1], bias, dtype)
        values, places, sums = own[1:]
        made = SparseWeight(values, places, sums, spec.in_features, _is_paired(spec.weight))
        return self._sparse(spec, x, made, step, bias, dtype)

    def linear_rows(
        self, spec: LinearSpec, x: QuantizedRows, w: QuantizedRows, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if self.kernel(spec) != "bits":
            return super().linear_rows(spec, x, w, bias, dtype)
        assert w.packed is not None
        step = w.step.expand(spec.out_features, -1)
        sums = b1_row_sums(w.packed, spec.in_features) if w.sums is None else w.sums
        return self._bits(spec, x, w.packed, step, sums, bias, dtype)

    def _bits(
        self, spec: LinearSpec, x: QuantizedRows, bits: Tensor, step: Tensor, sums: Tensor, bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """y (T, N) from packed 1-bit rows of both operands and Σ ±1 of each row."""
        assert x.packed is not None
        tokens, width = x.packed.shape[0], spec.in_features
        x_step = x.step.expand(tokens, -1).contiguous()
        if tokens <= FEW_BITS:
            return b1_vector(x.packed, x_step, bits, step, width, bias=bias, out_dtype=dtype)
        x_sums = b1_row_sums(x.packed, width) if x.sums is None else x.sums.reshape(-1)
        sums = sums.reshape(-1)
        if self._one_bit == "b1_wgmma":
            return b1_linear_hopper(x.packed, x_step, x_sums, bits, step, sums, width, bias=bias, out_dtype=dtype)
        weight = B1Weight(bits, sums)
        return b1_linear(x.packed, x_step, weight, step, width, bias=bias, out_dtype=dtype, x_sums=x_sums)

    def _planes(
        self, spec: LinearSpec, x: QuantizedRows, w: Tensor, step: Tensor, sums: Tensor, bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        assert x.packed is not None and x.sums is not None and spec.activation is not None
        x_planes = planes_of(x.packed, spec.activation.bits, spec.in_features)
        x_step = x.step.expand(x.packed.shape[0], -1).contiguous()
        x_sums = x.sums.reshape(-1)
        return planes_linear(x_planes, x_step, x_sums, w, step, sums, spec.in_features, bias=bias, out_dtype=dtype)

    def _sparse(
        self, spec: LinearSpec, x: QuantizedRows, weight: SparseWeight, step: Tensor, bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        assert x.factors is not None and spec.weight is not None and spec.activation is not None
        x_form, w_form = integer_form(spec.activation.grid), integer_form(spec.weight.grid)
        assert x_form is not None and w_form is not None
        x_a = arrange_activation(x.factors, weight.pair).contiguous()
        x_step = x.step.expand(x_a.shape[0], -1).contiguous()
        return sparse_linear(x_a, x_step, weight, step, x_form, w_form, bias=bias, out_dtype=dtype)


def _is_paired(weight: Quantizer | None) -> bool:
    return weight is not None and isinstance(weight.sparsity, NofM) and weight.sparsity.pair

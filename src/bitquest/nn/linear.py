"""The linear layer of QuEST: trained on quantized operands, and the same layer running on integers.

T tokens, K in_features, N out_features.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitquest.errors import ConfigError
from bitquest.nn.quantizer import ActivationQuantizer, WeightQuantizer, keeping_dtype, once_per_input
from bitquest.numerics.fake_quant import Encoded, dequantize, encode
from bitquest.numerics.integers import float_linear, integer_form
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import Rotation
from bitquest.ops.backend import Backend, resolve_backend
from bitquest.ops.registry import (
    encode_op,
    grid_text,
    integer_linear_op,
    quantizer_text,
    rotate_op,
    weight_only_linear_op,
)


class QuantizedLinear(nn.Linear):
    """y = Q(xH) Q(WH)ᵀ + b. The weight stays a float parameter under its old name; quantization is in the forward pass.

    The layer owns the one rotation and hands it to both quantizers, so they cannot disagree. `weight` or
    `activation` None leaves that operand rotated, not quantized. ConfigError if K fits no rotation, group or pattern.
    """

    def __init__(
        self, linear: nn.Linear, *, weight: Quantizer | None, activation: Quantizer | None, rotation: Rotation
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rotation = rotation.resolve(self.in_features)
        for spec in (weight, activation):
            if spec is not None:
                spec.check(self.in_features)
        self.weight_quantizer = WeightQuantizer(weight, linear.weight, self.rotation)
        self.activation_quantizer = ActivationQuantizer(activation)
        self.activation_quantizer.to(linear.weight.device)
        self.train(linear.training)

    def forward(self, x_TK: Tensor) -> Tensor:
        """x (…, K) of any float dtype to (…, N); under autocast the product runs in autocast's dtype."""
        xq_TK = self.activation_quantizer(x_TK, self.rotation)
        wq_NK = self.weight_quantizer(self.weight, self.rotation)
        return F.linear(xq_TK, wq_NK, self.bias)

    def encode_weight(self) -> Encoded | None:
        """The weight's codes (N, K), steps and kept mask; None if it is not quantized."""
        return self.weight_quantizer.encode(self.weight, self.rotation)

    def encode_input(self, x: Tensor) -> Encoded | None:
        """Codes (…, K) and steps the layer would use for this input; None if it is not quantized."""
        return self.activation_quantizer.encode(x, self.rotation)

    def quantized_weight(self) -> Tensor:
        """The float32 weight (N, K) in rotated space that the forward pass multiplies by."""
        with torch.no_grad():
            return self.weight_quantizer(self.weight, self.rotation).to(torch.float32)


class _Factors(NamedTuple):
    """The integers behind a layer's codes, and what they were made from."""

    codes: Tensor
    kept: Tensor | None
    versions: tuple[int, ...]
    integers: Tensor


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # inference tensors do not count their writes


class PackedLinear(nn.Module):
    """The trained layer on integers: codes, steps, and an exact integer product; no float weight.

    codes: int8 (N, K), centred, 0 where `kept` (bool, N:M sparsity) is False. step: float32 Δ, (N, 1), (N, groups) or
    (1, 1). activation_step: the trained Δ of a learned activation quantizer. float_weight: the rotated float32 weight,
    for a layer whose weight is not quantized. Raises ConfigError for sparse 8-bit weights, which have no int8 form.
    """

    codes: Tensor | None
    step: Tensor | None
    kept: Tensor | None
    bias: Tensor | None
    activation_step: Tensor | None
    float_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        weight: Quantizer | None,
        activation: Quantizer | None,
        rotation: Rotation,
        codes: Tensor | None = None,
        step: Tensor | None = None,
        kept: Tensor | None = None,
        bias: Tensor | None = None,
        activation_step: Tensor | None = None,
        float_weight: Tensor | None = None,
        backend: str | Backend = Backend.AUTO,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight_spec, self.activation_spec = weight, activation
        self.rotation = rotation.resolve(in_features)
        self.backend = resolve_backend(backend)
        if weight is not None:
            weight.check(in_features)
            if kept is not None and weight.grid.bits == 8:
                raise ConfigError("sparse 8-bit weights cannot be packed: m·(2c + 1) needs 9 bits; use at most 7")
        for name, tensor in (
            ("codes", codes),
            ("step", step),
            ("kept", kept),
            ("bias", bias),
            ("activation_step", activation_step),
            ("float_weight", float_weight),
        ):
            self.register_buffer(name, tensor)
        self._weight_form = integer_form(weight.grid) if weight is not None else None
        self._input_form = integer_form(activation.grid) if activation is not None else None
        self._factors: _Factors | None = None
        self._input_text = quantizer_text(activation) if activation is not None else ""
        self._input_grid = grid_text(activation.grid) if activation is not None else ""
        self._weight_grid = grid_text(weight.grid) if weight is not None else ""

    @staticmethod
    def of(layer: QuantizedLinear, backend: str | Backend = Backend.AUTO) -> "PackedLinear":
        """The packed form of a trained layer."""
        encoded = layer.encode_weight()
        step = layer.activation_quantizer.effective_step()
        return PackedLinear(
            layer.in_features,
            layer.out_features,
            weight=layer.weight_quantizer.spec,
            activation=layer.activation_quantizer.spec,
            rotation=layer.rotation,
            codes=None if encoded is None else encoded.codes,
            step=None if encoded is None else encoded.step,
            kept=None if encoded is None else encoded.kept,
            bias=None if layer.bias is None else layer.bias.detach().clone(),
            activation_step=None if step is None else step.detach().clone(),
            float_weight=layer.quantized_weight() if encoded is None else None,
            backend=backend,
        )

    def encode_weight(self) -> Encoded | None:
        """The stored codes, steps and kept mask; None if the weight is not quantized."""
        if self.codes is None or self.step is None:
            return None
        return Encoded(self.codes, self.step, self.kept)

    def encode_input(self, x: Tensor) -> Encoded | None:
        """Codes (…, K) and steps the layer uses for this input; None if it is not quantized."""
        if self.activation_spec is None:
            return None
        return encode(x, self.activation_spec, self.rotation, self.activation_step)

    def forward(self, x_TK: Tensor) -> Tensor:
        """x (…, K) to (…, N) in x's dtype: integers in, integers multiplied, one scale per token and channel."""
        x = x_TK.detach()
        if self.activation_spec is None:
            x_h = once_per_input(x_TK, self, ("packed", "", self.rotation.block), lambda: self._rotated(x))
            y = self._weight_only(x_h.reshape(-1, self.in_features))
        else:
            if self.activation_step is None:
                key = ("packed", self._input_text, self.rotation.block)
                codes, step = once_per_input(x_TK, self, key, lambda: self._encoded(x))
            else:
                codes, step = self._encoded(x)
            y = self._integer(codes.reshape(-1, self.in_features), step)
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features).to(x.dtype)

    def _rotated(self, x: Tensor) -> Tensor:
        x = x.to(torch.float32)
        return x if self.rotation.block == 1 else rotate_op(x, self.rotation.block)

    def _encoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return encode_op(x, self.activation_step, self._input_text, self.rotation.block)

    def _weight_factors(self) -> Tensor:
        """The int8 integers (N, K) of the codes, computed once for the codes and mask that are there."""
        assert self._weight_form is not None and self.codes is not None
        codes, kept = self.codes, self.kept
        if torch.compiler.is_compiling():  # the compiler cannot follow versions
            return self._weight_form.of_codes(codes, kept)
        made, versions = self._factors, tuple(_version(t) for t in (codes, kept) if t is not None)
        if made is None or made.codes is not codes or made.kept is not kept or made.versions != versions:
            made = self._factors = _Factors(codes, kept, versions, self._weight_form.of_codes(codes, kept))
        return made.integers

    def _float_weight(self) -> Tensor:
        """The weight as floats, for a grid without integers or a weight that was never quantized."""
        if self.float_weight is not None:
            return self.float_weight
        assert self.weight_spec is not None and self.codes is not None and self.step is not None
        return dequantize(self.codes, self.step, self.weight_spec.grid, self.kept)

    def _weight_only(self, x_h: Tensor) -> Tensor:
        if self._weight_form is None or self.step is None:
            return float_linear(x_h, self._float_weight())
        step = self.step.expand(self.out_features, -1)
        return weight_only_linear_op(x_h, self._weight_factors(), step, self._weight_grid)

    def _integer(self, codes: Tensor, step: Tensor) -> Tensor:
        x_step = step.reshape(-1, step.shape[-1])
        if self._weight_form is None or self._input_form is None or self.step is None:
            assert self.activation_spec is not None
            return float_linear(dequantize(codes, x_step, self.activation_spec.grid), self._float_weight())
        x_step = x_step.expand(codes.shape[0], -1)
        w_step = self.step.expand(self.out_features, -1)
        return integer_linear_op(codes, x_step, self._weight_factors(), w_step, self._input_grid, self._weight_grid)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._factors = None
        return super()._apply(keeping_dtype(fn), recurse)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, weight={self.weight_spec}, "
            f"activation={self.activation_spec}, rotation={self.rotation}, backend={self.backend}"
        )

"""The linear layer of QuEST as it is trained: on quantized operands, float parameters.

T tokens, K in_features, N out_features.
"""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitquest.errors import ConfigError
from bitquest.nn.integer_training import InputRows, TrainingPlan, WeightRows, multiply, output_dtype, quantize_input
from bitquest.nn.pending import PendingInput, as_tensor
from bitquest.nn.quantizer import (
    ActivationQuantizer,
    WeightQuantizer,
    can_be_recognised,
    is_recording,
    once_per_input,
    record_rows,
    weight_state,
)
from bitquest.numerics.fake_quant import Encoded
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import Rotation
from bitquest.ops.backend import Backend, WrongDeviceError, backend_for, resolve_backend
from bitquest.ops.linear_spec import LinearSpec
from bitquest.ops.rows import ENGINE_DTYPES


class QuantizedLinear(nn.Linear):
    """y = Q(xH) Q(WH)ᵀ + b. The weight stays a float parameter under its old name; quantization is in the forward pass.

    The layer owns the one rotation and hands it to both quantizers, so they cannot disagree. `weight` or
    `activation` None leaves that operand rotated, not quantized. backend: where one that trains on integers is there
    (integer_training.py) the products run on codes; `torch` multiplies the fake-quantized floats. ConfigError if K fits
    no rotation, group or pattern, or the backend cannot train such a layer.
    """

    _misplaced: str | None

    def __init__(
        self,
        linear: nn.Linear,
        *,
        weight: Quantizer | None,
        activation: Quantizer | None,
        rotation: Rotation,
        backend: str | Backend = Backend.AUTO,
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
        self.quantizes = True  # switched off by unquantized() alone
        self.backend = resolve_backend(backend)
        self._weight_rows = WeightRows()
        self._plan = self._make_plan()
        self.train(linear.training)

    def _make_plan(self) -> TrainingPlan | None:
        """How to train on integers on this device, None for fake quantization."""
        weight, activation = self.weight_quantizer.spec, self.activation_quantizer.spec
        spec = LinearSpec(self.in_features, self.out_features, weight, activation, self.rotation.block)
        device, self._misplaced = self.weight.device.type, None
        if device == "meta":
            return None
        try:
            chosen = backend_for(self.backend, spec, device, training=True)
        except WrongDeviceError as error:  # it may yet be moved; until then forward says so
            self._misplaced = str(error)
            return None
        return None if chosen == Backend.TORCH else TrainingPlan(spec, chosen)

    def forward(self, x_TK: Tensor | PendingInput) -> Tensor:
        """x (…, K) of any float dtype to (…, N); under autocast the product runs in autocast's dtype."""
        if not self.quantizes:
            return F.linear(as_tensor(x_TK), self.weight, self.bias)
        if self._plan is not None and x_TK.dtype in ENGINE_DTYPES:
            return self._on_integers(x_TK, self._plan)
        if self._misplaced is not None:
            raise WrongDeviceError(self._misplaced)
        xq_TK = self.activation_quantizer(as_tensor(x_TK), self.rotation)
        wq_NK = self.weight_quantizer(self.weight, self.rotation)
        return F.linear(xq_TK, wq_NK, self.bias)

    def _on_integers(self, x: Tensor | PendingInput, plan: TrainingPlan) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ConfigError(f"this layer reads {self.in_features} features, not {x.shape[-1]}")
        dtype = output_dtype(x.dtype, x.device.type)
        key = (*plan.input.key, dtype)
        made: InputRows
        if isinstance(x, PendingInput):
            pending = x
            made = x.once(key, lambda: quantize_input(plan.input, pending.x, dtype, pending.prologue))
        else:
            tensor = x
            made = once_per_input(x, self, key, lambda: quantize_input(plan.input, tensor, dtype))
        state = weight_state if can_be_recognised(self.weight) else None
        w = self._weight_rows.get(self.weight, plan.weight, state)
        if is_recording() and not torch.compiler.is_compiling():
            record_rows(self.activation_quantizer, made.rows, self.in_features)
            record_rows(self.weight_quantizer, w, self.in_features)
        y = multiply(plan, made, self.weight, w, self.bias, dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    @property
    def training_backend(self) -> Backend:
        """Whose products train this layer: a backend that works on integers, or torch for fake-quantized floats."""
        return Backend.TORCH if self._plan is None else Backend(self._plan.backend)

    def forget(self) -> None:
        """Drop the cached quantized weight: after a change that nothing shows, such as one through `.data` on a GPU."""
        self.weight_quantizer.forget()
        self._weight_rows.forget()

    def hold_weight(self) -> None:
        """Quantize the weight now, for every forward pass until `release_weight` (see `weights_held`).

        Does nothing for the part of a weight that FSDP2 shares out: it is gathered in each forward pass.
        """
        if self._plan is not None and type(self.weight) is nn.Parameter:
            self._weight_rows.hold(self.weight, self._plan.weight)

    def release_weight(self) -> None:
        """Look at the weight again from now on."""
        self._weight_rows.release()

    def requantize(self, *, weight: Quantizer | None, activation: Quantizer | None) -> None:
        """Train with these quantizers from now on; the weight stays what it is. Only where no step is learned.

        Raises ConfigError if K does not fit their groups or pattern, or the backend cannot train such a layer.
        """
        for operand, spec in ((self.weight_quantizer, weight), (self.activation_quantizer, activation)):
            if spec is not None:
                spec.check(self.in_features)
            operand.respecify(spec)
        self.forget()
        self._plan = self._make_plan()

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        moved = super()._apply(fn, recurse)
        self._weight_rows.forget()
        self._plan = self._make_plan()
        return moved

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_weight_rows": WeightRows()}  # copies of the module start without a cache


def training_backends(model: nn.Module) -> str:
    """The names of the backends that train a model's quantized layers, "torch" where it has none."""
    names = {layer.training_backend.value for layer in model.modules() if isinstance(layer, QuantizedLinear)}
    return ", ".join(sorted(names)) or Backend.TORCH.value

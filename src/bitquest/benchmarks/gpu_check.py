"""Correct before fast: what is timed is first compared with the definition in numerics/, on the data it is timed on.

A packed layer is held to its own codes: they must be those of the definition but for values on a threshold, and the
output must be the exact integer product of these codes, rounded once. Layers in training, whose products are bfloat16
on the way back, are compared by ‖a − b‖/‖b‖ with the fake-quantizing float32 layer on the same numbers.
T tokens, K in_features, N out_features.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bitquest.nn import PackedLinear
from bitquest.numerics.fake_quant import dequantize, encode
from bitquest.numerics.integers import float_linear, integer_form, integer_linear, weight_only_linear

STEP_ERROR = 1e-5  # relative: the same sum of squares in another order
FLIPPED = {8: 1e-4}  # share of codes that may lie on a threshold, by bits: about twenty times what was measured
FLIPPED_ELSE = 2e-5
BF16_ERROR = 1.01 * 2.0**-7  # relative: one unit in the last place, though rounding to nearest makes half of it
FLOAT_ERROR = 1e-2  # norms: bfloat16 activations times exact weights
TRAINING_ERROR = 2e-2  # norms: products in bfloat16, forward and backward
LAYER_ERROR = 5e-3  # norms: one layer in float32 on one input; a flipped code of a few hundred tokens is about 1e-3
# Norms, through a whole model: one flipped code moves the next layers' values, which flips more. Two correct backends
# were found 0.13 (logits) and 0.12 (gradients) apart in six layers; a wrong connection is about 1.
MODEL_ERROR = 0.5


@contextmanager
def without_tuning() -> Iterator[None]:
    """Run kernels with their default tiling inside: shapes that are only checked are not worth tuning."""
    before = os.environ.get("BITQUEST_TUNE")
    os.environ["BITQUEST_TUNE"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["BITQUEST_TUNE"]
        else:
            os.environ["BITQUEST_TUNE"] = before


class WrongResultError(Exception):
    """What was to be timed computes something else than the definition."""


def relative_error(a: Tensor, b: Tensor) -> float:
    """‖a − b‖/‖b‖ in float32; infinite where a is not finite."""
    a, b = a.detach().float(), b.detach().float()
    if not bool(a.isfinite().all()):
        return float("inf")
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def require(name: str, found: float, allowed: float, checks: dict[str, Any]) -> None:
    """Note what was found and what is allowed; raise WrongResultError where it is more (or NaN)."""
    checks[name] = {"found": found, "allowed": allowed}
    if not found <= allowed:
        raise WrongResultError(f"{name}: {found:.3g}, and at most {allowed:.3g} is right")


def check_packed(layer: PackedLinear, x: Tensor) -> dict[str, Any]:
    """Compare layer(x), x (T, K), with the definition. Raises WrongResultError naming the quantity that is off."""
    checks: dict[str, Any] = {}
    with torch.no_grad():
        y = layer(x)
        if y.dtype != x.dtype or y.shape != (x.shape[0], layer.out_features):
            raise WrongResultError(f"the output is {y.dtype} {tuple(y.shape)}")
        if layer.activation_spec is None:
            expected_y = _with_bias(_weight_only(layer, x), layer)
            require("output, norms", relative_error(y, expected_y), FLOAT_ERROR, checks)
            return checks
        made, expected = layer.encode_input(x), encode(x, layer.activation_spec, layer.rotation)
        assert made is not None
        off = ((made.step - expected.step).abs() / expected.step).max()
        require("steps of the input", float(off), STEP_ERROR, checks)
        apart = (made.codes.to(torch.int16) - expected.codes).abs()
        require("codes of the input, levels apart", int(apart.max()), 1, checks)
        allowed = max(FLIPPED.get(layer.activation_spec.bits, FLIPPED_ELSE), 2 / apart.numel())
        require("codes of the input, share that differs", float((apart > 0).float().mean()), allowed, checks)
        product = _with_bias(_exact(layer, made.codes, made.step), layer)
        room = BF16_ERROR * product.abs() + 1e-5 * product.square().mean().sqrt()
        worst = ((y.float() - product).abs() / room).nan_to_num(float("inf"), float("inf")).max()
        require("output, in units of its rounding", float(worst), 1.0, checks)
    return checks


def _with_bias(product: Tensor, layer: PackedLinear) -> Tensor:
    return product if layer.bias is None else product + layer.bias.float()


def _weight_only(layer: PackedLinear, x: Tensor) -> Tensor:
    weight = layer.encode_weight()
    assert weight is not None and layer.weight_spec is not None
    x_h, form = layer.rotation.apply(x.float()), integer_form(layer.weight_spec.grid)
    if form is None:
        return float_linear(x_h, dequantize(weight.codes, weight.step, layer.weight_spec.grid, weight.kept))
    step = weight.step.expand(layer.out_features, -1)
    return weight_only_linear(x_h, form.of_codes(weight.codes, weight.kept), step, form)


def _exact(layer: PackedLinear, codes: Tensor, step: Tensor) -> Tensor:
    """The layer's product (T, N) in float32 from these codes of its input."""
    weight = layer.encode_weight()
    assert weight is not None and layer.weight_spec is not None and layer.activation_spec is not None
    x_form, w_form = integer_form(layer.activation_spec.grid), integer_form(layer.weight_spec.grid)
    assert x_form is not None and w_form is not None, "every scheme that is measured has integers"
    factors = w_form.of_codes(weight.codes, weight.kept)
    w_step = weight.step.expand(layer.out_features, -1)
    return integer_linear(x_form.of_codes(codes), step, factors, w_step, x_form, w_form)


def check_training(
    results: Iterable[tuple[str, Tensor, Tensor]], allowed: float = TRAINING_ERROR
) -> dict[str, dict[str, float]]:
    """Compare (name, found, reference) triples by norms. Raises WrongResultError naming the one that is off."""
    checks: dict[str, Any] = {}
    for name, found, reference in results:
        require(name, relative_error(found, reference), allowed, checks)
    return checks


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a module's parameters, by name."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

"""Correct before fast: what is timed on the CPU is first compared with the torch engine, on the very data.

The input's codes must be the reference's but for values on a threshold; the output must be what the reference makes of
these codes, up to the rounding of float32. T tokens, K in_features, N out_features.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bitquest.benchmarks.gpu_check import FLIPPED, FLIPPED_ELSE, STEP_ERROR, WrongResultError, require
from bitquest.nn import PackedLinear
from bitquest.numerics.packing import pack
from bitquest.ops.engine import TorchEngine
from bitquest.ops.linear_spec import LinearSpec
from bitquest.ops.rows import PackedWeight, QuantizedRows

OUTPUT_ERROR = 2e-5  # of the output's rms: sums of a few thousand floats in another order

__all__ = ["OUTPUT_ERROR", "WrongResultError", "check_layer"]


def check_layer(layer: PackedLinear, x: Tensor, ways: Mapping[str, Callable[[], Tensor]]) -> dict[str, Any]:
    """Compare every way of computing layer(x), x (T, K) float32, with the torch engine.

    Returns what was found and what is allowed, by name. Raises WrongResultError naming the quantity that is off.
    """
    reference, checks = TorchEngine(), dict[str, Any]()
    block = layer.rotation.block
    spec = LinearSpec(layer.in_features, layer.out_features, layer.weight_spec, layer.activation_spec, block)
    rows: QuantizedRows | Tensor
    with torch.no_grad():
        parts = reference.prepare(spec, PackedWeight(layer.packed, layer.step, layer.kept, layer.float_weight))
        if layer.activation_spec is None:
            rows = reference.rotate(x, block)
        else:
            rows = _rows(layer, x, reference, checks)
        expected = reference.linear(spec, rows, parts, layer.bias, torch.float32)
        size = expected.square().mean().sqrt().clamp_min(1e-30)
        for name, compute in ways.items():
            found = compute()
            if found.dtype != torch.float32 or found.shape != expected.shape:
                raise WrongResultError(f"{name}: the output is {found.dtype} {tuple(found.shape)}")
            off = ((found - expected).abs().max() / size).nan_to_num(float("inf"))
            require(f"{name}: output, of its rms", float(off), OUTPUT_ERROR, checks)
    return checks


def _rows(layer: PackedLinear, x: Tensor, reference: TorchEngine, checks: dict[str, Any]) -> QuantizedRows:
    """The input as the layer's own backend quantizes it, held against the reference."""
    activation, form = layer.activation_spec, LinearSpec(1, 1, None, layer.activation_spec, 1).input_form
    assert activation is not None and form is not None
    made = layer.encode_input(x)
    assert made is not None
    expected = reference.quantize_rows(
        x, activation, layer.rotation.block, frozenset({"factors"}), layer.activation_step
    )
    assert expected.factors is not None
    off = ((made.step - expected.step).abs() / expected.step).max()
    require("steps of the input", float(off), STEP_ERROR, checks)
    factors = form.of_codes(made.codes)
    apart = factors != expected.factors
    allowed = max(FLIPPED.get(activation.bits, FLIPPED_ELSE), 2 / apart.numel())
    require("codes of the input, share that differs", float(apart.float().mean()), allowed, checks)
    return QuantizedRows(factors, pack(made.codes, activation.bits), made.step, None, None)

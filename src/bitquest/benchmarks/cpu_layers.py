"""One packed layer against torch on a CPU: checked, then timed, from float input to float output.

Two ways of ours: "engine" is one call of the compiled library (rotation, quantization, product), "layer" is the module
that a model holds, which adds what Python costs. torch gets float32 and bfloat16 inputs that are there already.
T tokens, K in_features, N out_features.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitquest.benchmarks.cpu_check import check_layer
from bitquest.benchmarks.cpu_random import random_linear, random_weight
from bitquest.benchmarks.cpu_table import Case, Sizes
from bitquest.benchmarks.cpu_timing import PAST_CACHE, WARM, copies_past_cache, sampler, speedup, take_turns, times
from bitquest.benchmarks.cpu_torchao import NAME as TORCHAO
from bitquest.benchmarks.cpu_torchao import torchao_layer
from bitquest.nn import PackedLinear, Scheme
from bitquest.ops.backend import Backend, backend_for
from bitquest.ops.linear_spec import LinearSpec
from bitquest.ops.rows import PackedWeight

Calls = Sequence[Callable[[], Tensor]]

SETTLE = 3e-3  # seconds of rest before a sample: the threads of the candidate before still spin for a while
TORCH = ("torch float32", "torch bf16")


def measure_layer(case: Case, sizes: Sizes, repetitions: int) -> dict[str, Any]:
    """Check a layer and time it at the current number of threads.

    Returns {"checks": …, "rows": one for warm and one for past the cache}. Raises WrongResultError.
    """
    tokens, width = sizes.many if case.many else 1, sizes.width
    with torch.no_grad():
        candidates, layer, x = _candidates(case.scheme, tokens, width)
        ours = {name: calls[0] for name, calls in candidates.items() if name in ("engine", "layer")}
        checks = check_layer(layer, x, ours)
        other, torchao = torchao_layer(case.scheme, x, width)
        rows = []
        for memory in (WARM, PAST_CACHE):
            samplers = {n: sampler(calls[:1] if memory == WARM else calls, memory) for n, calls in candidates.items()}
            if other is not None and memory == WARM:
                samplers[TORCHAO] = sampler([other], memory)
            row: dict[str, Any] = {"memory": memory, "seconds": times(take_turns(samplers, repetitions, settle=SETTLE))}
            measured = row["seconds"]
            row["copies"] = {name: 1 if memory == WARM else len(calls) for name, calls in candidates.items()}
            row["speedup"] = {name: speedup(measured[name], [measured[t] for t in TORCH]) for name in ours}
            rows.append(row)
    assert layer.packed is not None
    shape = {"tokens": tokens, "in_features": width, "out_features": width, "weight_bytes": layer.packed.numel()}
    backend = backend_for(Backend.AUTO, _spec(layer), "cpu").value
    return {**shape, "backend": backend, "torchao": torchao, "checks": checks, "rows": rows}


def _spec(layer: PackedLinear) -> LinearSpec:
    block = layer.rotation.block
    return LinearSpec(layer.in_features, layer.out_features, layer.weight_spec, layer.activation_spec, block)


def _candidates(name: str, tokens: int, width: int) -> tuple[dict[str, Calls], PackedLinear, Tensor]:
    """Calls by name, each on copies of weight and input of its own; the first packed layer and its input."""
    generator, scheme = torch.Generator().manual_seed(0), Scheme.parse(name)
    assert scheme.weight is not None
    inputs = torch.randn(4, tokens, width, generator=generator)
    found: dict[str, Calls] = {}
    for label, dtype in zip(TORCH, (torch.float32, torch.bfloat16), strict=True):
        count = copies_past_cache(width * width * dtype.itemsize)
        weights = [random_weight((width, width), dtype, generator) for _ in range(count)]
        found[label] = [_linear(inputs[i % 4].to(dtype), w) for i, w in enumerate(weights)]
    factors = torch.randint(-127, 128, (width, width), dtype=torch.int8, generator=generator)
    rows = torch.randint(-127, 128, (tokens, width), dtype=torch.int8, generator=generator)
    int8 = [factors.clone() for _ in range(copies_past_cache(factors.numel()))]
    found["torch._int_mm, product alone"] = [_int_mm(rows, w) for w in int8]
    layers: list[PackedLinear] = []
    count = copies_past_cache(width * width * scheme.weight.bits // 8)
    for _ in range(count):
        operands = (scheme.weight, scheme.activation, scheme.rotation)
        layers.append(random_linear(width, width, *operands, generator))
    # Each layer has an input of its own: layers that read one tensor share its quantization.
    found["layer"] = [_module(layer, inputs[i % 4].clone()) for i, layer in enumerate(layers)]
    if backend_for(Backend.AUTO, _spec(layers[0]), "cpu") == Backend.NATIVE:
        found["engine"] = [_engine(layer, inputs[i % 4]) for i, layer in enumerate(layers)]
    return found, layers[0], inputs[0]


def _linear(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
    return lambda: F.linear(x, w)


def _int_mm(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
    return lambda: torch._int_mm(x, w.t())


def _module(layer: PackedLinear, x: Tensor) -> Callable[[], Tensor]:
    return lambda: layer(x)


def _engine(layer: PackedLinear, x: Tensor) -> Callable[[], Tensor]:
    """The library's one call from float rows to outputs; its two calls where it wants the rows made before."""
    from bitquest.ops import native_linear
    from bitquest.ops.native_engine import NativeEngine

    spec, engine = _spec(layer), NativeEngine()
    parts = engine.prepare(spec, PackedWeight(layer.packed, layer.step, layer.kept))
    prepared, channels = [parts[0]], [spec.out_features]
    quantizer, block, want = spec.activation, spec.block, engine.input_parts(spec)

    def two_calls() -> Tensor:
        rows = engine.rotate(x, block) if quantizer is None else engine.quantize_rows(x, quantizer, block, want)
        return engine.linear(spec, rows, parts, None, torch.float32)

    def one_call() -> Tensor:
        made = native_linear.quantized_linear(x, quantizer, block, prepared, channels)
        assert made is not None
        return made[0]

    fits = native_linear.quantized_linear(x, quantizer, block, prepared, channels) is not None
    return one_call if fits else two_calls


def measure_row(case: Case, sizes: Sizes, repetitions: int, rows: int) -> dict[str, Any]:
    """Rotating, quantizing and packing: the time of a row in a call with `rows` of them, and of a call with one."""
    from bitquest.ops.engine_ops import quantize_rows
    from bitquest.ops.registry import quantizer_text

    quantizer = Scheme.parse(case.scheme).activation
    assert quantizer is not None
    block = Scheme.parse(case.scheme).rotation.resolve(sizes.width).block
    x, want = torch.randn(rows, sizes.width, generator=torch.Generator().manual_seed(0)), frozenset({"packed"})
    backend = backend_for(Backend.AUTO, LinearSpec(sizes.width, 1, quantizer, quantizer, block), "cpu").value
    text = quantizer_text(quantizer)
    calls: dict[str, Callable[[], object]] = {
        "rows in one call": lambda: quantize_rows(x, text, block, want, backend),
        "one row, operator": lambda: quantize_rows(x[:1], text, block, want, backend),
    }
    if backend == Backend.NATIVE:
        from bitquest.ops import native

        calls["rows in one call"] = lambda: native.quantize_rows(x, quantizer, block, want)
        calls["one row, library call"] = lambda: native.quantize_rows(x[:1], quantizer, block, want)
    samplers = {name: sampler([call], WARM) for name, call in calls.items()}
    measured = times(take_turns(samplers, repetitions, settle=SETTLE))
    many = measured.pop("rows in one call")
    measured["a row"] = {
        "median_seconds": many["median_seconds"] / rows,
        "minimum_seconds": many["minimum_seconds"] / rows,
        "repetitions": many["repetitions"],
    }
    return {"width": sizes.width, "rows_of_a_call": rows, "backend": backend, "seconds": measured}

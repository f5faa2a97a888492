"""What the hardware can do, measured first: the ceilings that every other figure is read against.

Copies count bytes read and written. Products are of random data, both operands (N, K) and (T, K) with K contiguous.
Each floor stands alone: one that cannot be measured says why and the others go on.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bitquest.benchmarks.gpu_context import Context
from bitquest.benchmarks.gpu_layers import Emit
from bitquest.benchmarks.gpu_table import Job
from bitquest.benchmarks.gpu_timing import Call, seconds_of
from bitquest.errors import ConfigError
from bitquest.nn import Scheme
from bitquest.ops.backend import backend_for, engine
from bitquest.ops.engine_ops import mask_rotate_op, quantize_rows
from bitquest.ops.linear_spec import LinearSpec
from bitquest.ops.registry import quantizer_text

_LAUNCHES = 64  # in one graph, for the launch floor
_EMPTY_KERNEL = 'extern "C" __global__ void empty() {}'
_BLOCK = 128

Floor = tuple[str, str, Callable[[Context], float]]  # name, unit, measure


def floors(job: Job, context: Context, emit: Emit) -> None:
    """Measure every floor; the first that fails for want of hardware does not end the rest."""
    found: dict[str, Any] = {}
    for name, unit, measure in _floors(context):
        try:
            found[name] = {"value": measure(context), "unit": unit}
        except Exception as error:
            if "CUDA error" in str(error) or "illegal" in str(error):
                found[name] = {"value": None, "unit": unit, "reason": _one_line(error)}
                emit(job.rows[0], {"floors": found})
                raise  # the device is lost to this process
            found[name] = {"value": None, "unit": unit, "reason": _one_line(error)}
        emit(job.rows[0], {"floors": found})  # what is known so far, should the next one never return
        context.free()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _floors(context: Context) -> Iterator[Floor]:
    yield "copy", "GB/s", _copy
    yield "launch of an empty kernel, under a CUDA graph", "µs", _launch
    for side in context.sizes.floors:
        yield f"bf16 product, {side}³", "TFLOP/s", _product(side, torch.bfloat16, lambda x, w: F.linear(x, w))
        yield f"torch._int_mm, {side}³", "TOP/s", _product(side, torch.int8, lambda x, w: torch._int_mm(x, w.t()))
        yield f"Triton s8 product alone, {side}³", "TOP/s", _product(side, torch.int8, _triton_int8(context))
        for name in ("mma", "wgmma"):
            yield f"b1 product alone by {name}, {side}³", "TOP/s", _b1(side, name)
    tokens, width = context.sizes.tokens, context.sizes.prefill[0][0]
    for scheme in ("w4a4", "w1a1"):
        title = f"rows of {tokens}×{width} bf16"
        yield f"quantize {title} for inference, {scheme}", "GB/s read", _quantize(scheme, tokens, width, False)
        yield f"quantize {title} for training, {scheme}", "GB/s read", _quantize(scheme, tokens, width, True)
    yield f"mask and rotate back {tokens}×{width} bf16", "GB/s read", _mask_rotate(tokens, width)


def _median(calls: list[Call], context: Context, graph: bool = True) -> float:
    return seconds_of(calls, context.rounds, context.device, graph).median


def _copy(context: Context) -> float:
    source = torch.empty(context.sizes.copy_bytes, dtype=torch.uint8, device=context.device)
    source.random_(generator=context.generator)
    target = torch.empty_like(source)
    return 2 * source.numel() / _median([lambda: target.copy_(source)], context) / 1e9


def _launch(context: Context) -> float:
    kernel = _empty_kernel(context)
    return _median([kernel] * _LAUNCHES, context) * 1e6


def _empty_kernel(context: Context) -> Call:
    if context.device.type != "cuda":
        return lambda: None
    from bitquest.ops.cuda.driver import load_driver
    from bitquest.ops.cuda.nvrtc import load_nvrtc

    major, minor = torch.cuda.get_device_capability(context.device)
    image = load_nvrtc().compile(_EMPTY_KERNEL, name="empty.cu", architecture=f"sm_{major}{minor}")
    function = load_driver().load(image, torch.cuda.current_device()).function("empty")
    return lambda: function.launch((1, 1, 1), (32, 1, 1), [])


def _product(side: int, dtype: torch.dtype, product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Context], float]:
    def measure(context: Context) -> float:
        def made() -> Tensor:
            empty = torch.empty(side, side, dtype=dtype, device=context.device)
            if dtype == torch.int8:
                return empty.random_(-127, 128, generator=context.generator)
            return empty.normal_(generator=context.generator)

        pairs = [(made(), made()) for _ in range(2)]
        calls = [_call(product, x, w) for x, w in pairs]
        return 2 * side**3 / _median(calls, context) / 1e12

    return measure


def _call(product: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor) -> Call:
    return lambda: product(x, w)


def _triton_int8(context: Context) -> Callable[[Tensor, Tensor], Tensor]:
    def product(x: Tensor, w: Tensor) -> Tensor:
        if context.device.type != "cuda":
            raise ConfigError("Triton kernels need a CUDA device")
        from bitquest.ops.triton.int8_linear import int8_product

        return int8_product(x, w)

    return product


def _b1(side: int, name: str) -> Callable[[Context], float]:
    """Both 1-bit kernels on packed random bits; their operations are counted as multiplications and additions."""

    def measure(context: Context) -> float:
        if context.device.type != "cuda":
            raise ConfigError("the 1-bit kernels need a CUDA device")

        def made() -> Tensor:
            bits = torch.empty(side, side // 8, dtype=torch.uint8, device=context.device)
            return bits.random_(0, 256, generator=context.generator)

        call = _mma if name == "mma" else _wgmma
        return 2 * side**3 / _median([call(made(), made(), side) for _ in range(2)], context) / 1e12

    return measure


def _mma(x_bits: Tensor, w_bits: Tensor, width: int) -> Call:
    from bitquest.ops.cuda.one_bit import b1_product, b1_row_sums, prepare_b1_weight

    weight, x_sums = prepare_b1_weight(w_bits, width), b1_row_sums(x_bits, width)
    return lambda: b1_product(x_bits, weight, width, x_sums=x_sums)


def _wgmma(x_bits: Tensor, w_bits: Tensor, width: int) -> Call:
    from bitquest.ops.cuda.planes import plane_sums, planes_of, planes_product

    x, w = planes_of(x_bits, 1, width), planes_of(w_bits, 1, width)
    x_sums, w_sums = plane_sums(x, width), plane_sums(w, width)
    return lambda: planes_product(x, x_sums, w, w_sums, width)


def _quantize(scheme: str, tokens: int, width: int, training: bool) -> Callable[[Context], float]:
    def measure(context: Context) -> float:
        made = Scheme.parse(scheme)
        assert made.activation is not None
        spec = LinearSpec(width, width, made.weight, made.activation, _BLOCK)
        backend = backend_for(context.chosen, spec, context.device.type, training)
        used = engine(backend.value)
        want = used.row_parts(spec) | {"packed", "mask"} if training else used.input_parts(spec)
        inputs = [_normal(tokens, width, context) for _ in range(3)]
        text = quantizer_text(made.activation)
        calls: list[Call] = [_quantizing(x, text, want, backend.value) for x in inputs]
        return 2 * tokens * width / _median(calls, context) / 1e9

    return measure


def _quantizing(x: Tensor, text: str, want: frozenset[str], backend: str) -> Call:
    return lambda: quantize_rows(x, text, _BLOCK, want, backend)


def _mask_rotate(tokens: int, width: int) -> Callable[[Context], float]:
    def measure(context: Context) -> float:
        made = Scheme.parse("w4a4")
        spec = LinearSpec(width, width, made.weight, made.activation, _BLOCK)
        backend = backend_for(context.chosen, spec, context.device.type, True).value
        pairs = []
        for _ in range(3):
            bits = torch.empty(tokens, width // 8, dtype=torch.uint8, device=context.device)
            pairs.append((_normal(tokens, width, context), bits.random_(0, 256, generator=context.generator)))
        calls: list[Call] = [_masking(g, m, backend) for g, m in pairs]
        return 2 * tokens * width / _median(calls, context) / 1e9

    return measure


def _masking(gradient: Tensor, mask: Tensor, backend: str) -> Call:
    return lambda: mask_rotate_op(gradient, mask, _BLOCK, torch.bfloat16, backend)


def _normal(tokens: int, width: int, context: Context) -> Tensor:
    made = torch.empty(tokens, width, dtype=torch.bfloat16, device=context.device)
    return made.normal_(generator=context.generator)

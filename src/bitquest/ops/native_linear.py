"""Products of the compiled CPU engine: weights in their kernel's layout, made once, and what multiplies them.

T rows and K elements of an activation, N output channels, G scale groups of a row. Errors as in native.py.
"""

import ctypes
from collections.abc import Sequence
from ctypes import byref
from functools import lru_cache

import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.integers import IntegerForm, integer_form
from bitquest.numerics.packing import packed_width
from bitquest.numerics.quantizer import Quantizer
from bitquest.ops import native_abi as abi
from bitquest.ops.native import DTYPES, done, library, matrix, quantizer_in, rows_contiguous, rows_in
from bitquest.ops.rows import Prologue, QuantizedRows

_ROTATION_ONLY = Quantizer()  # its block is read, the rest is not
_NO_FORM = IntegerForm(1.0, 1, 0, abi.FLOAT_INPUT)


@lru_cache(maxsize=64)
def _form(form: IntegerForm) -> abi.CForm:
    return abi.CForm(form.unit, form.factor, form.offset)


def _weight(
    form: IntegerForm, x_form: IntegerForm | None, channels: int, width: int, groups: int, sparse: bool
) -> abi.CWeight:
    c = abi.CWeight(channels=channels, width=width, groups=groups, bits=form.bits, form=_form(form))
    c.x_bits = abi.FLOAT_INPUT if x_form is None else x_form.bits
    c.x_uniform = int(x_form is not None and x_form.table is None)
    c.sparse = int(sparse)
    return c


def prepare(
    step: Tensor,
    form: IntegerForm,
    x_form: IntegerForm | None,
    width: int,
    *,
    packed: Tensor | None = None,
    factors: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """A weight (N, K) in the layout that `linear` reads: uint8, for this machine and process only.

    step: float32 (N, 1) or (N, G). form, x_form: integers of the weight and of the activation it will meet (None:
    rotated floats). Exactly one of packed (uint8, as in files) and factors (int8). kept: bool (N, K) of N:M sparsity.
    """
    matrix("the step", step, (torch.float32,))
    channels, groups = step.shape
    c = _weight(form, x_form, channels, width, groups, kept is not None)
    if (packed is None) == (factors is None):
        raise ConfigError("native engine: a weight is given as packed codes or as factors, one of the two")
    held: list[Tensor] = [step.contiguous()]
    c.step = held[0].data_ptr()
    if packed is not None:
        matrix("the packed weight", packed, (torch.uint8,), (channels, packed_width(width, form.bits)))
        held.append(packed.contiguous())
        c.packed = held[-1].data_ptr()
    if factors is not None:
        matrix("the weight's factors", factors, (torch.int8,), (channels, width))
        held.append(factors.contiguous())
        c.factors = held[-1].data_ptr()
    if kept is not None:
        matrix("the kept mask", kept, (torch.bool,), (channels, width))
        if packed is not None:  # factors are zero already where nothing is kept
            held.append(kept.contiguous())
            c.kept = held[-1].data_ptr()
    if form.table is not None:
        table = (ctypes.c_int8 * 2**form.bits)(*form.table)
        c.integer = ctypes.addressof(table)
    size = ctypes.c_int64()
    done(library().bq_weight_bytes(byref(c), byref(size)), "the size of a prepared weight")
    prepared = torch.empty(size.value, dtype=torch.uint8)
    code = library().bq_prepare_weight(byref(c), prepared.data_ptr(), torch.get_num_threads())
    done(code, f"preparing a {form.bits}-bit weight ({channels}, {width})")
    return prepared


def _activation(
    x: QuantizedRows | Tensor, width: int, form: IntegerForm | None
) -> tuple[abi.CActivation, list[Tensor]]:
    if isinstance(x, Tensor):
        matrix("x", x, (torch.float32,), (None, width))
        x = rows_contiguous(x)
        values = abi.CActivation(rows=x.shape[0], width=width, values=x.data_ptr(), values_stride=x.stride(0), groups=1)
        return values, [x]
    if form is None:
        raise ConfigError("native engine: quantized rows come with the integer form of their grid")
    source = x.factors if x.factors is not None else x.packed
    if source is None:
        raise ConfigError("native engine: quantized rows come with factors, or with packed codes at 1 bit")
    tokens = source.shape[0]
    matrix("the step of x", x.step, (torch.float32,))
    step = x.step.expand(tokens, -1).contiguous()
    c = abi.CActivation(rows=tokens, width=width, step=step.data_ptr(), groups=step.shape[1], form=_form(form))
    held = [step]

    def part(name: str, given: Tensor, dtype: torch.dtype, columns: int) -> int:
        matrix(name, given, (dtype,), (tokens, columns))
        held.append(given.contiguous())
        return held[-1].data_ptr()

    if x.factors is not None:
        c.factors = part("factors of x", x.factors, torch.int8, width)
    if x.packed is not None and form.bits == 1:
        c.packed = part("packed codes of x", x.packed, torch.uint8, packed_width(width, 1))
    if x.sums is not None:
        c.sums = part("sums of x", x.sums, torch.int32, step.shape[1])
    return c, held


def _output(
    tokens: int, channels: int, dtype: torch.dtype, bias: Tensor | None
) -> tuple[abi.COutput, Tensor, Tensor | None]:
    """The structure, the tensor it fills, and the bias it reads."""
    out = torch.empty(tokens, channels, dtype=dtype)
    c = abi.COutput(out.data_ptr(), channels, channels, DTYPES[dtype], torch.get_num_threads())
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
        matrix("the bias", bias, (torch.float32,), (channels,))
        c.bias = bias.data_ptr()
    return c, out, bias


def linear(
    prepared: Tensor,
    x: QuantizedRows | Tensor,
    channels: int,
    width: int,
    x_form: IntegerForm | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """y = x Wᵀ + bias (T, N) in `dtype`, from a weight of `prepare` and quantized rows (or rotated float32 rows)."""
    c, held = _activation(x, width, x_form)
    to, out, bias = _output(c.rows, channels, dtype, bias)
    code = library().bq_linear(prepared.data_ptr(), prepared.numel(), byref(c), byref(to))
    del held, bias
    if code:
        done(code, f"product of ({c.rows}, {width}) and ({channels}, {width})")
    return out


def quantized_linear(
    x: Tensor,
    quantizer: Quantizer | None,
    block: int,
    prepared: Sequence[Tensor],
    channels: Sequence[int],
    biases: Sequence[Tensor | None] | None = None,
    dtype: torch.dtype = torch.float32,
    step: Tensor | None = None,
    prologue: Prologue | None = None,
) -> list[Tensor] | None:
    """y (T, N) of each weight from float rows x (T, K) in one call: prologue, rotation, quantization and products.

    What `quantize_rows` and `linear` do, for weights that share x, without tensors in between: for decoding.
    quantizer None: weights prepared for floats. None if T is too large for the engine's own memory; then call the two.
    """
    made = quantizer_in(x, quantizer or _ROTATION_ONLY, block, step is not None)
    groups = x.shape[1] // made.groups_of if made.groups_of else 1
    rows, _, kept_alive = rows_in(x, groups, step, prologue)
    form = integer_form(quantizer.grid) if quantizer is not None else _NO_FORM
    if form is None:
        raise ConfigError("native engine: this codebook has no integers to multiply")
    count = len(prepared)
    given = biases or [None] * count
    outs = [_output(x.shape[0], n, dtype, bias) for n, bias in zip(channels, given, strict=True)]
    weights = (ctypes.c_void_p * count)(*[weight.data_ptr() for weight in prepared])
    sizes = (ctypes.c_int64 * count)(*[weight.numel() for weight in prepared])
    to = (abi.COutput * count)(*[c for c, _, _ in outs])
    code = library().bq_quantized_linear(made.reference, byref(rows), byref(_form(form)), count, weights, sizes, to)
    del kept_alive
    if code == abi.UNSUPPORTED:
        return None
    if code:
        done(code, f"quantized product of {tuple(x.shape)} and {count} weights")
    return [out for _, out, _ in outs]


def product(prepared: Tensor, x: QuantizedRows, channels: int, width: int, x_form: IntegerForm, groups: int) -> Tensor:
    """The exact integers Σ a_x·a_w, int32 (T, G, N), G = `groups` the finer of the two groupings. For tests."""
    c, held = _activation(x, width, x_form)
    out = torch.empty(c.rows, groups, channels, dtype=torch.int32)
    threads = torch.get_num_threads()
    code = library().bq_product(prepared.data_ptr(), prepared.numel(), byref(c), out.data_ptr(), channels, threads)
    del held
    done(code, f"integer product of ({c.rows}, {width}) and ({channels}, {width})")
    return out

"""Products of the compiled CPU engine: weights in their kernel's layout, made once, and what multiplies them.

T rows and K elements of an activation, N output channels, G scale groups of a row. Errors as in native.py.
"""

import ctypes
from ctypes import byref

import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.integers import IntegerForm
from bitquest.numerics.packing import packed_width
from bitquest.ops import native_abi as abi
from bitquest.ops.native import DTYPES, done, library, matrix, rows_contiguous
from bitquest.ops.rows import QuantizedRows


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
    for name, part, dtype, columns in (
        ("factors", x.factors, torch.int8, width),
        ("packed", x.packed if form.bits == 1 else None, torch.uint8, packed_width(width, 1)),
        ("sums", x.sums, torch.int32, step.shape[1]),
    ):
        if part is not None:
            matrix(f"{name} of x", part, (dtype,), (tokens, columns))
            held.append(part.contiguous())
            setattr(c, name, held[-1].data_ptr())
    return c, held


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
    out = torch.empty(c.rows, channels, dtype=dtype)
    to = abi.COutput(out=out.data_ptr(), channels=channels, dtype=DTYPES[dtype], threads=torch.get_num_threads())
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
        matrix("the bias", bias, (torch.float32,), (channels,))
        to.bias = bias.data_ptr()
    code = library().bq_linear(prepared.data_ptr(), prepared.numel(), byref(c), byref(to))
    del held
    done(code, f"product of ({c.rows}, {width}) and ({channels}, {width})")
    return out


def product(prepared: Tensor, x: QuantizedRows, channels: int, width: int, x_form: IntegerForm, groups: int) -> Tensor:
    """The exact integers Σ a_x·a_w, int32 (T, G, N), G = `groups` the finer of the two groupings. For tests."""
    c, held = _activation(x, width, x_form)
    out = torch.empty(c.rows, groups, channels, dtype=torch.int32)
    threads = torch.get_num_threads()
    code = library().bq_product(prepared.data_ptr(), prepared.numel(), byref(c), out.data_ptr(), channels, threads)
    del held
    done(code, f"integer product of ({c.rows}, {width}) and ({channels}, {width})")
    return out

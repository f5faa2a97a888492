"""The compiled CPU engine: rows to codes and back. Found at first use, never at import. Products: native_linear.py.

Tensors are on the CPU and two-dimensional: x (T, K), steps (T, 1) or (T, G) for G scale groups of a row.
Every function raises ConfigError where the engine is missing or does not do what is asked; the caller then falls back.
The number of threads is torch's, and does not change a bit of any result.
"""

import ctypes
from ctypes import byref
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.estimators import Trust, passes_everything
from bitquest.numerics.grids import CodebookGrid, Grid
from bitquest.numerics.integers import integer_form
from bitquest.numerics.packing import packed_width
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import MAX_BLOCK
from bitquest.numerics.scaling import EPSILON, AbsMax, AbsMean, GaussianMSE, Learned, PerGroup, PerTensor
from bitquest.ops import native_abi as abi
from bitquest.ops.rows import Prologue, QuantizedRows, RMSNorm

DTYPES = {torch.float32: abi.FLOAT32, torch.bfloat16: abi.BFLOAT16, torch.float16: abi.FLOAT16}
FLOATS = tuple(DTYPES)
_COST = "Packed models run on torch instead: several times slower, with the same results"


def availability() -> tuple[bool, str]:
    """Whether the engine can be used here, and on what, or why not and what that costs."""
    found, reason = abi.open_library()
    if found is None:
        return False, f"{reason}. {_COST}"
    wrong = abi.stale_of(found)
    return True, f"compiled kernels, on {isa()}" + (f"; {wrong}" if wrong else "")


def isa() -> str:
    """The instruction set in use: avx512, avxvnni, avx2, neoni8mm, neondot, neon or portable."""
    return str(library().bq_isa().decode())


def isas() -> tuple[str, ...]:
    """Every instruction set that BITQUEST_ISA can name here, best first."""
    return tuple(library().bq_isa_available().decode().split())


def library() -> ctypes.CDLL:
    """The loaded library. Raises ConfigError, with the reason, where there is none."""
    found, reason = abi.open_library()
    if found is None:
        raise ConfigError(f"the native engine cannot run: {reason}")
    return found


def done(code: int, what: str) -> None:
    """Raise ConfigError for an error code of the library."""
    if code:
        raise ConfigError(f"native engine, {what}: {library().bq_message(code).decode()}")


def matrix(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...] = (None, None)) -> None:
    """Raise ConfigError unless x is on the CPU, of one of the dtypes, and of a shape (None: any size)."""
    sizes = x.shape
    fits = len(sizes) == len(shape) and shape[0] in (None, sizes[0]) and shape[-1] in (None, sizes[-1])
    if x.is_cpu and x.dtype in dtypes and fits:  # written out for speed: this runs several times a token
        return
    if not x.is_cpu:
        raise ConfigError(f"native engine: {name} is on {x.device}, not on the CPU")
    if x.dtype not in dtypes:
        raise ConfigError(f"native engine: {name} is {x.dtype}, not {' or '.join(str(d) for d in dtypes)}")
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    raise ConfigError(f"native engine: {name} has shape {tuple(x.shape)}, not ({wanted})")


def rows_contiguous(x: Tensor) -> Tensor:
    """x (T, K), copied unless its rows are contiguous and do not overlap."""
    return x if x.is_contiguous() or (x.stride(-1) == 1 and x.stride(0) >= x.shape[1]) else x.contiguous()


class _Quantizer(NamedTuple):
    c: abi.CQuantizer
    reference: object  # ctypes.byref(c)
    groups_of: int  # elements that share a step; 0: the row
    passes: bool
    has_integers: bool
    keep: tuple[object, ...]  # the tables that c points to


def refuses_rows(quantizer: Quantizer, block: int) -> str | None:
    """Why `quantize_rows` does not take such operands, None if it does."""
    if block > MAX_BLOCK:
        return f"rotations go up to blocks of {MAX_BLOCK}, not {block}"
    if quantizer.is_sparse:
        return "N:M sparsity is not chosen in native code"
    if not isinstance(quantizer.scale, GaussianMSE | AbsMax | AbsMean | Learned):
        return f"{type(quantizer.scale).__name__} scales are not computed in native code"
    if isinstance(quantizer.scale, Learned) and quantizer.scale.offset:
        return "a learned offset is not subtracted in native code"
    return None


def _floats(values: list[float]) -> ctypes.Array[ctypes.c_float]:
    return (ctypes.c_float * len(values))(*values)


@lru_cache(maxsize=256)
def _quantizer(quantizer: Quantizer, block: int, given: bool) -> _Quantizer:
    reason = refuses_rows(quantizer, block)
    if reason is not None:
        raise ConfigError(f"native engine: {reason}")
    grid, scale, granularity = quantizer.grid, quantizer.scale, quantizer.granularity
    if isinstance(granularity, PerTensor) and not given:
        raise ConfigError("native engine: one step for a whole tensor must be given; rows are scaled one by one")
    c = abi.CQuantizer(bits=grid.bits, block=block, epsilon=EPSILON, max_level=grid.max_level, multiplier=1.0)
    keep: tuple[object, ...] = ()
    form = integer_form(grid)
    if isinstance(grid, CodebookGrid):
        levels = grid.levels
        tables = (_floats(list(levels)), _floats([(a + b) / 2 for a, b in pairwise(levels)]))
        c.levels, c.level, c.middle = len(levels), ctypes.addressof(tables[0]), ctypes.addressof(tables[1])
        keep = tables
        if form is not None and form.table is not None:
            integers = (ctypes.c_int8 * len(form.table))(*form.table)
            c.integer, keep = ctypes.addressof(integers), (*tables, integers)
    if given:
        c.scale = abi.SCALE_GIVEN
    elif isinstance(scale, AbsMax):
        c.scale = abi.SCALE_ABSMAX
    elif isinstance(scale, AbsMean):
        c.scale = abi.SCALE_ABSMEAN
    elif scale in (GaussianMSE(), Learned()):
        c.scale, c.multiplier = abi.SCALE_GAUSSIAN, grid.clip_multiplier
    else:
        raise ConfigError(f"native engine: the step of {scale} must be given")
    c.group = granularity.size if isinstance(granularity, PerGroup) else 0
    limits = quantizer.estimator.range(grid)
    if limits is None:
        assert isinstance(quantizer.estimator, Trust)
        c.mask, c.mask_high = abi.MASK_DISTANCE, quantizer.estimator.threshold(grid)
    else:
        c.mask, c.mask_low, c.mask_high = abi.MASK_RANGE, *limits
    return _Quantizer(c, byref(c), c.group, passes_everything(quantizer.estimator, grid), form is not None, keep)


def _prologue(prologue: Prologue | None, x: Tensor) -> tuple[abi.CPrologue | None, object]:
    """The structure, and what must live as long as it is used."""
    if prologue is None:
        return None, None
    if isinstance(prologue, RMSNorm):
        weight = prologue.weight.to(torch.float32).contiguous()
        matrix("the weight of RMSNorm", weight, (torch.float32,), (x.shape[1],))
        c = abi.CPrologue(kind=abi.PROLOGUE_RMSNORM, epsilon=prologue.eps, weight=weight.data_ptr())
        return c, weight
    up = rows_contiguous(prologue.up)
    matrix("the other factor of SwiGLU", up, (x.dtype,), tuple(x.shape))
    return abi.CPrologue(kind=abi.PROLOGUE_SWIGLU, up=up.data_ptr(), up_stride=up.stride(0)), up


def quantizer_in(x: Tensor, quantizer: Quantizer, block: int, given: bool) -> _Quantizer:
    """The quantizer as the library takes it, for rows x that fit it."""
    matrix("x", x, FLOATS)
    made = _quantizer(quantizer, block, given)
    width = x.shape[1]
    quantizer.check(width)
    if width == 0 or width % block:
        raise ConfigError(f"native engine: rows of {width} elements do not divide into blocks of {block}")
    return made


def rows_in(
    x: Tensor, groups: int, step: Tensor | None, prologue: Prologue | None
) -> tuple[abi.CRows, Tensor | None, object]:
    """Rows as the library takes them, without results; the given step; and what must live as long as they are used."""
    x = rows_contiguous(x)
    tokens, width = x.shape
    c = abi.CRows(x.data_ptr(), x.stride(0), DTYPES[x.dtype], torch.get_num_threads(), tokens, width)
    before, kept_alive = _prologue(prologue, x)
    if before is not None:
        c.prologue = ctypes.addressof(before)
    source = None
    if step is not None:
        matrix("the step", step, (torch.float32,), (None, groups))
        if step.shape[0] not in (1, tokens):
            raise ConfigError(f"native engine: the step has {step.shape[0]} rows, x has {tokens}")
        source = step.contiguous()
        c.given_step, c.given_stride = source.data_ptr(), 0 if source.shape[0] == 1 else groups
    return c, step, (x, before, kept_alive, source)


def quantize_rows(
    x: Tensor,
    quantizer: Quantizer,
    block: int,
    want: frozenset[str],
    step: Tensor | None = None,
    prologue: Prologue | None = None,
) -> QuantizedRows:
    """x (T, K) of float32, bfloat16 or float16, behind the prologue, rotated, scaled, rounded and masked.

    want: of "factors", "packed", "mask", "sums"; the step always comes. block 1: no rotation. step: float32 Δ, (T, 1),
    (T, G) or one row of either for all, in place of the scale rule's. An empty mask: every element passes.
    """
    made = quantizer_in(x, quantizer, block, step is not None)
    tokens, width = x.shape
    groups = width // made.groups_of if made.groups_of else 1
    if not made.has_integers and {"factors", "sums"} & want:
        raise ConfigError("native engine: this codebook has no integers; ask for packed codes")
    x = rows_contiguous(x)
    c, delta, kept_alive = rows_in(x, groups, step, prologue)
    if delta is None:
        delta = torch.empty(tokens, groups, dtype=torch.float32)
        c.step = delta.data_ptr()
    factors = packed = mask = sums = None
    if "factors" in want:
        factors = torch.empty(tokens, width, dtype=torch.int8)
        c.factors = factors.data_ptr()
    if "packed" in want:
        packed = torch.empty(tokens, packed_width(width, quantizer.bits), dtype=torch.uint8)
        c.packed = packed.data_ptr()
    if "mask" in want:
        mask = torch.empty(0 if made.passes else (tokens, packed_width(width, 1)), dtype=torch.uint8)
        if not made.passes:
            c.mask = mask.data_ptr()
    if "sums" in want:
        sums = torch.empty(tokens, groups, dtype=torch.int32)
        c.sums = sums.data_ptr()
    code = library().bq_quantize_rows(made.reference, byref(c))
    del kept_alive
    if code:
        done(code, "quantizing rows")
    return QuantizedRows(factors, packed, delta, mask, sums)


def rotate(x: Tensor, block: int, prologue: Prologue | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """xH (T, K) behind the prologue, computed in float32."""
    matrix("x", x, FLOATS)
    x = rows_contiguous(x)
    tokens, width = x.shape
    out = torch.empty(tokens, width, dtype=dtype)
    before, kept_alive = _prologue(prologue, x)
    code = library().bq_rotate_rows(
        x.data_ptr(),
        x.stride(0),
        DTYPES[x.dtype],
        tokens,
        width,
        block,
        None if before is None else byref(before),
        out.data_ptr(),
        DTYPES[dtype],
        torch.get_num_threads(),
    )
    del kept_alive
    done(code, f"rotating rows of {width} in blocks of {block}")
    return out


def mask_rotate(gradient: Tensor, mask: Tensor | None, block: int, dtype: torch.dtype | None = None) -> Tensor:
    """(G ⊙ M)Hᵀ of G (T, K), in `dtype` (G's own by default); mask uint8 (T, ⌈K/8⌉), or none or empty: all pass."""
    matrix("the gradient", gradient, FLOATS)
    gradient = rows_contiguous(gradient)
    tokens, width = gradient.shape
    if mask is not None and mask.numel():
        matrix("the mask", mask, (torch.uint8,), (tokens, packed_width(width, 1)))
        mask = mask.contiguous()
    else:
        mask = None
    dtype = gradient.dtype if dtype is None else dtype
    out = torch.empty(tokens, width, dtype=dtype)
    code = library().bq_mask_rotate(
        gradient.data_ptr(),
        gradient.stride(0),
        DTYPES[gradient.dtype],
        None if mask is None else mask.data_ptr(),
        tokens,
        width,
        block,
        out.data_ptr(),
        DTYPES[dtype],
        torch.get_num_threads(),
    )
    done(code, f"rotating gradients of {width} in blocks of {block}")
    return out


@lru_cache(maxsize=64)
def _levels(grid: Grid) -> ctypes.Array[ctypes.c_float]:
    return _floats([*grid.levels, *[0.0] * (2**grid.bits - len(grid.levels))])


def dequantize_rows(packed: Tensor, step: Tensor, grid: Grid, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values (T, K) in rotated space from packed codes uint8 (T, ⌈K·bits/8⌉) and steps (T, 1), (T, G) or one row."""
    tokens = packed.shape[0]
    matrix("packed", packed, (torch.uint8,), (tokens, packed_width(width, grid.bits)))
    matrix("the step", step, (torch.float32,), (None, None))
    step = step.expand(tokens, -1).contiguous()
    packed = packed.contiguous()
    out = torch.empty(tokens, width, dtype=dtype)
    code = library().bq_dequantize_rows(
        packed.data_ptr(),
        grid.bits,
        _levels(grid),
        step.data_ptr(),
        step.shape[1],
        tokens,
        width,
        out.data_ptr(),
        DTYPES[dtype],
        torch.get_num_threads(),
    )
    done(code, "dequantizing rows")
    return out

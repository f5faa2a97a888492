"""Rows to integers in one pass: [RMSNorm or SiLU·mul,] rotation, scale, rounding, trust mask, packing.

Each element of x is loaded once and stays in registers (tiles.py); what a layer keeps of it are b bits, one mask bit
and a step a row. The floor for (T, K) bfloat16 to 4 bits and mask is T·K·(2 + 0.5 + 0.125) bytes: 2.625 a value, so at
3.3 TB/s each of an H100's lanes has about 22 instructions to spend on a value. The machine code for sm_90 takes 18.7 at
4 bits and 13.0 at 1 bit (K = 8192), 256 operations on tensor cores aside, which are a third of their rate for 16-bit
inputs and three times that after a prologue, whose float32 result is rotated in three parts (hadamard.py). They go to:
one for σ, taken after the rotation, where values are float32 already (METHOD allows it before too, for row scales; it
would cost the conversion); three for x/Δ, where 1/√block costs none, since it is multiplied into σ and Δ; five for the
code; one for the mask; the rest to join codes of neighbouring threads into 32-bit words, so that packed bytes leave in
whole words. The next tile is copied meanwhile, 16 bytes at a time. No x_h, x_q or float mask is written or read.

Legend: T rows, K elements of a row, G scale groups of a row. Instructions are counted, times not measured on a GPU.
"""

from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.estimators import Trust, passes_everything
from bitquest.numerics.grids import FP4, CodebookGrid
from bitquest.numerics.integers import integer_form
from bitquest.numerics.packing import packed_width
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.scaling import AbsMax, AbsMean, GaussianMSE, Learned, PerGroup, PerTensor
from bitquest.ops.rows import PARTS, Prologue, QuantizedRows, RMSNorm
from bitquest.ops.triton.grids import bias
from bitquest.ops.triton.quantize_kernels import quantize_rows_kernel, rotate_rows_kernel
from bitquest.ops.triton.tiles import FLOATS, as_rows, check_rotation, check_width, in_words, parts, tiles

MAX_LEVELS = 16  # of a codebook: one comparison for each threshold


class _Fused(NamedTuple):
    """A prologue as the kernels take it."""

    kind: str
    eps: float
    other: Tensor | None
    stride: int


def fused(prologue: Prologue | None, shape: torch.Size) -> _Fused:
    """The prologue's operand, checked. Raises ConfigError where it does not fit rows of this shape."""
    if prologue is None:
        return _Fused("", 0.0, None, 0)
    if isinstance(prologue, RMSNorm):
        weight = prologue.weight
        if weight.shape != shape[1:] or weight.dtype not in FLOATS:
            raise ConfigError(f"the norm's weight is {weight.dtype} {tuple(weight.shape)}; rows are {shape[1]} wide")
        return _Fused("rms_norm", float(prologue.eps), weight.contiguous(), 0)
    up = as_rows(prologue.up, "the up projection", FLOATS)
    if up.shape != shape:
        raise ConfigError(f"gate and up must have one shape: {tuple(shape)} and {tuple(up.shape)}")
    return _Fused("swiglu", 0.0, up, up.stride(0))


# A learned step starts at the Gaussian fit; later it is given, as other rules' steps must be.
_RULES = {AbsMax(): "absmax", AbsMean(): "absmean", GaussianMSE(): "gaussian_mse", Learned(): "gaussian_mse"}
_GROUP_SIZES = (32, 64, 128)


def refuses_rule(quantizer: Quantizer, given: bool) -> str | None:
    """Why the fused kernels do not compute such scales (or take such groups), None if they do."""
    if isinstance(quantizer.granularity, PerGroup) and quantizer.granularity.size not in _GROUP_SIZES:
        return f"scale groups have 32, 64 or 128 elements, not {quantizer.granularity.size}"
    if isinstance(quantizer.scale, Learned) and quantizer.scale.offset:
        return "a learned offset is not subtracted in the fused kernels"
    if quantizer.scale not in _RULES and not given:
        return f"{type(quantizer.scale).__name__} scales are not computed in the fused kernels"
    return None


@lru_cache(maxsize=256)
def _constants(quantizer: Quantizer) -> dict[str, Any]:
    """What the kernel compiles in of a quantizer. Raises ConfigError for what it cannot do."""
    grid, granularity = quantizer.grid, quantizer.granularity
    if quantizer.is_sparse:
        raise ConfigError("the fused kernels quantize dense rows; N:M sparsity takes the torch backend")
    middles: tuple[float, ...] = ()
    levels: tuple[float, ...] = ()
    table: tuple[int, ...] = ()
    form = integer_form(grid)
    kind = "uniform"
    if isinstance(grid, CodebookGrid):
        kind = "fp4" if grid.levels == FP4.levels else "codebook"
        if len(grid.levels) > MAX_LEVELS:
            raise ConfigError(f"the fused kernels take codebooks of up to {MAX_LEVELS} levels, not {len(grid.levels)}")
        levels = grid.levels
        middles = tuple((a + b) / 2 for a, b in pairwise(levels))
        table = form.table if form is not None and form.table is not None else ()
    limits: tuple[float, ...] | None = quantizer.estimator.range(grid)
    if limits is None:
        assert isinstance(quantizer.estimator, Trust), "the other estimators need no distance"
        limits = (quantizer.estimator.threshold(grid),)
    rule = _RULES.get(quantizer.scale, "gaussian_mse")  # not read where the step is given
    return {
        "GROUP": granularity.size if isinstance(granularity, PerGroup) else 0,
        "RULE": rule,
        "MULTIPLIER": float(grid.clip_multiplier) if rule == "gaussian_mse" else 1.0,
        "MAX_LEVEL": float(grid.max_level),
        "KIND": kind,
        "BITS": grid.bits,
        "BIAS": bias(kind, grid.bits),
        "MIDDLES": middles,
        "TABLE": table,
        "LEVELS": levels,
        "LIMITS": limits,
    }


def _given_step(step: Tensor, quantizer: Quantizer, tokens: int, width: int) -> tuple[Tensor, int, int]:
    """A given step with its strides over rows and groups."""
    if step.dtype != torch.float32 or step.dim() != 2:
        raise ConfigError(
            f"a given step must be float32 (T, 1), (T, G) or (1, 1), not {step.dtype} {tuple(step.shape)}"
        )
    groups = width // quantizer.granularity.size if isinstance(quantizer.granularity, PerGroup) else 1
    if step.shape not in ((tokens, groups), (1, 1)):
        raise ConfigError(f"a given step for {tokens} rows in {groups} groups has shape {tuple(step.shape)}")
    return step, 0 if step.shape[0] == 1 else step.stride(0), 0 if step.shape[1] == 1 else step.stride(1)


def quantize_rows(
    x: Tensor,
    quantizer: Quantizer,
    block: int,
    *,
    want: frozenset[str],
    prologue: Prologue | None = None,
    step: Tensor | None = None,
) -> QuantizedRows:
    """The wanted parts ("factors", "packed", "mask", "sums") of x (T, K), rotated in blocks; the step always.

    x: float32, bfloat16 or float16, rows of any stride. block: 1 (no rotation) to 128. step: float32 (T, 1), (T, G) or
    (1, 1) instead of the scale rule's, handed back as it is. prologue: read x through RMSNorm or SwiGLU in float32.
    A mask that every element passes is empty. Raises ConfigError for N:M sparsity, a step for a whole tensor that is
    not given, codebooks of more than 16 levels, factors of a grid without integers, rotations in blocks above 128 and
    rows above 32768 (16384 in float32 or behind a prologue, where a GPU has less shared memory than Hopper).
    """
    if not want <= set(PARTS):
        raise ConfigError(f"rows have the parts {', '.join(PARTS)}, not {', '.join(sorted(want - set(PARTS)))}")
    x = as_rows(x, "x", FLOATS)
    tokens, width = x.shape
    constants = _constants(quantizer)
    check_width(width)
    check_rotation(width, block)
    quantizer.check(width)
    reason = refuses_rule(quantizer, step is not None)
    if reason is not None:
        raise ConfigError(f"fused kernels: {reason}")
    if isinstance(quantizer.granularity, PerTensor) and step is None:
        raise ConfigError("a step for a whole tensor takes two passes: give the fused kernel a step, or one per row")
    if {"factors", "sums"} & want and integer_form(quantizer.grid) is None:
        raise ConfigError(f"the levels of {quantizer.grid} are no integers times a unit: there are no factors")
    other = fused(prologue, x.shape)
    given, given_stride, given_step_stride = (
        (None, 0, 0) if step is None else _given_step(step, quantizer, tokens, width)
    )
    groups = width // constants["GROUP"] if constants["GROUP"] else 1

    def new(part: str, columns: int, dtype: torch.dtype) -> Tensor | None:
        return torch.empty(tokens, columns, dtype=dtype, device=x.device) if part in want else None

    factors = new("factors", width, torch.int8)
    packed = new("packed", packed_width(width, quantizer.bits), torch.uint8)
    sums = new("sums", groups, torch.int32)
    everything = passes_everything(quantizer.estimator, quantizer.grid)
    mask = new("mask", 0 if everything else packed_width(width, 1), torch.uint8)
    made = torch.empty(tokens, groups, dtype=torch.float32, device=x.device) if step is None else step
    if everything and mask is not None:
        mask = mask.reshape(-1)
    if tokens:
        cut = tiles(tokens, width, x.device, parts(x, block, prologue is not None))
        quantize_rows_kernel[(cut.programs,)](
            x, x.stride(0), other.other, other.stride, given, given_stride, given_step_stride,
            factors, in_words(packed, width, quantizer.bits), made if step is None else None,
            None if everything else in_words(mask, width, 1), sums, tokens,
            K=width, BLOCK=block, PROLOGUE=other.kind, EPS=other.eps,
            L=cut.length, BLOCKS=cut.blocks, ROWS=cut.rows, num_warps=cut.warps, num_stages=cut.stages, **constants,
        )  # fmt: skip
    return QuantizedRows(factors, packed, made, mask, sums)


def rotate_rows(x: Tensor, block: int, *, prologue: Prologue | None = None, dtype: torch.dtype) -> Tensor:
    """x (T, K), behind the prologue, rotated in float32 and rounded to `dtype`: what a weight-only layer reads.

    Raises ConfigError as `quantize_rows` does.
    """
    x = as_rows(x, "x", FLOATS)
    tokens, width = x.shape
    check_width(width)
    check_rotation(width, block)
    if dtype not in FLOATS:
        raise ConfigError(f"rows are rotated to float32, bfloat16 or float16, not {dtype}")
    other = fused(prologue, x.shape)
    y = torch.empty(tokens, width, dtype=dtype, device=x.device)
    if tokens:
        cut = tiles(tokens, width, x.device, parts(x, block, prologue is not None))
        rotate_rows_kernel[(cut.programs,)](
            x, x.stride(0), other.other, other.stride, y, tokens,
            K=width, BLOCK=block, SCALE=block**-0.5, PROLOGUE=other.kind, EPS=other.eps,
            L=cut.length, BLOCKS=cut.blocks, ROWS=cut.rows, num_warps=cut.warps, num_stages=cut.stages,
        )  # fmt: skip
    return y

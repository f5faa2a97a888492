"""The s8 product of integer factors with its scales in the epilogue: y = x Wᵀ from int8 (T, K) and (N, K).

T tokens, K in_features, N out_features, G scale groups of a row. The definition is numerics/integers.py; levels are
unit·(factor·a + offset), and the int32 accumulators are exact for K < 2^17. One kernel runs one dot over all of K
(row scales), another one dot per group, summed in float32 in order of the groups. No result depends on the tiling.

Both operands lie with K contiguous, which is what the s8 tensor-core instructions want. On sm_90 the tiles come by TMA
and the dot compiles to wgmma (IGMMA.64x128x32), on sm_80 and sm_89 to cp.async and mma.sync (IMMA.16832). Triton 3.6.0
has two limits on sm_90: it issues no wider s8 wgmma than n = 128, and it lets a wgmma run on into the next iteration
only where the accumulator is float32, so that every iteration here waits for its own. Two programs per SM (128×128
tiles, 4 warps) or a deeper block_k hide some of the wait; which is best is left to tuning. int8_hopper.py is the same
kernel without the wait.

The floor for 8192 tokens at an H200's 1979 Top/s (s8, dense) and 4.8 TB/s, bf16 output; no time here is measured:

    N × K          operations   bytes    at the s8 rate   at the memory's   bf16 product at its rate
    4096 × 4096     275 G       117 MB   139 µs           25 µs             278 µs
    11008 × 4096    739 G       259 MB   373 µs           54 µs             747 µs
    4096 × 11008    739 G       202 MB   373 µs           42 µs             747 µs
"""

import os
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from bitquest.errors import ConfigError
from bitquest.numerics.integers import IntegerForm
from bitquest.ops.triton.int8_kernels import groups_kernel, rows_kernel
from bitquest.ops.triton.tuning import Config, best_config, bucket

_EXACT_WIDTH = 2**17  # (−2^7)·(−2^7)·2^17 is the first sum that an int32 does not hold
_ALIGNMENT = 16  # bytes: the width of one asynchronous copy, and what TMA asks of a row


# --- configurations ------------------------------------------------------------------------------------------------

_Tiles = tuple[tuple[int, int, int, int, int], ...]  # tokens, channels, inner elements, warps, stages

# The first of each is the default. sm_86 and sm_89 have 99 KiB of shared memory, which the first five fit.
_AMPERE: _Tiles = (
    (128, 128, 64, 4, 4),
    (128, 128, 128, 4, 3),
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (64, 128, 128, 4, 3),
    (128, 256, 128, 8, 3),
    (64, 64, 128, 4, 4),
)
_HOPPER: _Tiles = (
    (128, 256, 128, 8, 4),
    (128, 128, 128, 4, 3),  # two programs per SM: one multiplies while the other waits or stores
    (128, 256, 256, 8, 2),
    (256, 128, 128, 8, 4),
    (128, 256, 128, 8, 3),
    (256, 128, 256, 8, 2),
    (64, 256, 128, 4, 4),
    (128, 128, 128, 8, 4),
    (64, 128, 128, 4, 4),
)
# int8_hopper.py: compiled and disassembled, but never run yet, so that tuning considers it on request alone.
HAND_SCHEDULED = (
    Config(128, 256, 128, 8, 4, descriptors=True, explicit=True),
    Config(256, 128, 128, 8, 4, descriptors=True, explicit=True),
    Config(128, 128, 128, 4, 3, descriptors=True, explicit=True),
)


@lru_cache(maxsize=1024)
def row_candidates(tokens: int, capability: int) -> tuple[Config, ...]:
    """What may suit a product over all of K, the default first. tokens: a bucket. capability: 90 for sm_90."""
    if tokens <= 64:  # few rows: the weights' bytes decide, so narrow stripes for many programs, and deep pipelines
        tiles = ((64, 128, 4), (32, 256, 4), (64, 256, 3), (32, 128, 5), (128, 128, 3))
        return tuple(Config(max(16, tokens), n, k, stages=stages, group=1) for n, k, stages in tiles)
    if capability < 90:
        return tuple(Config(*tile) for tile in _AMPERE)
    return tuple(
        Config(*tile, group, descriptors=True)
        for group in (8, 16)
        for tile in _HOPPER
        if group == 8 or tile[0] * tile[1] == 128 * 256
    )


@lru_cache(maxsize=1024)
def group_candidates(tokens: int, capability: int, size: int) -> tuple[Config, ...]:
    """What may suit a product with one dot per group of `size` elements, the default first."""
    tiles: _Tiles
    if tokens <= 64:
        block = max(16, tokens)
        tiles = ((block, 64, size, 4, 4), (block, 32, size, 4, 5), (block, 128, size, 4, 3))
    else:
        # The dot and the sum both lie in registers: 128×128 spills at 8 bits. A step for each of 128 threads is read
        # once and shared; with 256 threads every thread would read those of all its channels.
        tiles = ((64, 128, size, 4, 4), (64, 128, size, 4, 3), (128, 64, size, 4, 4))
    descriptors = capability >= 90 and tokens > 64
    return tuple(Config(*tile, descriptors=descriptors) for tile in tiles)


# --- launchers -----------------------------------------------------------------------------------------------------


class _Scales(NamedTuple):
    """What the epilogue multiplies and adds; steps float32 (T, GX) and (N, GW), sums int32 (·, G) or None."""

    x_step: Tensor
    w_step: Tensor
    x_sums: Tensor | None
    w_sums: Tensor | None
    bias: Tensor | None
    unit: float
    factor: int
    x_term: int
    w_term: int
    constant: int
    wide: bool


def int8_product(x_a: Tensor, w_a: Tensor, *, config: Config | None = None) -> Tensor:
    """Σ_k x_a[t, k]·w_a[n, k], exact int32 (T, N), from int8 (T, K) and (N, K), K < 2^17.

    config: run with this tiling instead of the tuned one. Raises ConfigError for operands that it cannot take.
    """
    _check_operands(x_a, w_a)
    _check_width(x_a.shape[1])
    out = torch.empty((x_a.shape[0], w_a.shape[0]), dtype=torch.int32, device=x_a.device)
    _launch(x_a, w_a, out, None, 1, config)
    return out


def int8_linear(
    x_a: Tensor,
    x_step: Tensor,
    w_a: Tensor,
    w_step: Tensor,
    x_form: IntegerForm,
    w_form: IntegerForm,
    *,
    x_sums: Tensor | None = None,
    w_sums: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> Tensor:
    """x Wᵀ + bias (T, N) in out_dtype from int8 factors (T, K), (N, K) and their float32 steps.

    x_step: (T, 1) or (T, groups) or (1, 1), w_step alike; the finer grouping subdivides the coarser. Groups have 32, 64
    or 128 elements. x_sums, w_sums: int32 sums of the factors over each group of the finer grouping, (T, G) and (N, G);
    they are read only where the other operand has 8 bits, and computed where they are missing or of another grouping.
    bias: (N,). out_dtype: float32, bfloat16 or float16. config: run with this tiling instead of the tuned one.
    Raises ConfigError for what it cannot do.
    """
    _check_operands(x_a, w_a)
    (tokens, width), channels = x_a.shape, w_a.shape[0]
    if out_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"the s8 product writes float32, bfloat16 or float16, not {out_dtype}")
    if bias is not None and bias.shape != (channels,):
        raise ConfigError(f"the bias must have {channels} elements, not the shape {tuple(bias.shape)}")
    x_step, w_step = _steps(x_step, tokens, "x_step"), _steps(w_step, channels, "w_step")
    groups = _groups(x_step.shape[1], w_step.shape[1], width)
    for form in (x_form, w_form):
        if form.factor not in (1, 2) or form.offset not in (0, 1) or form.factor != form.offset + 1:
            raise ConfigError(f"the s8 product knows factor 1 with offset 0 and factor 2 with offset 1, not {form}")
    size = width // groups
    scales = _Scales(
        x_step,
        w_step,
        _sums(x_sums, x_a, groups) if w_form.offset else None,
        _sums(w_sums, w_a, groups) if x_form.offset else None,
        bias,
        unit=x_form.unit * w_form.unit,
        factor=x_form.factor * w_form.factor,
        x_term=x_form.factor * w_form.offset,
        w_term=x_form.offset * w_form.factor,
        constant=size * x_form.offset * w_form.offset,
        wide=size * x_form.largest * w_form.largest >= 2**31,
    )
    out = torch.empty((tokens, channels), dtype=out_dtype, device=x_a.device)
    _launch(x_a, w_a, out, scales, groups, config)
    return out


def _check_operands(x_a: Tensor, w_a: Tensor) -> None:
    if x_a.dtype != torch.int8 or w_a.dtype != torch.int8 or x_a.dim() != 2 or w_a.dim() != 2:
        raise ConfigError("the s8 product takes two-dimensional int8 factors")
    if x_a.shape[1] != w_a.shape[1] or x_a.shape[1] == 0:
        raise ConfigError(f"rows of {x_a.shape[1]} and {w_a.shape[1]} factors do not multiply")
    if x_a.device != w_a.device:
        raise ConfigError(f"the operands lie on {x_a.device} and {w_a.device}; move them to one device")
    if x_a.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ConfigError(f"Triton kernels need a CUDA device, not {x_a.device}")


def _check_width(width: int) -> None:
    if width >= _EXACT_WIDTH:
        raise ConfigError(f"int32 sums of int8 products are exact below {_EXACT_WIDTH} elements, not for {width}")


def _steps(step: Tensor, rows: int, name: str) -> Tensor:
    if step.dtype != torch.float32 or step.dim() != 2 or (step.shape[0] != rows and step.shape != (1, 1)):
        raise ConfigError(
            f"{name} must be float32 with a row for each of {rows}, or (1, 1), not {step.dtype} {tuple(step.shape)}"
        )
    return step.expand(rows, -1).contiguous()


def _groups(x_groups: int, w_groups: int, width: int) -> int:
    """How many integer dots a row takes. Raises ConfigError where the groups do not fit each other or the kernel."""
    groups = max(x_groups, w_groups)
    if groups == 1:
        _check_width(width)
        return 1
    if width % groups or groups % x_groups or groups % w_groups:
        raise ConfigError(f"{x_groups} and {w_groups} scale groups do not subdivide each other in rows of {width}")
    if width // groups not in (32, 64, 128):
        raise ConfigError(f"the s8 product takes scale groups of 32, 64 or 128 elements, not {width // groups}")
    return groups


def _sums(sums: Tensor | None, a: Tensor, groups: int) -> Tensor:
    """Σ a over each of the groups, int32 (rows, groups): the given one where it is of this grouping."""
    if sums is not None and sums.shape == (a.shape[0], groups) and sums.dtype == torch.int32:
        return sums.contiguous()
    return a.unflatten(1, (groups, -1)).sum(2, dtype=torch.int32)


def _aligned(a: Tensor) -> Tensor:
    """Rows as asynchronous copies and TMA read them: at multiples of 16 bytes, K padded with zeros, which add nothing.

    Factors of a model come so already; others cost a copy, which is cheaper than reading them byte by byte.
    """
    if a.shape[1] % _ALIGNMENT:
        return F.pad(a, (0, -a.shape[1] % _ALIGNMENT))
    fits = a.stride(1) == 1 and (a.shape[0] <= 1 or a.stride(0) % _ALIGNMENT == 0) and a.data_ptr() % _ALIGNMENT == 0
    return a if fits else a.clone(memory_format=torch.contiguous_format)


def _launch(x_a: Tensor, w_a: Tensor, out: Tensor, scales: _Scales | None, groups: int, config: Config | None) -> None:
    """Fill `out`, with the tiling given or the one that tuning chooses."""
    if out.numel() == 0:
        return
    x, w = _aligned(x_a), _aligned(w_a)
    if x.device.type != "cuda":  # the interpreter: small tiles, so that small shapes have several
        config = config or Config(32, 32, x.shape[1] // groups if groups > 1 else 64)
        _run(config, x, w, out, scales, groups)
        return
    with torch.cuda.device(x.device):  # Triton launches on the current device
        config = config or _tuned(x, w, out, scales, groups)
        _run(config, x, w, out, scales, groups)


def _tuned(x: Tensor, w: Tensor, out: Tensor, scales: _Scales | None, groups: int) -> Config:
    """The tiling for this shape on the current GPU; it may be measured now, into `out`."""
    tokens, channels, width = bucket(x.shape[0]), w.shape[0], x.shape[1]
    major, minor = torch.cuda.get_device_capability()
    if groups > 1:
        candidates = group_candidates(tokens, 10 * major + minor, width // groups)
    else:
        candidates = row_candidates(tokens, 10 * major + minor)
        if major == 9 and tokens > 64 and os.environ.get("BITQUEST_GLUON") == "1":
            candidates += HAND_SCHEDULED
    terms = (0, 0) if scales is None else (scales.x_term, scales.w_term)
    key = (tokens, channels, width, groups, str(out.dtype), *terms)
    return best_config("int8_linear", key, candidates, lambda config: _run(config, x, w, out, scales, groups))


def _run(config: Config, x: Tensor, w: Tensor, out: Tensor, scales: _Scales | None, groups: int) -> None:
    """Launch the kernel once. x, w: as `_aligned` leaves them."""
    tokens, channels, width = x.shape[0], w.shape[0], x.shape[1]
    blocks = config.block_t, config.block_n, config.block_k
    store_descriptor = config.descriptors and channels * out.element_size() % _ALIGNMENT == 0
    arguments: dict[str, Any] = {
        "x": _operand(x, blocks[0], blocks[2], config.descriptors, config.explicit),
        "w": _operand(w, blocks[1], blocks[2], config.descriptors, config.explicit),
        "out": _operand(out, blocks[0], blocks[1], store_descriptor, config.explicit),
        "T": tokens,
        "N": channels,
        "K": width,
        "STORE_DESCRIPTOR": store_descriptor,
        "BLOCK_T": blocks[0],
        "BLOCK_N": blocks[1],
        "BLOCK_K": blocks[2],
        "GROUP": config.group,
    }
    arguments |= _epilogue(scales)
    grid = (triton.cdiv(tokens, blocks[0]) * triton.cdiv(channels, blocks[1]),)
    if groups > 1:
        assert scales is not None and width // groups == blocks[2] and not config.explicit
        arguments |= {"X_EVERY": groups // scales.x_step.shape[1], "W_EVERY": groups // scales.w_step.shape[1]}
    else:
        arguments |= {"WIDE": scales is not None and scales.wide, "SCALED": scales is not None}
    if config.explicit:
        from bitquest.ops.triton import int8_hopper  # experimental in Triton, so not imported without need

        int8_hopper.rows_kernel[grid](**arguments, STAGES=config.stages, num_warps=config.warps)
        return
    kernel: Any = rows_kernel if groups == 1 else groups_kernel
    arguments |= {"x_stride": _row_stride(x), "w_stride": _row_stride(w), "DESCRIPTORS": config.descriptors}
    kernel[grid](**arguments, num_warps=config.warps, num_stages=config.stages)


def _epilogue(scales: _Scales | None) -> dict[str, Any]:
    """The kernels' arguments that come from the scales."""
    if scales is None:
        empty = dict.fromkeys(("x_step", "w_step", "x_sums", "w_sums", "bias"))
        return empty | {"constant": 0, "UNIT": 1.0, "FACTOR": 1, "X_TERM": 0, "W_TERM": 0, "HAS_BIAS": False}
    return {
        "x_step": scales.x_step,
        "w_step": scales.w_step,
        "x_sums": scales.x_sums,
        "w_sums": scales.w_sums,
        "bias": None if scales.bias is None else scales.bias.contiguous(),
        "constant": scales.constant,
        "UNIT": scales.unit,
        "FACTOR": scales.factor,
        "X_TERM": scales.x_term,
        "W_TERM": scales.w_term,
        "HAS_BIAS": scales.bias is not None,
    }


def _row_stride(a: Tensor) -> int:
    return a.stride(0) if a.shape[0] > 1 else a.shape[1]  # the stride of a single row may be anything


def _operand(a: Tensor, rows: int, columns: int, descriptor: bool, explicit: bool) -> Any:
    """A tensor as the kernel takes it: itself, or a TMA descriptor that reads or writes blocks of rows and columns."""
    if not descriptor:
        return a
    shape, strides, block = list(a.shape), [_row_stride(a), 1], [rows, columns]
    if explicit:
        from bitquest.ops.triton import int8_hopper

        return int8_hopper.descriptor(a, shape, strides, block)
    return TensorDescriptor(a, shape, strides, block)

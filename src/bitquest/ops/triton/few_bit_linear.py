"""Linear layers whose weights stay packed at 1, 2, 4 or 8 bits, for decoding: 1 to about 32 tokens (more work too).

T tokens, K in_features, N out_features, G scale groups of a row. The definition is numerics/integers.py; each byte of
weights is read once for every 1 to 3 tokens (`few_tokens`) or every BT tokens (`small_batch`).

Everything is an exact integer product. Float activations are cut into three signed 8-bit digits first, relative to a
power of two above the largest of their row (few_bit_arrange.py): a float32 sum has no finer resolution. So a result
depends neither on the split of K nor on the order of anything, and is the same every time; with row scales the integer
is rounded to float32 once.

Limits of one token, counted for an H200 (132 SMs, 1.755 GHz, 4.3 TB/s as copies reach: 18.6 bytes a cycle and SM);
8192 × 28672 weights, floor = bytes / 4.3 TB/s. No time here is measured.

    weights           bf16     W8      W4      W2      W1
    bytes             470 MB   235 MB  117 MB  59 MB   29 MB
    floor             109 µs   55 µs   27 µs   14 µs   6.8 µs
    weights / cycle   9.3      18.6    37      74      149    needed of each SM to keep up with the memory

Four weights take one LOP3, at most one shift (two of three of which ptxas makes multiplications) and one dp4a for each
column; logic and dp4a issue 64 lanes a cycle each, in different pipes if what is known of Ampere holds. That allows
about 170 weights a cycle for one int8 column and 85 for the three digits: predicted W1A8 9 µs, W2A8 15 µs, and
weight-only W4 28 µs, W2 15 µs, W1 13 µs, each with 2 to 4 µs before it for rounding and arranging the activations.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.grids import Grid, UniformGrid
from bitquest.numerics.integers import IntegerForm
from bitquest.numerics.packing import packed_width
from bitquest.ops.triton.few_bit_arrange import arrange, begins_on_words, digits_of, run_length
from bitquest.ops.triton.few_bit_batch import small_batch
from bitquest.ops.triton.few_bit_forms import WeightForm, weight_form
from bitquest.ops.triton.few_bit_kernels import add_parts, few_tokens, weight_sums
from bitquest.ops.triton.tuning import Config, best_config, bucket

_EXACT_WIDTH = 2**17  # (−2^7)·(−2^7)·2^17 is the first sum that an int32 does not hold
_COLUMNS = 3  # of activations in `few_tokens`: as many as 128 registers hold beside four rows of weights
_MOST_TOKENS = 65535  # the second axis of a grid
_GROUP_SIZES = (32, 64, 128)
_SHARED_BYTES = 96 * 1024  # of sm_89; on sm_90 two programs of an SM share twice as much
_PROGRAMS = 264  # two for each of the 132 SMs of an H100 or H200


def weight_only_linear(
    x_h: Tensor, packed: Tensor, w_step: Tensor, grid: Grid, *, bias: Tensor | None = None, out_dtype: torch.dtype
) -> Tensor:
    """x_h Wᵀ (T, N) for float x_h (T, K) in rotated space and packed weights (N, ⌈K·bits/8⌉) of `grid`.

    x_h: float32, bfloat16 or float16. w_step: float32 (N, 1), (N, G) or (1, 1). bias: (N,), any float type.
    A row of x_h with an infinity or a NaN gives a row of NaN. Raises ConfigError for what the kernels cannot do.
    """
    if x_h.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"activations must be float32, bfloat16 or float16, not {x_h.dtype}")
    shape = _shape(x_h, packed, grid, w_step.shape[-1], 1, out_dtype)
    if not shape.tokens or not shape.channels:
        return torch.empty(shape.tokens, shape.channels, dtype=out_dtype, device=x_h.device)
    weights = weight_form(grid)
    made = digits_of(x_h.contiguous(), weights.bits, shape.groups if weights.shift else 0)
    form = (weights.scale, weights.shift, weights.down, 1, 0, 1, 0)
    return _launch(shape, weights, form, made.values, made.digits, made.step, made.sums, packed, w_step, None,
                   weights.form.unit, bias, out_dtype)  # fmt: skip


def a8_linear(
    x_a: Tensor,
    x_step: Tensor,
    x_sums: Tensor | None,
    packed: Tensor,
    w_step: Tensor,
    x_form: IntegerForm,
    grid: Grid,
    *,
    w_sums: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype,
) -> Tensor:
    """x Wᵀ (T, N) from int8 factors x_a (T, K) of any grid with integers and packed weights (N, ⌈K·bits/8⌉) of `grid`.

    x_step: float32 (T, 1) or (T, groups); w_step: float32 (N, 1), (N, groups) or (1, 1), the finer grouping a
    subdivision of the coarser; G is the finer. bias: (N,), any float type.
    x_sums: int32 (T, G), Σ x_a of each group, used where the weights have 8 bits or are ternary; another shape or None:
    summed here. w_sums: int32 (N, G), Σ of the weights' int8 factors, used where the activations have 8 bits; None:
    summed here, with one more pass over the weights, so keep `packed_sums` of a layer.
    Raises ConfigError for what the kernels cannot do.
    """
    if x_a.dtype != torch.int8:
        raise ConfigError(f"activation factors must be int8, not {x_a.dtype}")
    shape = _shape(x_a, packed, grid, w_step.shape[-1], x_step.shape[-1], out_dtype)
    if not shape.tokens or not shape.channels:
        return torch.empty(shape.tokens, shape.channels, dtype=out_dtype, device=x_a.device)
    weights = weight_form(grid)
    if not weights.shift:
        x_sums = None
    elif x_sums is None or x_sums.shape != (shape.tokens, shape.groups):
        x_sums = x_a.unflatten(-1, (shape.groups, -1)).sum(-1, dtype=torch.int32)
    if x_form.offset and (w_sums is None or w_sums.shape != (shape.channels, shape.groups)):
        w_sums = packed_sums(packed, shape.width, grid, shape.groups)
    form = (weights.scale, weights.shift, weights.down, x_form.factor, x_form.offset,
            weights.form.factor, weights.form.offset)  # fmt: skip
    return _launch(shape, weights, form, arrange(x_a.contiguous(), weights.bits), 1, x_step, x_sums, packed, w_step,
                   w_sums if x_form.offset else None, x_form.unit * weights.form.unit, bias, out_dtype)  # fmt: skip


def packed_sums(packed: Tensor, width: int, grid: Grid, groups: int = 1) -> Tensor:
    """int32 (N, groups): Σ of the int8 factors of packed weights (N, ⌈width·bits/8⌉) over each group of a row."""
    weights = weight_form(grid)
    _check_groups(width, groups)
    _check_packed(packed, width, weights.bits)
    channels = packed.shape[0]
    sums = torch.empty(channels, groups, dtype=torch.int32, device=packed.device)
    if not channels:
        return sums
    packed = packed.contiguous()
    aligned = _aligned(packed)
    factors = weights.form.factor == 1  # of 8 bits the factor is c itself
    weight_sums[(triton.cdiv(channels, 32),)](
        packed.view(torch.int32) if aligned else packed, sums, channels, K=width, WIDTH=packed.shape[1], GROUPS=groups,
        BITS=weights.bits, FIELDS=weights.fields, VALUES=weights.values, SCALE=weights.scale if factors else 1,
        SHIFT=weights.shift if factors else 0, DOWN=weights.down, BN=32, BW=128, ALIGNED=aligned, ASM=_asm(),
        num_warps=8,
    )  # fmt: skip
    return sums


def b1_vector(
    x_bits: Tensor,
    x_step: Tensor,
    w_bits: Tensor,
    w_step: Tensor,
    K: int,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype,
) -> Tensor:
    """x Wᵀ (T, N) of 1-bit activations (T, ⌈K/8⌉) and weights (N, ⌈K/8⌉), packed uint8: Σ = K − 2·popcount(x xor w).

    x_step, w_step: float32 (T, 1) or (T, groups), and (N, 1), (N, groups) or (1, 1), for levels ±½Δ. Spare bits are
    zero. bias: (N,), any float type. For few tokens: the weights are read again for every four of them.
    """
    _check_packed(x_bits, K, 1)
    shape = _shape(x_bits, w_bits, UniformGrid(1), w_step.shape[-1], x_step.shape[-1], out_dtype, width=K)
    if not shape.tokens or not shape.channels:
        return torch.empty(shape.tokens, shape.channels, dtype=out_dtype, device=x_bits.device)
    x_bits = x_bits.contiguous()
    if x_bits.shape[1] != run_length(K, 1) or not begins_on_words(x_bits):
        x_bits = torch.nn.functional.pad(x_bits, (0, run_length(K, 1) - x_bits.shape[1]))  # a copy in any case
    form = (-2, 1, 0, 1, 0, 1, 0)
    return _launch(shape, weight_form(UniformGrid(1)), form, x_bits, 1, x_step, None, w_bits, w_step, None,
                   0.25, bias, out_dtype, popcount=True)  # fmt: skip


class _Shape(NamedTuple):
    tokens: int
    channels: int
    width: int
    groups: int
    x_ratio: int
    w_ratio: int


def _shape(
    x: Tensor, packed: Tensor, grid: Grid, w_groups: int, x_groups: int, out_dtype: torch.dtype, width: int = 0
) -> _Shape:
    """What there is to do, or ConfigError."""
    bits = weight_form(grid).bits
    width = width or x.shape[1]
    groups = max(w_groups, x_groups)
    if x.dim() != 2 or packed.dim() != 2:
        raise ConfigError(
            f"activations (T, K) and packed weights (N, bytes) expected, not {x.shape} and {packed.shape}"
        )
    if groups % w_groups or groups % x_groups:
        raise ConfigError(f"{x_groups} groups of activations and {w_groups} of weights do not subdivide one another")
    _check_groups(width, groups)
    _check_packed(packed, width, bits)
    if x.device != packed.device:
        raise ConfigError(f"activations are on {x.device}, weights on {packed.device}")
    if x.shape[0] > _MOST_TOKENS:
        raise ConfigError(f"the few-bit kernels take up to {_MOST_TOKENS} tokens at a time, not {x.shape[0]}")
    if out_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(f"results are float32, bfloat16 or float16, not {out_dtype}")
    return _Shape(x.shape[0], packed.shape[0], width, groups, groups // x_groups, groups // w_groups)


def _check_groups(width: int, groups: int) -> None:
    if not 1 <= width < _EXACT_WIDTH:
        raise ConfigError(f"the few-bit kernels sum exactly over 1 to {_EXACT_WIDTH - 1} in_features, not {width}")
    if groups > 1 and (width % groups or width // groups not in _GROUP_SIZES):
        raise ConfigError(f"{groups} scale groups of a row of width {width} are not of 32, 64 or 128 elements")


def _check_packed(packed: Tensor, width: int, bits: int) -> None:
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_width(width, bits):
        raise ConfigError(
            f"{width} codes of {bits} bits take {packed_width(width, bits)} bytes of uint8 a row, not "
            f"{packed.shape[-1]} of {packed.dtype}"
        )


def _asm() -> bool:
    return not triton.knobs.runtime.interpret


def _aligned(packed: Tensor) -> bool:
    return packed.shape[1] % 4 == 0 and begins_on_words(packed)


def _launch(
    shape: _Shape, weights: WeightForm, form: tuple[int, ...], x: Tensor, digits: int, x_step: Tensor,
    x_sums: Tensor | None, packed: Tensor, w_step: Tensor, w_sums: Tensor | None, unit: float, bias: Tensor | None,
    out_dtype: torch.dtype, popcount: bool = False,
) -> Tensor:  # fmt: skip
    """Choose a kernel and its blocks, launch it, and add the parts if programs shared rows."""
    tokens, channels, width, groups, x_ratio, w_ratio = shape
    out = torch.empty(tokens, channels, dtype=out_dtype, device=x.device)
    packed, x_step, w_step = packed.contiguous(), x_step.contiguous(), w_step.expand(channels, -1).contiguous()
    optional = {"x_sums": x_sums, "w_sums": w_sums, "bias": bias}
    x_sums, w_sums, bias_or_any = (out if t is None else t.contiguous() for t in optional.values())
    group_bytes = width * weights.bits // (8 * groups) if groups > 1 else 0
    batch = tokens * digits > _COLUMNS and not popcount and (not group_bytes or group_bytes >= 32)
    few = 1 if batch else max(1, min((4 if popcount else _COLUMNS) // digits, tokens))

    def run(config: Config) -> None:
        block_bytes = config.block_k
        steps = triton.cdiv(triton.cdiv(packed.shape[1], block_bytes), config.split)
        split = triton.cdiv(triton.cdiv(packed.shape[1], block_bytes), steps)  # without empty parts
        rows = tokens if groups > 1 else tokens * digits
        kind = torch.float32 if groups > 1 else torch.int32
        to = out if split == 1 else torch.empty(split, rows, channels, dtype=kind, device=x.device)
        place = (triton.cdiv(channels, config.block_n), triton.cdiv(tokens, config.block_t), split)
        scales = (x_step, x_sums, w_step, w_sums, bias_or_any, tokens, channels, unit)
        common = {
            "K": width, "WIDTH": packed.shape[1], "RUN": run_length(width, weights.bits), "GROUPS": groups,
            "X_RATIO": x_ratio, "W_RATIO": w_ratio, "BITS": weights.bits, "FIELDS": weights.fields,
            "VALUES": weights.values, "FORM": form, "DIGITS": digits, "BN": config.block_n, "SPLIT": split,
            "HAS_BIAS": bias is not None, "ASM": _asm(), "num_warps": config.warps,
        }  # fmt: skip
        if batch:
            small_batch[place](packed.view(torch.int8), x, to, *scales, steps, BT=config.block_t, BB=block_bytes,
                               STAGES=config.stages, **common)  # fmt: skip
        else:
            aligned = _aligned(packed)
            few_tokens[place](packed.view(torch.int32) if aligned else packed, x.view(torch.int32), to, *scales, steps,
                              TOKENS=config.block_t, BW=block_bytes // 4, ALIGNED=aligned, AHEAD=config.stages > 1,
                              POPCOUNT=popcount, maxnreg=128 if aligned and groups == 1 else None,  # two programs an SM
                              **common)  # fmt: skip
        if split > 1:
            add_parts[(triton.cdiv(channels, 256), tokens)](
                to, out, *scales, K=width, GROUPED=groups > 1, FORM=form, DIGITS=digits, BN=256, SPLIT=split,
                HAS_BIAS=bias is not None, POPCOUNT=popcount,
            )  # fmt: skip

    if batch:
        candidates = batch_candidates(bucket(tokens), channels, packed.shape[1], weights.bits, digits, group_bytes)
    else:
        candidates = few_candidates(bucket(tokens), few, channels, packed.shape[1], 8 // weights.bits * digits)
    key = (bucket(tokens), channels, width, weights.bits, digits, groups, len(weights.values), popcount)
    run(best_config("few_bit_batch" if batch else "few_bit_tokens", key, candidates, run))
    return out


def few_candidates(tokens: int, few: int, channels: int, row_bytes: int, x_bytes: int) -> tuple[Config, ...]:
    """Blocks for `few_tokens`, the default first: 8 warps always, so that a block of x has fewer words than threads,
    which makes Triton load it straight to where it is used. stages 2: the next weights are in flight, where
    registers are left beside x_bytes of activations for each byte of weights."""
    made = []
    for block_n in (32, 16, 64):
        programs = triton.cdiv(channels, block_n) * triton.cdiv(tokens, few)
        stages = 1 if x_bytes > 16 else 2
        made.append(Config(few, block_n, 512, 8, stages, split=_split(programs, row_bytes, 512)))
    if channels <= 32 * 132:
        made[0], made[1] = made[1], made[0]
    return tuple(made)


def batch_candidates(
    tokens: int, channels: int, row_bytes: int, bits: int, digits: int, group_bytes: int
) -> tuple[Config, ...]:
    """Blocks for `small_batch`, the default first. group_bytes: the bytes of a scale group, 0 for row scales."""
    block_t = min(max(tokens, 8), 32)
    made = []
    for block_n, block_k, stages in ((32, 128, 4), (64, 128, 3), (32, 256, 3), (64, 64, 4)):
        block_k = group_bytes or block_k
        x_bytes = 8 // bits * digits * block_t  # tiles of activations for each byte of a row
        while stages * block_k * (block_n + x_bytes) > _SHARED_BYTES:
            if stages > 2:
                stages -= 1
            elif block_k > 32 and not group_bytes:
                block_k //= 2
            else:
                break
        programs = triton.cdiv(channels, block_n) * triton.cdiv(tokens, block_t)
        made.append(Config(block_t, block_n, block_k, 4, stages, split=_split(programs, row_bytes, block_k)))
    return tuple(dict.fromkeys(made))


def _split(programs: int, row_bytes: int, block_bytes: int) -> int:
    """Into how many parts to cut rows: enough for every SM, each part at least two blocks long."""
    return max(1, min(_PROGRAMS // (2 * programs) * 2, row_bytes // (2 * block_bytes), 16))

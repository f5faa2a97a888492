# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Bring activations into the order of the few-bit kernels: int8, one run of bytes per field of the packed weights.

Element byte·P + k of a row goes to (field k, byte), P = 8/bits: what field k of a run of weight bytes is multiplied
with then lies in a run as well. A run is a multiple of 16 bytes, the end is zero: it makes tails of K harmless.

Float activations become three signed 8-bit digits: x = 2^(E−22)·(65536·d₀ + 256·d₁ + d₂) with max|x| of the row below
2^E, rounded by at most 2^(E−23). That is the resolution which float32 sums of such a row have as well, and it turns a
weight-only product into exact integer products. A row with an infinity or a NaN becomes NaN.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

DIGITS = 3


class Arranged(NamedTuple):
    """values: int8 (T·digits, P, run). step: float32 (T, 1). sums: int32 (T·digits, groups), or None."""

    values: Tensor
    step: Tensor
    sums: Tensor | None
    digits: int


def run_length(length: int, bits: int) -> int:
    """Bytes of one run for rows of `length` elements."""
    return -(-length * bits // 128) * 16


def begins_on_words(x: Tensor) -> bool:
    """Whether bytes may be viewed as words, and read 16 at a time."""
    return x.data_ptr() % 16 == 0 and x.storage_offset() % 4 == 0


def arrange(x_a: Tensor, bits: int) -> Tensor:
    """int8 (T, P, run) of int8 factors (T, K)."""
    tokens, width = x_a.shape
    fields, run = 8 // bits, run_length(width, bits)
    if fields == 1 and run == width and begins_on_words(x_a):
        return x_a
    out = torch.empty(tokens, fields, run, dtype=torch.int8, device=x_a.device)
    block = min(1024, triton.next_power_of_2(run))
    _arrange[(tokens, triton.cdiv(run, block))](x_a, out, width, run, FIELDS=fields, BLOCK=block)
    return out


def digits_of(x_h: Tensor, bits: int, groups: int) -> Arranged:
    """Digits and scales of every row of float x_h (T, K), and sums over `groups` parts of a row (0: no sums).

    Programs share a row where they need no sum over it; each finds its largest value by itself.
    """
    tokens, width = x_h.shape
    fields, run = 8 // bits, run_length(width, bits)
    values = torch.empty(tokens * DIGITS, fields, run, dtype=torch.int8, device=x_h.device)
    step = torch.empty(tokens, 1, dtype=torch.float32, device=x_h.device)
    sums = torch.empty(tokens * DIGITS, groups, dtype=torch.int32, device=x_h.device) if groups else None
    block = min(2048 // fields, triton.next_power_of_2(run))
    part = width // groups // fields if groups > 1 else block  # bytes of a run that share a sum: whole ones
    block = max(block, part)
    programs = 1 if groups else triton.cdiv(run, block)
    wide = min(16384, triton.next_power_of_2(width))
    _digits[(tokens, programs)](
        x_h, values, step, step if sums is None else sums, K=width, RUN=run, GROUPS=groups, FIELDS=fields, WIDE=wide,
        BLOCK=block, PART=part, ALONE=programs == 1, num_warps=8 if wide < 16384 else 16,
    )  # fmt: skip
    return Arranged(values, step, sums, DIGITS)


@triton.jit
def _arrange(x_ptr, out_ptr, K, run, FIELDS: tl.constexpr, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    field = tl.arange(0, FIELDS)
    k = byte[None, :] * FIELDS + field[:, None]
    x = tl.load(x_ptr + t * K + k, mask=k < K, other=0)
    tl.store(out_ptr + (t * FIELDS + field[:, None]) * run + byte[None, :], x, mask=byte[None, :] < run)


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _digits(x_ptr, out_ptr, step_ptr, sums_ptr, K: tl.constexpr, RUN: tl.constexpr, GROUPS: tl.constexpr,
            FIELDS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
            ALONE: tl.constexpr):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    flat = tl.arange(0, WIDE)
    largest = tl.zeros((WIDE,), tl.float32)
    spoiled = tl.zeros((WIDE,), tl.float32)
    for k0 in range(0, K, WIDE):
        x = tl.load(x_ptr + t * K + k0 + flat, mask=k0 + flat < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        spoiled += tl.where(tl.abs(x) < float("inf"), 0.0, float("nan"))
    biased = (tl.max(largest, axis=0).to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(biased - 126, -100), 127)
    scale = _power_of_two(22 - exponent)
    if tl.program_id(1) == 0:
        tl.store(step_ptr + t, _power_of_two(exponent - 22) + tl.sum(spoiled, axis=0))

    field = tl.arange(0, FIELDS)[:, None]
    which = tl.arange(0, 4)[:, None]
    sums = tl.zeros((4, BLOCK // PART), tl.int32)
    first = 0 if ALONE else tl.program_id(1) * BLOCK
    for byte0 in range(first, RUN if ALONE else first + BLOCK, BLOCK):
        byte = (byte0 + tl.arange(0, BLOCK))[None, :]
        k = byte * FIELDS + field
        x = tl.load(x_ptr + t * K + k, mask=k < K, other=0.0).to(tl.float32)
        rest = tl.floor(tl.where(tl.abs(x) < float("inf"), x, 0.0) * scale + 0.5).to(tl.int32)
        if GROUPS > 1:  # a block holds whole groups
            sums = tl.zeros((4, BLOCK // PART), tl.int32)
        for i in tl.static_range(3):
            digit = rest
            if i < 2:
                digit = ((rest + 128) & 255) - 128
                rest = (rest - digit) >> 8
            row = t * 3 + (2 - i)
            tl.store(out_ptr + (row * FIELDS + field) * RUN + byte, digit.to(tl.int8), mask=byte < RUN)
            if GROUPS > 0:
                part = tl.sum(tl.reshape(tl.sum(digit, axis=0), (BLOCK // PART, PART)), axis=1)
                sums += tl.where(which == 2 - i, part[None, :], 0)
        if GROUPS > 1:
            g = byte0 // PART + tl.arange(0, BLOCK // PART)[None, :]
            tl.store(sums_ptr + (t * 3 + which) * GROUPS + g, sums, mask=(which < 3) & (g < GROUPS))
    if GROUPS == 1:
        rows = tl.arange(0, 4)
        tl.store(sums_ptr + t * 3 + rows, tl.sum(sums, axis=1), mask=rows < 3)

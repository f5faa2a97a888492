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
    """values: int8 (rows·digits, P, run). step: float32 (rows, groups). sums: int32 (rows·digits, groups)."""

    values: Tensor
    step: Tensor
    sums: Tensor
    digits: int


def run_length(length: int, bits: int) -> int:
    """Bytes of one run for rows of `length` elements."""
    return -(-length * bits // 128) * 16


def arrange(x_a: Tensor, bits: int) -> Tensor:
    """int8 (T, P, run) of int8 factors (T, K)."""
    tokens, width = x_a.shape
    fields, run = 8 // bits, run_length(width, bits)
    if fields == 1 and run == width:
        return x_a
    out = torch.empty(tokens, fields, run, dtype=torch.int8, device=x_a.device)
    block = min(1024, triton.next_power_of_2(run))
    _arrange[(tokens, triton.cdiv(run, block))](x_a, out, width, run, FIELDS=fields, BLOCK=block)
    return out


def digits_of(x_h: Tensor, bits: int, groups: int) -> Arranged:
    """Digits, scales (T, 1) and sums over `groups` parts of every row of float x_h (T, K)."""
    tokens, width = x_h.shape
    fields, run = 8 // bits, run_length(width, bits)
    values = torch.empty(tokens * DIGITS, fields, run, dtype=torch.int8, device=x_h.device)
    step = torch.empty(tokens, 1, dtype=torch.float32, device=x_h.device)
    sums = torch.empty(tokens * DIGITS, groups, dtype=torch.int32, device=x_h.device)
    block = min(4096 // fields, triton.next_power_of_2(run))
    size = width // groups
    part = size // fields if groups > 1 else block  # bytes of a run that share a sum; a group is whole bytes
    _digits[(tokens,)](
        x_h, values, step, sums, width, run, groups, FIELDS=fields, BLOCK=max(block, part), PART=part, num_warps=8
    )
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
def _digits(
    x_ptr, out_ptr, step_ptr, sums_ptr, K, run, groups, FIELDS: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr
):
    t = tl.program_id(0).to(tl.int64)
    flat = tl.arange(0, FIELDS * BLOCK)
    largest = tl.zeros((FIELDS * BLOCK,), tl.float32)
    spoiled = tl.zeros((FIELDS * BLOCK,), tl.float32)
    for k0 in range(0, K, FIELDS * BLOCK):
        x = tl.load(x_ptr + t * K + k0 + flat, mask=k0 + flat < K, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        spoiled += tl.where(tl.abs(x) < float("inf"), 0.0, float("nan"))
    biased = (tl.max(largest, axis=0).to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(biased - 126, -100), 127)
    scale = _power_of_two(22 - exponent)
    tl.store(step_ptr + t, _power_of_two(exponent - 22) + tl.sum(spoiled, axis=0))

    field = tl.arange(0, FIELDS)[:, None]
    column = tl.arange(0, BLOCK)
    parts: tl.constexpr = BLOCK // PART
    which = tl.arange(0, 4)
    d_sum = tl.zeros((4, parts), tl.int32)
    for byte0 in range(0, run, BLOCK):
        byte = (byte0 + column)[None, :]
        k = byte * FIELDS + field
        x = tl.load(x_ptr + t * K + k, mask=k < K, other=0.0).to(tl.float32)
        rest = tl.floor(tl.where(tl.abs(x) < float("inf"), x, 0.0) * scale + 0.5).to(tl.int32)
        if groups > 1:  # a block holds whole groups
            d_sum = tl.zeros((4, parts), tl.int32)
        for i in tl.static_range(3):
            digit = rest
            if i < 2:
                digit = ((rest + 128) & 255) - 128
                rest = (rest - digit) >> 8
            row = t * 3 + (2 - i)
            tl.store(out_ptr + (row * FIELDS + field) * run + byte, digit.to(tl.int8), mask=byte < run)
            part = tl.sum(tl.reshape(tl.sum(digit, axis=0), (parts, PART)), axis=1)
            d_sum += tl.where(which[:, None] == 2 - i, part[None, :], 0)
        if groups > 1:
            g = byte0 // PART + tl.arange(0, parts)[None, :]
            there = (which[:, None] < 3) & (g < groups)
            tl.store(sums_ptr + (t * 3 + which[:, None]) * groups + g, d_sum, mask=there)
    if groups == 1:
        tl.store(sums_ptr + t * 3 + which, tl.sum(d_sum, axis=1), mask=which < 3)

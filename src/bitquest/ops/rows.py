"""Rows as a kernel hands them over: integers, packed codes, steps and mask bits; and what may be fused before them.

T rows, K elements of a row, G scale groups of a row (1 or K/size).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PARTS = ("factors", "packed", "step", "mask", "sums")


class QuantizedRows(NamedTuple):
    """An operand as integers. Parts that nobody asked for are None."""

    factors: Tensor | None  # int8 (T, K): `a` of the grid's IntegerForm
    packed: Tensor | None  # uint8 (T, ⌈K·bits/8⌉): codes as numerics/packing.py stores them
    step: Tensor  # float32 Δ, (T, 1) or (T, G); (1, 1) for a given step of the whole tensor
    mask: Tensor | None  # uint8 (T, ⌈K/8⌉): the estimator's M as bits, least significant first; empty: all pass
    sums: Tensor | None  # int32 (T, G): Σ a over each scale group


class RMSNorm(NamedTuple):
    """Read x as x / rms(x) · weight, in float32."""

    weight: Tensor  # (K,)
    eps: float


class SwiGLU(NamedTuple):
    """Read x as silu(x) · up, in float32."""

    up: Tensor  # (T, K)


Prologue = RMSNorm | SwiGLU


def apply_prologue(x: Tensor, prologue: Prologue | None) -> Tensor:
    """What the rows are before they are rotated: x itself, or its norm or gated product in float32."""
    if prologue is None:
        return x
    if isinstance(prologue, RMSNorm):
        return F.rms_norm(x.float(), (x.shape[-1],), prologue.weight.float(), prologue.eps)
    return F.silu(x.float()) * prologue.up.float()


@dataclass(frozen=True)
class PackedWeight:
    """A layer's weight as it is stored.

    packed: uint8 (N, ⌈K·bits/8⌉), every code, dropped ones too. step: float32, (N, 1), (N, G) or (1, 1).
    kept: bool (N, K) under N:M sparsity. float_weight: rotated float32 (N, K), where the weight is not quantized.
    """

    packed: Tensor | None = None
    step: Tensor | None = None
    kept: Tensor | None = None
    float_weight: Tensor | None = None

    @property
    def device(self) -> torch.device:
        held = self.packed if self.packed is not None else self.float_weight
        assert held is not None
        return held.device

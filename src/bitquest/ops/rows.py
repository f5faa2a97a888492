"""Rows as a kernel hands them over: integers, packed codes, steps and mask bits; and what may be fused before them.

T rows, K elements of a row, G scale groups of a row (1 or K/size).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ENGINE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # what every engine reads and writes
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


def flattened(prologue: Prologue | None) -> Prologue | None:
    """The prologue of rows (T, K), where the input was (…, K); cut from the graph."""
    if isinstance(prologue, RMSNorm):
        return RMSNorm(prologue.weight.detach(), prologue.eps)
    return None if prologue is None else SwiGLU(prologue.up.detach().reshape(-1, prologue.up.shape[-1]))


def apply_prologue(x: Tensor, prologue: Prologue | None) -> Tensor:
    """What the rows are before they are rotated: x itself, or its norm or gated product in float32."""
    if prologue is None:
        return x
    if isinstance(prologue, RMSNorm):
        return F.rms_norm(x.float(), (x.shape[-1],), prologue.weight.float(), prologue.eps)
    return F.silu(x.float()) * prologue.up.float()


def prologue_gradients(gradient: Tensor, x: Tensor, prologue: Prologue) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the prologue's other operand, in their dtypes, from that of the rows (T, K) float32.

    Written out, since operators run below autograd.
    """
    x_32 = x.float()
    if isinstance(prologue, RMSNorm):
        inverse = torch.rsqrt(x_32.square().mean(-1, keepdim=True) + prologue.eps)
        normed, inner = x_32 * inverse, gradient * prologue.weight.float()
        d_x = inverse * (inner - normed * (inner * normed).mean(-1, keepdim=True))
        return d_x.to(x.dtype), (gradient * normed).sum(0).to(prologue.weight.dtype)
    gate = torch.sigmoid(x_32)
    d_x = gradient * prologue.up.float() * gate * (1 + x_32 * (1 - gate))
    return d_x.to(x.dtype), (gradient * x_32 * gate).to(prologue.up.dtype)


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

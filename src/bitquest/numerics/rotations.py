"""Rotations: spread outliers over neighbours before quantizing, y = xH with H block-diagonal and orthonormal.

(xH)(WH)ᵀ = xWᵀ, so a layer whose two operands share a rotation needs no inverse in the forward pass. Blocks are applied
one by one: at most 2 % of a layer's operations at n = 128, where a dense K×K matrix would cost up to 69 %.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bitquest.errors import ConfigError

MAX_BLOCK = 128
_PRODUCT = 16  # stages up to this size are one product: faster than passes of additions


@dataclass(frozen=True)
class NoRotation:
    """The identity."""

    def resolve(self, width: int) -> "NoRotation":
        return self

    @property
    def block(self) -> int:
        """Block size as the operators' schema spells it: 1 for no rotation."""
        return 1

    def apply(self, x: Tensor) -> Tensor:
        """x itself, as float32, contiguous."""
        return x.to(torch.float32).contiguous()

    def inverse(self, x: Tensor) -> Tensor:
        """x itself, as float32, contiguous."""
        return self.apply(x)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "none"}


@dataclass(frozen=True)
class BlockHadamard:
    """Sylvester-Hadamard blocks of `block_size` along the last dimension, entries ±1/√block_size.

    block_size None resolves per layer to the largest power of two ≤ 128 that divides the width (288 → 32, 576 → 64).
    """

    block_size: int | None = None

    def __post_init__(self) -> None:
        n = self.block_size
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 2 or n & (n - 1) or n > 4096):
            raise ConfigError(f"BlockHadamard needs a power of two from 2 to 4096 as its block size, not {n!r}")

    def resolve(self, width: int) -> "BlockHadamard | NoRotation":
        """The rotation with its block size fixed for a layer of this width. An odd width has none to offer."""
        if self.block_size is None:
            n = min(MAX_BLOCK, width & -width)
            return BlockHadamard(n) if n > 1 else NoRotation()
        if width % self.block_size:
            raise ConfigError(
                f"a rotation in blocks of {self.block_size} does not fit width {width}; "
                "BlockHadamard() without a size takes the largest block that does"
            )
        return self

    @property
    def block(self) -> int:
        if self.block_size is None:
            raise ConfigError("resolve(width) this rotation before it is applied: its block size depends on the layer")
        return self.block_size

    def apply(self, x: Tensor) -> Tensor:
        """xH in float32 whatever the dtype of x (…, K), contiguous; autocast is off inside."""
        rotation = self if self.block_size is not None else self.resolve(x.shape[-1])
        if isinstance(rotation, NoRotation):
            return rotation.apply(x)
        n = rotation.block
        if x.shape[-1] % n:
            rotation.resolve(x.shape[-1])
        blocks = x.to(torch.float32).reshape(-1, n)
        if not _products_are_exact(x.device.type):
            return _butterfly(blocks).view(x.shape)  # TF32 or bf16 products would move codes: use additions only
        with without_autocast(x.device.type):
            return (_long_strides(blocks) @ _short_strides(n, x.device)).view(x.shape)

    def inverse(self, x: Tensor) -> Tensor:
        """xHᵀ, which is xH: Sylvester's matrix is symmetric."""
        return self.apply(x)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "block_hadamard", "block_size": self.block_size}


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast off, on the devices that have one."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()


def _products_are_exact(device_type: str) -> bool:
    # Asked per device: the global getter raises once any device was set on its own.
    match device_type:
        case "cpu":
            precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
        case "cuda":
            precision = torch.backends.cuda.matmul.fp32_precision
        case _:
            return False
    return precision in ("none", "ieee")


@lru_cache(maxsize=32)
def hadamard(n: int, device: torch.device) -> Tensor:
    """The orthonormal Sylvester-Hadamard matrix (n, n), float32, n a power of two."""
    with torch.inference_mode(False):  # kept for later, when autograd may want to save it
        matrix = torch.ones(1, 1, dtype=torch.float32, device="cpu")
        while matrix.shape[0] < n:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        return (matrix / n**0.5).to(device)


def _long_strides(blocks: Tensor) -> Tensor:
    """The stages of the butterfly whose partners are at least 16 elements apart, as (…, 16); unscaled.

    Where two parts of a block are equal, as the heads of grouped-query attention are at a text's first position, their
    difference is exactly zero here. A product would leave rounding behind, and the sign of that decides a 1-bit code.
    """
    n = blocks.shape[-1]
    while n > _PRODUCT:
        n //= 2
        blocks = _sums_and_differences(blocks.reshape(-1, 2, n)).view(-1, n)
    return blocks


def _sums_and_differences(halves: Tensor) -> Tensor:
    a, b = halves.unbind(1)
    if halves.requires_grad and torch.is_grad_enabled():
        return torch.stack([a + b, a - b], 1)
    made = torch.empty(halves.shape, dtype=halves.dtype, device=halves.device)
    torch.add(a, b, out=made[:, 0])
    torch.sub(a, b, out=made[:, 1])
    return made


@lru_cache(maxsize=32)
def _short_strides(n: int, device: torch.device) -> Tensor:
    """The other stages as a matrix, with the scale 1/√n of all."""
    m = min(n, _PRODUCT)
    with torch.inference_mode(False):  # kept for later, when autograd may want to save it
        return hadamard(m, device) * (m / n) ** 0.5


def _butterfly(blocks: Tensor) -> Tensor:
    """The same product by log2(n) additions and subtractions; blocks (…, n) float32."""
    n = blocks.shape[-1]
    y, half = blocks, 1
    while half < n:
        pairs = y.reshape(-1, n // (2 * half), 2, half)
        y = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2).reshape(-1, n)
        half *= 2
    return y * n**-0.5


Rotation = NoRotation | BlockHadamard
ALL_ROTATIONS: tuple[Rotation, ...] = (NoRotation(), BlockHadamard(), BlockHadamard(32))


def rotation_from_block(block: int) -> Rotation:
    """The rotation an operator's `block` argument names: 1 for none."""
    return NoRotation() if block == 1 else BlockHadamard(block)


def rotation_from_json(fields: dict[str, Any]) -> Rotation:
    """The rotation that `to_json` described."""
    match fields:
        case {"kind": "none", **rest} if not rest:
            return NoRotation()
        case {"kind": "block_hadamard", "block_size": block_size, **rest} if not rest:
            return BlockHadamard(block_size)
    raise ConfigError(f"not a rotation: {fields!r}; expected kind 'none' or 'block_hadamard' (block_size)")

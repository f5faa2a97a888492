"""Codes to bytes and back: b bits each, b from 1 to 8, no bit wasted but at the end of a row.

Files store u = c + 2^(b−1) in [0, 2^b), least significant bit first: bit j of element k of a row is bit (k·b + j) of
the row, and bit i of a row is bit (i mod 8) of its byte ⌊i/8⌋. Every row begins on a byte; spare bits are zero.
"""

import math

import torch
from torch import Tensor

from bitquest.errors import FormatError

_ROWS_AT_ONCE = 1 << 22  # codes whose bits are spread out at one time: bounds the memory of a large matrix


def packed_width(length: int, bits: int) -> int:
    """Bytes of a row of `length` codes."""
    return (length * bits + 7) // 8


def pack(codes: Tensor, bits: int, trusted: bool = False) -> Tensor:
    """int8 codes (…, K), centred, to uint8 (…, ⌈K·bits/8⌉). Raises FormatError for a code outside the range.

    trusted: codes that a grid gave; they are not looked at, which on a GPU would wait for it.
    """
    _check(codes, torch.int8, bits)
    half = 2 ** (bits - 1)
    if not trusted and codes.numel() and (int(codes.min()) < -half or int(codes.max()) >= half):
        raise FormatError(f"codes from {int(codes.min())} to {int(codes.max())} do not fit {bits} bits")
    rows = codes.reshape(math.prod(codes.shape[:-1]), codes.shape[-1])
    length = rows.shape[-1]
    packed = torch.empty(rows.shape[0], packed_width(length, bits), dtype=torch.uint8, device=codes.device)
    lane = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    weight = 2 ** torch.arange(8, dtype=torch.uint8, device=codes.device)
    for part, out in zip(_chunks(rows, length), _chunks(packed, length), strict=True):
        u = (part.to(torch.int16) + half).to(torch.uint8)
        spread = ((u.unsqueeze(-1) >> lane) & 1).flatten(-2)
        spread = torch.nn.functional.pad(spread, (0, out.shape[-1] * 8 - spread.shape[-1]))
        out.copy_((spread.unflatten(-1, (-1, 8)) * weight).sum(-1, dtype=torch.uint8))
    return packed.reshape(*codes.shape[:-1], packed.shape[-1])


def unpack(packed: Tensor, bits: int, length: int, trusted: bool = False) -> Tensor:
    """uint8 (…, ⌈length·bits/8⌉) to int8 codes (…, length). Another row size or set spare bits: FormatError.

    trusted: bytes that `pack` made or that were looked at before; their spare bits are not looked at again.
    """
    _check(packed, torch.uint8, bits)
    if packed.shape[-1] != packed_width(length, bits):
        raise FormatError(
            f"{length} codes of {bits} bits take {packed_width(length, bits)} bytes a row, not {packed.shape[-1]}"
        )
    rows = packed.reshape(math.prod(packed.shape[:-1]), packed.shape[-1])
    codes = torch.empty(rows.shape[0], length, dtype=torch.int8, device=packed.device)
    lane = torch.arange(8, dtype=torch.uint8, device=packed.device)
    weight = 2 ** torch.arange(bits, dtype=torch.uint8, device=packed.device)
    for part, out in zip(_chunks(rows, length), _chunks(codes, length), strict=True):
        spread = ((part.unsqueeze(-1) >> lane) & 1).flatten(-2)
        if not trusted and spread.shape[-1] > length * bits and spread[:, length * bits :].any():
            raise FormatError("spare bits at the end of a row of codes are set")
        u = (spread[:, : length * bits].unflatten(-1, (length, bits)) * weight).sum(-1, dtype=torch.uint8)
        out.copy_((u.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8))
    return codes.reshape(*packed.shape[:-1], length)


def _check(rows: Tensor, dtype: torch.dtype, bits: int) -> None:
    if rows.dtype != dtype:
        raise FormatError(f"expected a tensor of {dtype}, not {rows.dtype}")
    if bits not in range(1, 9):
        raise FormatError(f"codes have 1 to 8 bits, not {bits!r}")


def _chunks(rows: Tensor, length: int) -> tuple[Tensor, ...]:
    return rows.split(max(1, _ROWS_AT_ONCE // max(length, 1)))

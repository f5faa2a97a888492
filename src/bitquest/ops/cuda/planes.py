"""2-bit operands as planes of bits: W1A2 and W2A2 by 1-bit products.

A 2-bit code u = c + 2 = 2·u₁ + u₀ is kept as two planes of bits, plane 0 the low one. Its odd integer is
2c + 1 = 2·b₁ + b₀ with b = 2u − 1 = ±1 (METHOD, "Exact integer arithmetic"): W1A2 is two products of planes, W2A2 four,
which kernels/b1_wgmma.cu sums in one set of int32 accumulators, exactly.
"""

import ctypes

import torch
from torch import Tensor

from bitquest.ops.cuda.hopper import aligned_rows, launch_planes, loaded, multiprocessors, refuses


def split_planes(packed: Tensor, width: int) -> Tensor:
    """Packed 2-bit codes (rows, ⌈K/4⌉) uint8 as planes (2, rows, ⌈K/8⌉) uint8, rows on multiples of 16 bytes.

    Element k of a row is bit k mod 8 of byte ⌊k/8⌋ of either plane; spare bits are zero, as they are in `packed`. One
    kernel on a Hopper GPU, which reads and writes each byte once (8192 × 8192 codes: 34 MB, 8 µs at 4.3 TB/s; not
    measured), torch elsewhere.
    """
    bytes_per_row = -(-width // 8)
    pitch = -(-bytes_per_row // 16) * 16
    whole = packed.new_empty(2, packed.shape[0], pitch)
    planes = whole[..., :bytes_per_row]
    if packed.is_cuda and packed.numel() and packed.stride(-1) == 1 and refuses(packed.device) is None:
        index = torch.cuda.current_device() if packed.device.index is None else packed.device.index
        blocks = min(-(-packed.shape[0] * (pitch // 8) // 256), 8 * multiprocessors(index))
        sizes = (*map(ctypes.c_int, packed.shape), *map(ctypes.c_longlong, (packed.stride(0), pitch)))
        loaded("split_planes", (), 0, torch.device("cuda", index)).launch(
            (blocks, 1, 1), (256, 1, 1), (packed, whole, *sizes)
        )
        return planes
    wide = torch.nn.functional.pad(packed, (0, 2 * bytes_per_row - packed.shape[-1]))
    for plane in range(2):
        four = (wide >> plane) & 0x55  # four codes a byte: their bits at 0, 2, 4, 6 …
        four = (four | (four >> 1)) & 0x33
        four = (four | (four >> 2)) & 0x0F  # … at 0, 1, 2, 3
        planes[plane] = four[:, 0::2] | (four[:, 1::2] << 4)
    return planes


def plane_sums(planes: Tensor, width: int) -> Tensor:
    """Σ of the odd integers of each row, int32 (rows,), from planes (P, rows, ⌈K/8⌉). For weights, once."""
    ones = planes.new_zeros(planes.shape[:2], dtype=torch.int32)
    for bit in range(8):
        ones += ((planes >> bit) & 1).sum(-1, dtype=torch.int32)
    weight = 2 ** torch.arange(1, planes.shape[0] + 1, dtype=torch.int32, device=planes.device)
    return (ones * weight.unsqueeze(1)).sum(0, dtype=torch.int32) - (2 ** planes.shape[0] - 1) * width


def planes_of(packed: Tensor, bits: int, width: int) -> Tensor:
    """The planes of packed 1- or 2-bit codes, laid out for the copy engine."""
    return aligned_rows(packed.unsqueeze(0)) if bits == 1 else split_planes(packed, width)


def planes_product(x_planes: Tensor, x_sums: Tensor, w_planes: Tensor, w_sums: Tensor, width: int) -> Tensor:
    """Σ_k a[t, k]·c[n, k] of the odd integers as int32 (T, N), exact.

    Planes: (1 or 2, rows, ⌈K/8⌉) of either operand. Sums: int32, one per row, Σ of the odd integers. `width` is K.
    Raises ConfigError where the kernel cannot run.
    """
    return launch_planes(x_planes, None, x_sums, w_planes, None, w_sums, width, None, torch.int32)


def planes_linear(
    x_planes: Tensor,
    x_step: Tensor,
    x_sums: Tensor,
    w_planes: Tensor,
    w_step: Tensor,
    w_sums: Tensor,
    width: int,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype,
) -> Tensor:
    """y (T, N) = Δ_x[t]·Δ_w[n]/4 · Σ a·c + bias: `planes_product` with the scales in its epilogue.

    Steps: float32, one per row; bias (N,). out_dtype float32, bfloat16 or float16; the arithmetic is float32.
    """
    return launch_planes(x_planes, x_step, x_sums, w_planes, w_step, w_sums, width, bias, out_dtype)

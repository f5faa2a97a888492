"""A look at each hand-written kernel before a layer relies on it: one small product against torch, once per device.

The kernels were built and modelled without the hardware they are for. One that does not give the exact integers here,
or does not launch, is not used: the engine takes the Triton kernel instead, and says so once.
"""

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.packing import pack
from bitquest.ops.cuda import hopper, one_bit, planes, sparse

TOKENS, CHANNELS, WIDTH = 200, 136, 776  # more than one tile of either kind, with tails


def _codes(rows: int, bits: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, WIDTH), generator=generator, dtype=torch.int8)


def _exact(x_a: Tensor, w_a: Tensor) -> Tensor:
    return (x_a.double() @ w_a.double().t()).to(torch.int32)


def _odd(codes: Tensor) -> Tensor:
    return codes * 2 + 1


def _bits(kernel: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], device: torch.device) -> bool:
    x, w = _codes(TOKENS, 1, 1), _codes(CHANNELS, 1, 2)
    sums = [_odd(codes).sum(1, dtype=torch.int32).to(device) for codes in (x, w)]
    got = kernel(pack(x, 1).to(device), sums[0], pack(w, 1).to(device), sums[1])
    return torch.equal(got.cpu(), _exact(_odd(x), _odd(w)))


def _b1_wgmma(device: torch.device) -> bool:
    return _bits(lambda x, x_sums, w, w_sums: hopper.b1_product_hopper(x, x_sums, w, w_sums, WIDTH), device)


def _b1_mma(device: torch.device) -> bool:
    return _bits(lambda x, x_sums, w, w_sums: one_bit.b1_product(x, w, WIDTH, x_sums=x_sums), device)


def _planes(device: torch.device) -> bool:
    for x_bits, w_bits in ((1, 2), (2, 1), (2, 2)):
        x, w = _codes(TOKENS, x_bits, 3), _codes(CHANNELS, w_bits, 4)
        cut = [planes.planes_of(pack(c, b).to(device), b, WIDTH) for c, b in ((x, x_bits), (w, w_bits))]
        sums = [_odd(codes).sum(1, dtype=torch.int32).to(device) for codes in (x, w)]
        got = planes.planes_product(cut[0], sums[0], cut[1], sums[1], WIDTH)
        if not torch.equal(got.cpu(), _exact(_odd(x), _odd(w))):
            return False
    return True


def _sparse(device: torch.device) -> bool:
    for pair in (False, True):
        x, w = _odd(_codes(TOKENS, 4, 5)), _odd(_codes(CHANNELS, 4, 6))
        size = 2 if pair else 1
        order = torch.rand(CHANNELS, WIDTH // (4 * size), 4, generator=torch.Generator().manual_seed(7)).argsort(-1)
        kept = (order < 2).unsqueeze(-1).expand(-1, -1, -1, size).reshape(CHANNELS, WIDTH)
        made = sparse.prepare_sparse_weight((w * kept).to(device), kept.to(device), pair)
        got = sparse.sparse_product(sparse.arrange_activation(x.to(device), pair).contiguous(), made)
        if not torch.equal(got.cpu(), _exact(x, w * kept)):
            return False
    return True


_CHECKS = {"b1_wgmma": _b1_wgmma, "b1_mma": _b1_mma, "planes": _planes, "sparse": _sparse}


@cache
def is_right(kernel: str, device: torch.device) -> bool:
    """Whether a kernel ("b1_wgmma", "b1_mma", "planes" or "sparse") gives the exact integers on a device."""
    try:
        right = _CHECKS[kernel](device)
        reason = "its integers are not exact"
    except (ConfigError, RuntimeError) as error:
        right, reason = False, str(error).partition("\n")[0]
    if not right:
        warnings.warn(
            f"the CUDA kernel {kernel} is not used on {device}: {reason}. Triton's runs in its place, slower; "
            "please report this with the output of bitquest doctor --json",
            RuntimeWarning,
            stacklevel=2,
        )
    return right

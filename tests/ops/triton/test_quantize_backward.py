"""(G ⊙ M)Hᵀ and on through the prologues, against autograd of the plain composition in float64."""

import pytest
import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.rotations import hadamard
from bitquest.ops.engine import mask_bits
from bitquest.ops.rows import Prologue, RMSNorm, SwiGLU
from bitquest.ops.triton.quantize_backward import (
    mask_rotate,
    prologue_backward,
    rms_norm_backward,
    swiglu_backward,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # one rounding of a result
SHAPES = [(1, 1, 1), (5, 33, 1), (9, 20, 4), (3, 96, 32), (37, 288, 32), (2, 640, 128), (11, 256, 128), (1, 4480, 128)]


def rotated_back(gradient: Tensor, mask: Tensor, block: int) -> Tensor:
    """(G ⊙ M)Hᵀ in float64."""
    trusted = gradient.double() * mask
    if block == 1:
        return trusted
    signs = hadamard(block, torch.device("cpu")).sign().double().to(gradient.device)
    return (trusted.reshape(-1, block) @ signs).reshape(gradient.shape) * block**-0.5


def made(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(width)
    gradient = torch.randn(tokens, width, generator=generator).to(dtype).to(device)
    return gradient, (torch.rand(tokens, width, generator=generator) > 0.1).to(device)


def close(actual: Tensor, wanted: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(
        actual.double(), wanted, rtol=tolerance, atol=max(tolerance / 8, 1e-6) * float(wanted.abs().max() + 1e-3)
    )


@pytest.mark.parametrize(("tokens", "width", "block"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_rotate(tokens: int, width: int, block: int, dtype: torch.dtype, device: torch.device) -> None:
    gradient, mask = made(tokens, width, dtype, device)
    wanted = rotated_back(gradient, mask, block)
    y = mask_rotate(gradient, mask_bits(mask), block)
    assert y.dtype == dtype
    close(y, wanted)
    close(mask_rotate(gradient, mask_bits(mask), block, dtype=torch.float32), wanted)
    everything = rotated_back(gradient, torch.ones_like(mask), block)
    for no_mask in (None, torch.empty(0, dtype=torch.uint8, device=device)):
        close(mask_rotate(gradient, no_mask, block), everything)


def test_strided_and_empty_gradients(device: torch.device) -> None:
    gradient, mask = made(6, 300, torch.bfloat16, device)
    for part, m in ((gradient[:, 41:169], mask[:, 41:169]), (gradient[::2, :128], mask[::2, :128])):
        close(mask_rotate(part, mask_bits(m), 64), rotated_back(part, m, 64))
    close(
        mask_rotate(gradient.t()[:128], None, 2), rotated_back(gradient.t()[:128], torch.ones_like(mask.t()[:128]), 2)
    )
    empty = torch.empty(0, 64, device=device)
    assert mask_rotate(empty, None, 32).shape == (0, 64)
    bits = torch.empty(0, 8, dtype=torch.uint8, device=device)
    d_x, d_weight = rms_norm_backward(empty, bits, empty, torch.ones(64, device=device), 1e-5, 32)
    assert d_x.shape == (0, 64)
    assert torch.equal(d_weight, torch.zeros(64, device=device))
    assert [tuple(d.shape) for d in swiglu_backward(empty, bits, empty, empty, 32)] == [(0, 64), (0, 64)]


def reference(gradient: Tensor, mask: Tensor, x: Tensor, prologue: Prologue, block: int) -> tuple[Tensor, ...]:
    other = prologue.weight if isinstance(prologue, RMSNorm) else prologue.up
    leaves = [t.double().detach().requires_grad_() for t in (x, other)]
    if isinstance(prologue, RMSNorm):
        y = torch.nn.functional.rms_norm(leaves[0], (x.shape[1],), leaves[1], prologue.eps)
    else:
        y = torch.nn.functional.silu(leaves[0]) * leaves[1]
    return torch.autograd.grad(y, leaves, rotated_back(gradient, mask, block))


@pytest.mark.parametrize(("tokens", "width", "block"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_through_prologues(tokens: int, width: int, block: int, dtype: torch.dtype, device: torch.device) -> None:
    gradient, mask = made(tokens, width, dtype, device)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(tokens, 2 * width, generator=generator).to(dtype).to(device)[:, :width]
    up = torch.randn(tokens, width, generator=generator).to(dtype).to(device)
    weight = (torch.rand(width, generator=generator) + 0.5).to(device)
    for prologue in (RMSNorm(weight, 1e-5), RMSNorm(weight.to(dtype), 1e-5), SwiGLU(up)):
        gradients = prologue_backward(gradient, mask_bits(mask), x, prologue, block)
        assert [d.dtype for d in gradients] == [dtype, prologue[0].dtype]
        for actual, wanted in zip(gradients, reference(gradient, mask, x, prologue, block), strict=True):
            close(actual, wanted)
    everything = torch.ones_like(mask)
    for actual, wanted in zip(
        prologue_backward(gradient, None, x, SwiGLU(up), block),
        reference(gradient, everything, x, SwiGLU(up), block),
        strict=True,
    ):
        close(actual, wanted)


def test_a_row_of_zeros_through_the_norm(device: torch.device) -> None:
    gradient, mask = made(4, 64, torch.float32, device)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(device)
    x[1] = 0
    norm = RMSNorm(torch.ones(64, device=device), 1e-5)
    for actual, wanted in zip(
        prologue_backward(gradient, mask_bits(mask), x, norm, 32), reference(gradient, mask, x, norm, 32), strict=True
    ):
        close(actual, wanted)


def test_the_gradient_of_the_weight_is_the_same_every_time(device: torch.device) -> None:
    gradient, mask = made(70, 128, torch.bfloat16, device)
    arguments = (gradient, mask_bits(mask), gradient * 2, torch.ones(128, device=device), 1e-5, 128)
    assert torch.equal(rms_norm_backward(*arguments)[1], rms_norm_backward(*arguments)[1])


def test_refusals(device: torch.device) -> None:
    gradient, mask = made(4, 64, torch.float32, device)
    bits = mask_bits(mask)
    for arguments in (
        (gradient, bits, 48),
        (gradient, bits, 128),
        (gradient, mask, 32),
        (gradient, bits[:, 1:], 32),
        (gradient.long(), bits, 32),
        (gradient[0], None, 32),
    ):
        with pytest.raises(ConfigError):
            mask_rotate(*arguments)
    with pytest.raises(ConfigError, match="float64"):
        mask_rotate(gradient, bits, 32, dtype=torch.float64)
    with pytest.raises(ConfigError, match="differ"):
        swiglu_backward(gradient, bits, gradient[1:], gradient, 32)
    with pytest.raises(ConfigError, match="differ"):
        rms_norm_backward(gradient, bits, gradient[1:], gradient[0], 1e-5, 32)
    with pytest.raises(ConfigError, match="weight"):
        rms_norm_backward(gradient, bits, gradient, gradient[0, 1:], 1e-5, 32)

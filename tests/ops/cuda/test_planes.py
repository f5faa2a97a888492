"""2-bit codes as planes of bits, against the definition."""

import pytest
import torch

from bitquest.numerics.grids import UniformGrid
from bitquest.numerics.integers import integer_form, integer_product
from bitquest.numerics.packing import pack, unpack
from bitquest.ops.cuda.planes import plane_sums, planes_of, split_planes


@pytest.mark.parametrize("width", [1, 3, 4, 8, 9, 13, 127, 128, 130])
def test_planes_are_the_bits_of_the_codes(width):
    codes = torch.randint(-2, 2, (5, width), dtype=torch.int8)
    planes = split_planes(pack(codes, 2), width)
    assert planes.shape == (2, 5, -(-width // 8))
    assert not any(pitch % 16 for pitch in planes.stride()[:-1])
    low, high = (unpack(plane.contiguous(), 1, width) + 1 for plane in planes)  # unpack refuses spare bits that are set
    assert torch.equal(2 * high + low - 2, codes)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [1, 13, 127, 512, 4096])
def test_the_device_splits_alike(width):
    packed = pack(torch.randint(-2, 2, (333, width), dtype=torch.int8), 2)
    assert torch.equal(split_planes(packed.cuda(), width).cpu(), split_planes(packed, width))
    odd = torch.nn.functional.pad(packed, (3, 5)).cuda()[:, 3:-5]  # rows on any byte
    assert torch.equal(split_planes(odd, width).cpu(), split_planes(packed, width))


@pytest.mark.parametrize("bits", [1, 2])
def test_sums_are_those_of_the_odd_integers(bits):
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (7, 77), dtype=torch.int8)
    form = integer_form(UniformGrid(bits))
    sums = plane_sums(planes_of(pack(codes, bits), bits, 77), 77)
    assert sums.dtype == torch.int32
    assert torch.equal(sums, form.of_codes(codes).sum(1, dtype=torch.int32))


@pytest.mark.parametrize("bits", [(1, 1), (1, 2), (2, 1), (2, 2)], ids=str)
def test_the_kernels_formula_is_the_integer_product(bits):
    """4·Σ 2^(i + j)·popcount(plane_i AND plane_j) − m_w·S_x − m_x·S_w − m_x·m_w·K, as b1_wgmma.cu has it."""
    width, factors, planes = 45, [], []
    for b, rows in zip(bits, (6, 5), strict=True):
        codes = torch.randint(-(2 ** (b - 1)), 2 ** (b - 1), (rows, width), dtype=torch.int8)
        factors.append(integer_form(UniformGrid(b)).of_codes(codes))
        planes.append(planes_of(pack(codes, b), b, width))
    sums = [plane_sums(p, width) for p in planes]
    m_x, m_w = (2**b - 1 for b in bits)
    total = torch.zeros(6, 5, dtype=torch.int32)
    for i, x in enumerate(planes[0]):
        for j, w in enumerate(planes[1]):
            ones = [unpack(p.contiguous(), 1, width) + 1 for p in (x, w)]
            total += integer_product(*ones) << (i + j)
    made = 4 * total - m_w * sums[0].unsqueeze(1) - m_x * sums[1] - m_x * m_w * width
    assert torch.equal(made, integer_product(*factors))

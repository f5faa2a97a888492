import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquest.errors import FormatError
from bitquest.numerics import pack, packed_width, unpack


@settings(deadline=None, max_examples=150)
@given(st.integers(1, 8), st.integers(0, 70), st.integers(0, 5), st.integers(0, 2**31))
def test_round_trip_and_bit_order(bits: int, length: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (rows, length), generator=generator).to(torch.int8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_width(length, bits))
    assert torch.equal(unpack(packed, bits, length), codes)
    for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
        number = sum((c + half) << (k * bits) for k, c in enumerate(row))
        assert bytes(stored) == number.to_bytes(len(stored), "little")


def test_large_matrices_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(-4, 4, (50, 33)).to(torch.int8)
    whole = pack(codes, 3)
    monkeypatch.setattr("bitquest.numerics.packing._ROWS_AT_ONCE", 100)
    assert torch.equal(pack(codes, 3), whole)
    assert torch.equal(unpack(whole, 3, 33), codes)


def test_more_dimensions() -> None:
    codes = torch.randint(-2, 2, (2, 3, 9)).to(torch.int8)
    assert torch.equal(unpack(pack(codes, 2), 2, 9), codes)


def test_refusals() -> None:
    with pytest.raises(FormatError, match="do not fit 2 bits"):
        pack(torch.tensor([[2]], dtype=torch.int8), 2)
    with pytest.raises(FormatError, match="take 2 bytes a row, not 3"):
        unpack(torch.zeros(1, 3, dtype=torch.uint8), 3, 5)
    with pytest.raises(FormatError, match="spare bits"):
        unpack(torch.full((1, 2), 255, dtype=torch.uint8), 3, 5)
    for bits in (0, 9):
        with pytest.raises(FormatError, match="1 to 8 bits"):
            pack(torch.zeros(1, 4, dtype=torch.int8), bits)
        with pytest.raises(FormatError, match="1 to 8 bits"):
            unpack(torch.zeros(1, 4, dtype=torch.uint8), bits, 4)
    with pytest.raises(FormatError, match=r"torch\.int8, not torch\.float32"):
        pack(torch.zeros(1, 4), 4)
    with pytest.raises(FormatError, match=r"torch\.uint8, not torch\.int8"):
        unpack(torch.zeros(1, 2, dtype=torch.int8), 4, 4)

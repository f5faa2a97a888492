"""Sparse weights for the sparse tensor cores: layout and launcher everywhere, values on a Hopper GPU (`-m gpu`)."""

import pytest
import torch

from bitquest.errors import ConfigError
from bitquest.numerics.grids import UniformGrid
from bitquest.numerics.integers import IntegerForm, integer_form, integer_linear
from bitquest.numerics.sparsity import NofM
from bitquest.ops.cuda import sparse
from bitquest.ops.cuda.hopper import OUTPUTS, SHARED_BYTES, refuses
from bitquest.ops.cuda.sparse import SparseWeight, arrange_activation, pair_order, prepare_sparse_weight

FOURS, PAIRS, ONE_OF_FOUR = NofM(2, 4), NofM(2, 4, pair=True), NofM(1, 4)


def weight_of(pattern: NofM, rows: int, width: int, device: str = "cpu"):
    """Random odd integers of 4 bits, which of them are kept, and the two prepared."""
    factors = 2 * torch.randint(-8, 8, (rows, width), dtype=torch.int8, device=device) + 1
    kept = pattern.kept(torch.randn(rows, width, device=device))
    return factors, kept, prepare_sparse_weight(factors, kept, pattern.pair)


def expand(weight: SparseWeight) -> torch.Tensor:
    """The dense int8 (N, K), in the weight's order, read as the instruction reads it: one register at a time."""
    rows, half = weight.values.shape
    dense = torch.zeros(-(-rows // 64) * 64, -(-2 * half // 128) * 128, dtype=torch.int8)
    values = torch.nn.functional.pad(
        weight.values, (0, dense.shape[1] // 2 - half, 0, dense.shape[0] - rows)
    )  # what lies outside arrives as zeros
    for (block, step, part, thread), word in zip(
        torch.cartesian_prod(*(torch.arange(size) for size in weight.places.shape)).tolist(),
        weight.places.reshape(-1).tolist(),
        strict=True,
    ):
        warp, lane = divmod(thread, 32)
        row = 64 * block + 16 * warp + lane // 4 + 8 * (lane % 2)
        first = 128 * step + 64 * part + 32 * (lane % 4 // 2)  # of 32 places along K
        for four in range(8):
            nibble = word >> 4 * four & 15
            places = nibble & 3, nibble >> 2
            assert places[0] < places[1], "invalid to the hardware"
            for i in range(2):
                dense[row, first + 4 * four + places[i]] = values[row, first // 2 + 2 * four + i]
    return dense[:rows, : 2 * half]


@pytest.mark.parametrize("pattern", [FOURS, PAIRS, ONE_OF_FOUR], ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 8), (65, 136), (64, 128), (130, 264)])
def test_a_prepared_weight_is_the_weight(pattern, rows, width):
    factors, kept, weight = weight_of(pattern, rows, width)
    assert torch.equal(expand(weight), arrange_activation(factors * kept, pattern.pair))
    assert torch.equal(weight.sums, (factors * kept).sum(1, dtype=torch.int32))
    assert weight.values.stride(0) % 16 == 0


def test_evens_come_before_odds_in_groups_of_eight():
    assert pair_order(16).tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    x = torch.randint(-128, 128, (3, 24), dtype=torch.int8)
    assert torch.equal(arrange_activation(x, pair=True), x[:, pair_order(24)])
    assert arrange_activation(x, pair=False) is x


def test_refuses_what_is_not_sparse_enough_or_has_no_zero():
    factors, kept, weight = weight_of(PAIRS, 4, 16)
    with pytest.raises(ConfigError, match=r"two of every four elements, not [34]"):
        prepare_sparse_weight(factors, torch.ones_like(kept), False)
    with pytest.raises(ConfigError, match=r"two of every four elements of a parity, not [34]"):
        prepare_sparse_weight(factors, torch.ones_like(kept), True)
    with pytest.raises(ConfigError, match="multiple of 8"):
        prepare_sparse_weight(factors[:, :12], kept[:, :12], True)
    step, eight, four = torch.ones(4, 1), integer_form(UniformGrid(8)), integer_form(UniformGrid(4))
    with pytest.raises(ConfigError, match="no integer for a dropped element"):
        sparse.sparse_linear(factors, step, weight, step, four, eight, out_dtype=torch.float32)
    with pytest.raises(ConfigError, match="need a CUDA device, not cpu"):
        sparse.sparse_linear(factors, step, weight, step, eight, four, out_dtype=torch.float32)
    with pytest.raises(ConfigError, match=r"int8 \(T, 16\)"):
        sparse.sparse_product(factors[:, :8], weight)


def test_every_tile_fits_and_covers():
    for tile in sparse.TILES:
        for tokens, channels in ((1, 1), (8192, 8192), (4097, 28672)):
            made = sparse.sparse_plan(tokens, channels, 4096, True, OUTPUTS[torch.bfloat16], tile, multiprocessors=132)
            assert made.shared_bytes <= SHARED_BYTES
            assert made.tile_rows * tile.rows * tile.cluster >= channels
            assert made.tile_columns * tile.columns >= tokens
            assert 0 < made.grid <= 132
            assert made.grid % tile.cluster == 0
    assert sparse.choose_sparse_tile(8192, 8192, 132) == sparse.TILES[0]


SHAPES = ((1, 1, 8), (127, 200, 128), (129, 513, 1032), (300, 1001, 4104), (2048, 4096, 4096))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("pattern", [FOURS, PAIRS, ONE_OF_FOUR], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_exact_on_the_device(shape, pattern, bits):
    reason = refuses(torch.device("cuda"))
    if reason:
        pytest.skip(reason)
    tokens, channels, width = shape
    torch.manual_seed(width)
    factors, kept, weight = weight_of(pattern, channels, width, device="cuda")
    x_form, w_form = integer_form(UniformGrid(bits)), integer_form(UniformGrid(4))
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (tokens, width), dtype=torch.int8, device="cuda")
    x_a = x_form.of_codes(codes)
    x_step, w_step, bias = (torch.randn(n, device="cuda") for n in (tokens, channels, channels))
    scaled = integer_linear(x_a, x_step.unsqueeze(1), factors * kept, w_step.unsqueeze(1), x_form, w_form) + bias
    x_arranged = arrange_activation(x_a, pattern.pair)
    exact = (x_a.double() @ (factors * kept).double().t()).to(torch.int32)
    for tile in sparse.TILES:
        made = launch(x_arranged, None, weight, None, IntegerForm(1.0, 1, 0, 8), None, torch.int32, tile)
        assert torch.equal(made, exact), tile
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            made = launch(x_arranged, x_step, weight, w_step, x_form, bias, dtype, tile)
            assert torch.equal(made, scaled.to(dtype)), (tile, dtype)


def launch(x_a, x_step, weight, w_step, x_form, bias, dtype, tile):
    unit = 1.0 if x_step is None else x_form.unit * 0.5
    return sparse._launch(x_a, x_step, weight, w_step, unit, x_form.offset == 1, bias, dtype, tile)

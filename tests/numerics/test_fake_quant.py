"""The whole table of grids × granularities × scales × rotations × estimators × sparsity against a float64 reference."""

import itertools
import json

import pytest
import reference
import torch

import bitquest as bq
from bitquest.numerics import (
    ALL_ESTIMATORS,
    ALL_GRANULARITIES,
    ALL_GRIDS,
    ALL_ROTATIONS,
    ALL_SCALE_RULES,
    ALL_SPARSITIES,
    BlockHadamard,
    Learned,
    NoRotation,
    PowerOfTwo,
    Quantizer,
    TwoLevel,
    UniformGrid,
    dequantize,
    encode,
    fake_quantize,
)
from bitquest.numerics.rotations import hadamard

ROWS, WIDTH = 3, 128


def _table(grid: object) -> list[Quantizer]:
    combinations = itertools.product([grid], ALL_GRANULARITIES, ALL_SCALE_RULES, ALL_ESTIMATORS, ALL_SPARSITIES)
    return [Quantizer(*parts) for parts in combinations if reference.is_legal(parts)]


def _operand(seed: int, dtype: torch.dtype, width: int = WIDTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, width, generator=generator) * torch.tensor([[1.0], [3.0], [0.2]])
    x[0, width // 2] = 20.0  # an outlier
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rotation", ALL_ROTATIONS, ids=str)
@pytest.mark.parametrize("grid", ALL_GRIDS, ids=str)
def test_whole_table_forward_and_backward(grid: object, rotation: object, dtype: torch.dtype) -> None:
    tolerance = {"rtol": 2e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
    masked = 0
    # A share of the combinations, more in float32 with the default rotation: primes, which meet every value.
    table = _table(grid)[:: 5 if dtype == torch.float32 and rotation == BlockHadamard() else 61]
    for number, quantizer in enumerate(table):
        x = _operand(number, dtype).requires_grad_()
        y = fake_quantize(x, quantizer, rotation)  # type: ignore[arg-type]
        gradient = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(9)).to(dtype)
        y.backward(gradient)
        values, mask, doubtful, delta = reference.forward(x.detach(), quantizer, rotation)  # type: ignore[arg-type]
        sure = ~doubtful
        scale = delta * quantizer.grid.max_level
        error = ((y.detach().double() - values).abs() / scale)[sure]
        assert float(error.max()) <= tolerance["rtol"], quantizer
        # The mask is seen through the gradient: rotate it back and compare where the decision was clear.
        seen = x.grad.double() @ reference.dense_rotation(rotation, WIDTH)  # type: ignore[arg-type,union-attr]
        expected = gradient.double() * mask
        error = (seen - expected).abs()[sure]
        limit = 1e-5 if dtype == torch.float32 else 0.05
        assert float(error.max()) <= limit, quantizer
        # Values with few digits over a power of two, and their largest over another, lie on thresholds.
        assert int(doubtful.sum()) < (200 if isinstance(quantizer.scale, PowerOfTwo | TwoLevel) else 60)
        masked += int((~mask).sum())
        codes, step, kept = encode(x.detach(), quantizer, rotation)  # type: ignore[arg-type]
        decoded = dequantize(codes, step, quantizer.grid, kept).to(dtype)
        assert torch.equal(decoded, y.detach()), quantizer
    assert masked > 0


@pytest.mark.parametrize("grid", ALL_GRIDS, ids=str)
@pytest.mark.parametrize("granularity", ALL_GRANULARITIES, ids=str)
def test_idempotent_at_fixed_scale(grid: object, granularity: object) -> None:
    quantizer = Quantizer(grid, granularity)  # type: ignore[arg-type]
    codes, step, _ = encode(_operand(1, torch.float32), quantizer, NoRotation())
    values = dequantize(codes, step, quantizer.grid)
    again = encode(values, quantizer, NoRotation(), step)
    assert torch.equal(again.codes, codes)
    assert torch.equal(dequantize(again.codes, step, quantizer.grid), values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_values_are_odd_multiples_of_half_a_step(bits: int) -> None:
    """METHOD: x_q = (Δ/2)(2c + 1), c in [−2^(b−1), 2^(b−1) − 1], from −s to s."""
    quantizer = Quantizer(UniformGrid(bits))
    x = _operand(2, torch.float32)
    codes, step, _ = encode(x, quantizer, BlockHadamard())
    assert int(codes.min()) >= -(2 ** (bits - 1))
    assert int(codes.max()) <= 2 ** (bits - 1) - 1
    odd = (2 * codes.int() + 1).float()
    assert torch.equal(fake_quantize(x, quantizer, BlockHadamard()), odd / 2 * step)


def test_one_bit_sends_zero_down() -> None:
    x, quantizer = torch.tensor([[0.0, -0.0, 1e-30, -1e-30]]), Quantizer(UniformGrid(1))
    codes, step = bq.quantize(x, quantizer, NoRotation())
    assert codes.tolist() == [[-1, -1, 0, -1]]
    s = step / 2
    assert torch.equal(fake_quantize(x, quantizer, NoRotation()), torch.cat([-s, -s, s, -s], 1))


def test_halves_round_to_even() -> None:
    step = torch.ones(1, 1)
    x = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 2.0]])
    codes = encode(x, Quantizer(UniformGrid(3)), NoRotation(), step).codes
    assert codes.tolist() == [[-3, -1, -1, 1, 1]]  # round(−1.5) − 1, round(−0.5) − 1, round(0.5) − 1, …
    assert torch.equal(fake_quantize(x, Quantizer(UniformGrid(3)), NoRotation(), step), codes + 0.5)


def test_a_row_of_zeros_has_a_step_and_no_nan() -> None:
    x = torch.zeros(2, 64, requires_grad=True)
    for grid in ALL_GRIDS:
        y = fake_quantize(x, Quantizer(grid), BlockHadamard()).detach()
        assert bool(y.isfinite().all())
        assert float(y.abs().max()) <= 1e-7


@pytest.mark.parametrize("width", [288, 576, 36, 7, 1])
def test_odd_widths(width: int) -> None:
    quantizer = Quantizer(UniformGrid(4))
    x = _operand(3, torch.float32, width)[:, :width].requires_grad_()
    y = fake_quantize(x, quantizer, BlockHadamard())
    values, _, doubtful, delta = reference.forward(x.detach(), quantizer, BlockHadamard())
    assert float(((y.detach() - values).abs() / delta)[~doubtful].max()) < 1e-4


def test_higher_dimensions_are_rows() -> None:
    x = torch.randn(2, 3, 5, 64)
    for quantizer in (Quantizer(), Quantizer(granularity=bq.PerGroup(32))):
        flat = encode(x.reshape(-1, 64), quantizer, BlockHadamard())
        deep = encode(x, quantizer, BlockHadamard())
        assert torch.equal(deep.codes.reshape(-1, 64), flat.codes)
        assert torch.equal(deep.step.reshape(flat.step.shape), flat.step)


def test_masked_share_is_the_gaussian_expectation() -> None:
    """METHOD: 2·Φ(−α_b(1 + 1/(2^b − 1))) of Gaussian values are clipped."""
    x = torch.randn(300, 4096, generator=torch.Generator().manual_seed(4)).requires_grad_()
    for bits in (2, 3, 4):
        grid = UniformGrid(bits)
        (gradient,) = torch.autograd.grad(fake_quantize(x, Quantizer(grid), NoRotation()).sum(), x)
        limit = torch.tensor(grid.clip_multiplier * (1 + 1 / (2**bits - 1)))
        expected = float(torch.special.erfc(limit / 2**0.5))
        assert float((gradient == 0).float().mean()) == pytest.approx(expected, rel=0.06)


def test_most_zeroed_weights_are_masked_under_sparsity() -> None:
    """METHOD: about 80 % of the zeroed ones at 4 bits."""
    x = torch.randn(500, 128, generator=torch.Generator().manual_seed(5)).requires_grad_()
    quantizer = Quantizer(UniformGrid(4), sparsity=bq.NofM(2, 4))
    kept = encode(x.detach(), quantizer, NoRotation()).kept
    (gradient,) = torch.autograd.grad(fake_quantize(x, quantizer, NoRotation()).sum(), x)
    assert kept is not None
    assert float((gradient[~kept] == 0).float().mean()) == pytest.approx(0.8, abs=0.12)


@pytest.mark.parametrize("granularity", ALL_GRANULARITIES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_gradient_of_a_learned_step(bits: int, granularity: object) -> None:
    """LSQ: Σ G(x_q − x_h M)/Δ, over √(elements · largest level)."""
    quantizer = Quantizer(UniformGrid(bits), granularity, Learned(), bq.Clip(1.0))  # type: ignore[arg-type]
    x = _operand(6, torch.float32)
    step = (encode(x, quantizer, BlockHadamard()).step * 1.1).requires_grad_()
    gradient = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(7))
    fake_quantize(x, quantizer, BlockHadamard(), step).backward(gradient)
    x_h = x.double() @ reference.dense_rotation(BlockHadamard(), WIDTH)
    repeat = ROWS * WIDTH // step.numel()
    delta = step.detach().double().reshape(-1, 1).expand(-1, repeat).reshape(ROWS, WIDTH)
    t = x_h / delta
    half = 2 ** (bits - 1)
    q = (torch.round(t + 0.5) - 1).clamp(-half, half - 1) + 0.5
    mask = t.abs() <= quantizer.grid.max_level
    expected = (gradient.double() * (q - t * mask)).reshape(-1, repeat).sum(1) / (
        repeat * quantizer.grid.max_level
    ) ** 0.5
    assert torch.allclose(step.grad.double().flatten(), expected, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


def test_what_sparsity_keeps() -> None:
    """The largest, of equals the earlier; pairs by their L2 norm."""
    x = torch.tensor([[1.0, -1.0, 1.0, 1.0, 0.0, 2.0, -3.0, 2.0]])
    assert bq.NofM(2, 4).kept(x).int().tolist() == [[1, 1, 0, 0, 0, 1, 1, 0]]
    pairs = torch.tensor([[3.0, 0.0, 2.0, 2.0, 0.0, -4.0, 1.0, 1.0]])
    assert bq.NofM(2, 4, pair=True).kept(pairs).int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0]]
    assert bq.NofM(2, 4, pair=True).kept(torch.ones(1, 8)).int().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]


def test_a_kept_value_on_a_threshold_is_trusted() -> None:
    """Rounding alone puts it a hair more than half a step from its level; METHOD masks no interior value for that."""
    below_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    for sparsity in (bq.Dense(), bq.NofM(2, 4)):
        x = torch.stack([below_one, torch.tensor(3.0), torch.tensor(0.6), torch.tensor(0.4)]).view(1, 4)
        x.requires_grad_()
        y = fake_quantize(x, Quantizer(UniformGrid(4), sparsity=sparsity), NoRotation(), torch.ones(1, 1))
        assert float(y.detach()[0, 0] - x.detach()[0, 0]) > 0.5
        y.sum().backward()
        assert x.grad is not None
        dropped = [1.0, 1.0] if sparsity == bq.Dense() else [0.0, 1.0]  # |x| ≤ Δ/2 decides
        assert x.grad.tolist() == [[1.0, 1.0, *dropped]]


def test_a_vector_is_a_row() -> None:
    x, step = torch.randn(64, requires_grad=True), torch.ones(1, requires_grad=True)
    for granularity in (bq.PerTensor(), bq.PerRow()):
        fake_quantize(x, Quantizer(granularity=granularity, scale=Learned()), BlockHadamard(), step).sum().backward()
    assert step.grad is not None


@pytest.mark.parametrize("rotation", ALL_ROTATIONS, ids=str)
@pytest.mark.parametrize("grid", [UniformGrid(4), bq.FP4], ids=str)
def test_layout_in_memory_does_not_matter(grid: object, rotation: object) -> None:
    quantizer = Quantizer(grid)  # type: ignore[arg-type]
    x = torch.randn(64, 6)
    for view in (
        x.t(),
        torch.randn(3, 128)[:, ::2],
        torch.randn(64).expand(3, 64),
        torch.randn(3, 2, 64).transpose(0, 1),
    ):
        y = fake_quantize(view, quantizer, rotation)  # type: ignore[arg-type]
        assert y.is_contiguous()
        assert torch.equal(y, fake_quantize(view.contiguous(), quantizer, rotation))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(dtype: torch.dtype) -> None:
    """Loaders change it while they build a model."""
    x = torch.randn(3, 64)
    quantizers = [Quantizer(grid) for grid in (*ALL_GRIDS, bq.CodebookGrid("odd", (-1.0, -0.333, 0.4, 1.0)))]

    def results() -> list[torch.Tensor]:
        hadamard.cache_clear()
        made = []
        for quantizer in quantizers:
            codes, step, _ = encode(x, quantizer, BlockHadamard())
            made += [fake_quantize(x, quantizer, BlockHadamard()), codes, step, dequantize(codes, step, quantizer.grid)]
        return made

    expected = results()
    torch.set_default_dtype(dtype)
    try:
        got = results()
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(expected, got, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_what_is_not_finite_stays_visible(bits: int) -> None:
    """A row with NaN or infinity, or too large for σ in float32, becomes non-finite; the other rows are as before."""
    x = torch.randn(5, 64)
    x[1, 3], x[2, 5], x[3] = torch.nan, torch.inf, 1e30
    quantizer = Quantizer(UniformGrid(bits))
    for rotation in (NoRotation(), BlockHadamard()):
        y = fake_quantize(x, quantizer, rotation)
        assert y[[1, 2, 3]].isfinite().all(-1).tolist() == [False, False, False]
        assert torch.equal(y[[0, 4]], fake_quantize(x[[0, 4]], quantizer, rotation))
        step = encode(x, quantizer, rotation).step
        assert step.isfinite().flatten().tolist() == [True, False, False, False, True]


def test_sparse_quantize_points_to_encode() -> None:
    with pytest.raises(ValueError, match="encode"):
        bq.quantize(torch.randn(2, 64), Quantizer(sparsity=bq.NofM(2, 4)), NoRotation())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniformGrid(0), "1 to 8"),
        (lambda: UniformGrid(9), "1 to 8"),
        (lambda: UniformGrid(True), "1 to 8"),
        (lambda: bq.CodebookGrid("x", (1.0,)), "2 to 256"),
        (lambda: bq.CodebookGrid("x", (1.0, 1.0)), "increase"),
        (lambda: bq.CodebookGrid("x", (0.0, float("nan"))), "finite"),
        (lambda: bq.CodebookGrid("x", (-2.0, -1.0)), "positive"),
        (lambda: bq.PerGroup(48), "16, 32, 64 or 128"),
        (lambda: bq.Clip(0), "positive"),
        (lambda: bq.Trust(float("inf")), "positive"),
        (lambda: bq.NofM(4, 4), "n < m"),
        (lambda: bq.NofM(True, 4), "n < m"),
        (lambda: bq.PerGroup(32.0), "16, 32, 64 or 128"),  # type: ignore[arg-type]
        (lambda: bq.CodebookGrid("x", (1.0, 10**400)), "too large"),
        (lambda: bq.CodebookGrid("x", (True, 2.0)), "numbers"),
        (lambda: bq.Clip(10**400), "positive finite"),
        (lambda: fake_quantize(torch.arange(64), Quantizer(), NoRotation()), "floating-point"),
        (lambda: BlockHadamard(96), "power of two"),
        (lambda: BlockHadamard(64).resolve(96), "does not fit width 96"),
        (lambda: Quantizer(UniformGrid(2), scale=bq.AbsMean()), "AbsMean"),
        (lambda: encode(torch.randn(2, 48), Quantizer(granularity=bq.PerGroup(32)), NoRotation()), "width 48"),
        (lambda: encode(torch.randn(2, 6), Quantizer(sparsity=bq.NofM(2, 4)), NoRotation()), "width 6"),
        (lambda: Quantizer.from_json({"grid": 1}), "keys"),
        (lambda: BlockHadamard().block, "resolve"),
    ],
)
def test_refusals_say_why(make: object, message: str) -> None:
    with pytest.raises(bq.errors.ConfigError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("grid", ALL_GRIDS, ids=str)
def test_json_round_trip(grid: object) -> None:
    for quantizer in _table(grid)[::3]:
        assert Quantizer.from_json(json.loads(json.dumps(quantizer.to_json()))) == quantizer

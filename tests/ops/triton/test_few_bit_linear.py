"""The few-bit kernels against numerics.integers: integers exactly, random steps to float rounding, any shape."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.grids import FP4, TERNARY, CodebookGrid, Grid, UniformGrid
from bitquest.numerics.integers import IntegerForm, integer_form, integer_linear
from bitquest.numerics.integers import weight_only_linear as weight_only_reference
from bitquest.numerics.packing import pack

pytest.importorskip("triton")

from bitquest.ops.triton import few_bit_linear
from bitquest.ops.triton.few_bit_linear import a8_linear, b1_vector, packed_sums, weight_only_linear
from bitquest.ops.triton.tuning import Config

LOPSIDED = CodebookGrid("lopsided", (-1.0, -0.25, 0.5, 2.0))
FEW_GRIDS = (UniformGrid(1), UniformGrid(4), TERNARY, FP4)
GRIDS: tuple[Grid, ...] = (*(UniformGrid(bits) for bits in (1, 2, 4, 8)), TERNARY, FP4, LOPSIDED)
SHAPES = ((1, 3, 5), (2, 33, 136), (3, 16, 257), (5, 9, 96), (9, 17, 300))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks each way in small shapes, which also keeps the interpreter short; the GPU takes the defaults."""
    if "cuda" in request.node.name:
        return

    def few(tokens: int, columns: int, channels: int, row_bytes: int, x_bytes: int) -> tuple[Config, ...]:
        return (Config(columns, 16, 128, warps=8, stages=1 + tokens % 2),)

    def batch(tokens: int, channels: int, row_bytes: int, bits: int, digits: int, group: int) -> tuple[Config, ...]:
        return (Config(8, 16, group or 32),)

    monkeypatch.setattr(few_bit_linear, "few_candidates", few)
    monkeypatch.setattr(few_bit_linear, "batch_candidates", batch)


def form_of(grid: Grid) -> IntegerForm:
    form = integer_form(grid)
    assert form is not None
    return form


@dataclass
class Operand:
    """Rows of random codes of a grid with steps of `groups` parts: powers of two, or any positive numbers."""

    factors: Tensor
    packed: Tensor
    step: Tensor
    form: IntegerForm
    grid: Grid

    def sums(self, groups: int) -> Tensor:
        return self.factors.unflatten(-1, (groups, -1)).sum(-1, dtype=torch.int32)


def operand(grid: Grid, rows: int, width: int, groups: int = 1, seed: int = 0, exact: bool = True) -> Operand:
    generator = torch.Generator().manual_seed(seed)
    half = 2 ** (grid.bits - 1)
    codes = torch.randint(-half, len(grid.levels) - half, (rows, width), generator=generator).to(torch.int8)
    step = torch.rand(rows, groups, generator=generator) + 0.25
    if exact:
        step = torch.exp2(torch.randint(-2, 2, (rows, groups), generator=generator).float())
    return Operand(form_of(grid).of_codes(codes), pack(codes, grid.bits), step, form_of(grid), grid)


def run_a8(x: Operand, w: Operand, device: torch.device, out_dtype: torch.dtype = torch.float32, **kwargs) -> Tensor:
    sums = kwargs.pop("x_sums", x.sums(max(x.step.shape[1], w.step.shape[1])))
    arguments = (x.factors, x.step, sums, w.packed, w.step)
    there = [a if a is None else a.to(device) for a in arguments]
    return a8_linear(*there, x.form, w.grid, out_dtype=out_dtype, **kwargs).cpu()


def reference_a8(x: Operand, w: Operand) -> Tensor:
    return integer_linear(x.factors, x.step, w.factors, w.step, x.form, w.form)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_integers_are_exact(grid: Grid, shape: tuple[int, int, int], device: torch.device) -> None:
    tokens, channels, width = shape
    x = operand(UniformGrid(8), tokens, width, seed=1)
    w = operand(grid, channels, width, seed=2)
    assert torch.equal(run_a8(x, w, device), reference_a8(x, w))


@pytest.mark.parametrize("x_grid", [UniformGrid(1), UniformGrid(7), TERNARY, FP4], ids=str)
@pytest.mark.parametrize("tokens", [1, 6])
def test_activations_of_any_grid_with_integers(x_grid: Grid, tokens: int, device: torch.device) -> None:
    x, w = operand(x_grid, tokens, 160, seed=3), operand(UniformGrid(2), 9, 160, seed=4)
    assert torch.equal(run_a8(x, w, device), reference_a8(x, w))


@pytest.mark.parametrize(("tokens", "x_groups", "size"), [(1, 2, 32), (1, 1, 128), (7, 1, 64)])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_integers_of_groups_are_exact(grid: Grid, tokens: int, x_groups: int, size: int, device: torch.device) -> None:
    width = 256
    x = operand(UniformGrid(8), tokens, width, width // size if x_groups > 1 else 1, seed=5)
    w = operand(grid, 18, width, width // size, seed=6)
    assert torch.equal(run_a8(x, w, device), reference_a8(x, w))


def test_groups_of_activations_alone_and_finer_groups_of_one_side(device: torch.device) -> None:
    x, w = operand(UniformGrid(4), 2, 256, 8, seed=7), operand(UniformGrid(4), 9, 256, 1, seed=8)
    assert torch.equal(run_a8(x, w, device), reference_a8(x, w))
    w = operand(UniformGrid(1), 9, 256, 2, seed=8)
    assert torch.equal(run_a8(x, w, device), reference_a8(x, w))


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_random_steps_of_rows_give_the_same_float(bits: int, tokens: int, device: torch.device) -> None:
    x = operand(UniformGrid(8), tokens, 264, seed=9, exact=False)
    w = operand(UniformGrid(bits), 19, 264, seed=10, exact=False)
    assert torch.equal(run_a8(x, w, device), reference_a8(x, w))  # one rounding, two products, in the same order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [2, 5])
def test_bias_types_and_a_step_for_all(tokens: int, dtype: torch.dtype, device: torch.device) -> None:
    x = operand(UniformGrid(8), tokens, 72, seed=11, exact=False)
    w = operand(UniformGrid(4), 21, 72, seed=12)
    w.step = torch.tensor([[0.3]])
    bias = torch.linspace(-3, 3, 21).to(dtype)
    expected = reference_a8(x, w) + bias.float()
    made = run_a8(x, w, device, dtype, bias=bias.to(device))
    if dtype == torch.bfloat16 and device.type == "cpu":  # the interpreter cuts bfloat16 off instead of rounding
        assert ((made.float() - expected).abs() <= expected.abs() * 2.0**-7).all()
    else:
        assert torch.equal(made, expected.to(dtype))


def test_sums_of_packed_weights(device: torch.device) -> None:
    for grid in GRIDS:
        for width, groups in ((77, 1), (384, 12), (256, 2)):
            w = operand(grid, 34 if width == 77 else 3, width, seed=13)
            assert torch.equal(packed_sums(w.packed.to(device), width, grid, groups).cpu(), w.sums(groups))


def test_given_sums_are_used(device: torch.device) -> None:
    x, w = operand(UniformGrid(8), 1, 64, seed=14), operand(UniformGrid(2), 8, 64, seed=15)
    plain = run_a8(x, w, device)
    assert torch.equal(run_a8(x, w, device, w_sums=w.sums(1).to(device)), plain)
    assert torch.equal(run_a8(x, w, device, x_sums=None), plain)
    assert not torch.equal(run_a8(x, w, device, w_sums=w.sums(1).to(device) + 1), plain)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_shared_rows_give_the_same_bits(
    tokens: int, groups: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs that share a row add up to what one program gives, and twice the same."""
    x, w = operand(UniformGrid(8), tokens, 512, seed=16), operand(UniformGrid(4), 12, 512, groups, seed=17)
    h = torch.randn(tokens, 512, generator=torch.Generator().manual_seed(18)).to(device)
    packed, step = w.packed.to(device), w.step.to(device)
    results = []
    for split in (1, 3, 3):
        few = (Config(1, 16, 64, warps=8, split=split),)
        batch = (Config(8, 16, 64, split=split),)
        monkeypatch.setattr(few_bit_linear, "few_candidates", lambda *a, few=few: few)
        monkeypatch.setattr(few_bit_linear, "batch_candidates", lambda *a, batch=batch: batch)
        results.append(run_a8(x, w, device))
        floats = weight_only_linear(h, packed, step, w.grid, out_dtype=torch.float32).cpu()
        results.append(floats)
    assert all(torch.equal(made, reference_a8(x, w)) for made in results[::2])
    assert torch.equal(results[3], results[5])
    if groups == 1:
        assert torch.equal(results[1], results[3])  # integers, however they are added
    torch.testing.assert_close(results[3], results[1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("dtype", "shape"), list(zip(DTYPES, SHAPES, strict=True)))
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_weight_only(grid: Grid, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Within half a last digit of the row's largest value for each element, and one rounding of the sum."""
    tokens, channels, width = shape
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(19)).to(dtype)
    w = operand(grid, channels, width, seed=20, exact=False)
    made = weight_only_linear(x.to(device), w.packed.to(device), w.step.to(device), grid, out_dtype=torch.float32).cpu()
    exact = _exact(x, w)
    size = x.double().abs().amax(1, keepdim=True) * w.step.double().t() * w.form.unit * w.form.largest
    assert ((made.double() - exact).abs() <= width * size * 2.0**-22 + exact.abs() * 2.0**-22).all()
    reference = weight_only_reference(x.float(), w.factors, w.step, w.form)
    torch.testing.assert_close(made, reference, rtol=1e-5, atol=width * float(size.max()) * 2.0**-21)


def _exact(x: Tensor, w: Operand) -> Tensor:
    levels = (w.factors.double() * w.form.factor + w.form.offset) * w.form.unit
    groups = w.step.shape[1]
    return x.double() @ (levels.unflatten(-1, (groups, -1)) * w.step.double().unsqueeze(-1)).flatten(1).t()


@pytest.mark.parametrize(("tokens", "size"), [(1, 32), (2, 128), (3, 64)])
@pytest.mark.parametrize("grid", FEW_GRIDS, ids=str)
def test_weight_only_with_groups(grid: Grid, size: int, tokens: int, device: torch.device) -> None:
    x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(21))
    w = operand(grid, 18, 256, 256 // size, seed=22, exact=False)
    bias = torch.linspace(-1, 1, 18)
    made = weight_only_linear(
        x.to(device), w.packed.to(device), w.step.to(device), grid, bias=bias.to(device), out_dtype=torch.float32
    ).cpu()
    torch.testing.assert_close(made.double(), _exact(x, w) + bias, rtol=1e-5, atol=2e-5 * w.form.largest * w.form.unit)


def test_integers_as_floats_are_exact(device: torch.device) -> None:
    for tokens in (1, 4):
        x = torch.randint(-100, 101, (tokens, 200), generator=torch.Generator().manual_seed(23)).float()
        w = operand(UniformGrid(4), 11, 200, seed=24)
        made = weight_only_linear(x.to(device), w.packed.to(device), w.step.to(device), w.grid, out_dtype=torch.float32)
        assert torch.equal(made.cpu(), weight_only_reference(x, w.factors, w.step, w.form))


def test_rows_of_zeros_of_extremes_and_of_no_numbers(device: torch.device) -> None:
    w = operand(UniformGrid(2), 6, 64, seed=25)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(26))
    x[0] = 0
    x[1] *= 1e-30
    x[2] *= 1e30
    x[3, 5] = float("inf")
    x[4, 6] = float("nan")
    x[5, 0] = 3000
    made = weight_only_linear(x.to(device), w.packed.to(device), w.step.to(device), w.grid, out_dtype=torch.float32)
    made = made.cpu()
    assert torch.equal(made[0], torch.zeros(6))
    assert made[3:5].isnan().all()
    exact = _exact(x, w)
    assert ((made - exact).abs()[[1, 2, 5]] <= 1e-6 * x.abs().amax(1)[[1, 2, 5]].unsqueeze(1) * 10).all()


@pytest.mark.parametrize("shape", [(1, 5, 12), (2, 33, 136), (3, 9, 257), (6, 20, 8), (1, 40, 2500)])
def test_one_bit_by_popcount(shape: tuple[int, int, int], device: torch.device) -> None:
    tokens, channels, width = shape
    x, w = operand(UniformGrid(1), tokens, width, seed=27), operand(UniformGrid(1), channels, width, seed=28)
    w.factors[0] = -x.factors[0]  # every bit differs: the largest count of a word
    w.packed = pack((w.factors - 1) // 2, 1)
    bias = torch.linspace(-2, 2, channels)
    there = [a.to(device) for a in (x.packed, x.step, w.packed, w.step)]
    made = b1_vector(*there, width, bias=bias.to(device), out_dtype=torch.float32).cpu()
    assert torch.equal(made, reference_a8(x, w) + bias)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_one_bit_with_groups(size: int, device: torch.device) -> None:
    x, w = operand(UniformGrid(1), 3, 384, 384 // size, seed=29), operand(UniformGrid(1), 9, 384, 1, seed=30)
    there = [a.to(device) for a in (x.packed, x.step, w.packed, w.step)]
    assert torch.equal(b1_vector(*there, 384, out_dtype=torch.float32).cpu(), reference_a8(x, w))


def test_nothing_is_written_behind_the_buffers(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, stores = torch.empty, []

    def guarded(*shape: int, **kwargs: object) -> Tensor:
        store = plain(torch.Size(shape).numel() + 512, **kwargs).fill_(77)
        stores.append((store, store.numel() - 512))
        return store[:-512].view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    bits, w = operand(UniformGrid(1), 5, 72, seed=33), operand(UniformGrid(1), 21, 72, seed=34)
    there = [a.to(device) for a in (bits.packed, bits.step, w.packed, w.step)]
    b1_vector(*there, 72, out_dtype=torch.float32)
    x = operand(UniformGrid(8), 7, 128, seed=35)
    for groups in (1, 4):
        w = operand(UniformGrid(1), 21, 128, groups, seed=36)
        run_a8(x, w, device)
        h = torch.ones(7, 128, device=device)
        weight_only_linear(h, w.packed.to(device), w.step.to(device), w.grid, out_dtype=torch.float32)
    assert len(stores) > 8
    assert all((store[length:] == 77).all() for store, length in stores)


def test_nothing_to_do(device: torch.device) -> None:
    for tokens, channels in ((0, 5), (3, 0)):
        x, w = operand(UniformGrid(1), tokens, 64), operand(UniformGrid(1), channels, 64)
        assert run_a8(x, w, device).shape == (tokens, channels)
        h = torch.zeros(tokens, 64, device=device)
        packed, step = w.packed.to(device), w.step.to(device)
        assert weight_only_linear(h, packed, step, w.grid, out_dtype=torch.float16).shape == (tokens, channels)
        bits = x.packed.to(device)
        assert b1_vector(bits, x.step.to(device), packed, step, 64, out_dtype=torch.float32).shape == (tokens, channels)


def test_rows_that_begin_anywhere(device: torch.device) -> None:
    """Packed weights that are part of a larger tensor, aligned to nothing."""
    x, w = operand(UniformGrid(8), 2, 64, seed=31), operand(UniformGrid(4), 7, 64, seed=32)
    expected = reference_a8(x, w)
    store = torch.zeros(7 * 32 + 1, dtype=torch.uint8)
    store[1:] = w.packed.flatten()
    w.packed = store.to(device)[1:].view(7, 32)
    assert torch.equal(run_a8(x, w, device), expected)

    w = operand(UniformGrid(8), 5, 64, seed=32)
    shifted = torch.zeros(2 * 64 + 3, dtype=torch.int8, device=device)[3:].view(2, 64)
    shifted.copy_(x.factors)
    there = [a.to(device) for a in (x.step, x.sums(1), w.packed, w.step)]
    made = a8_linear(shifted, *there, x.form, w.grid, out_dtype=torch.float32)
    assert torch.equal(made.cpu(), reference_a8(x, w))


def test_what_is_refused(device: torch.device) -> None:
    x = torch.zeros(1, 64, device=device)
    step = torch.ones(4, 1, device=device)
    packed = torch.zeros(4, 8, dtype=torch.uint8, device=device)
    f32 = torch.float32
    with pytest.raises(ConfigError, match="1, 2, 4 or 8 bits, not 3"):
        weight_only_linear(x, packed, step, UniformGrid(3), out_dtype=f32)
    with pytest.raises(ConfigError, match="no small multiples"):
        weight_only_linear(x, packed, step, CodebookGrid("odd", (-1.0, 0.3, 1.0, 2.0)), out_dtype=f32)
    wide_grid = CodebookGrid("wide", tuple(map(float, (*range(-100, 90), 100))))
    with pytest.raises(ConfigError, match="at most 16 levels"):
        weight_only_linear(x, packed, step, wide_grid, out_dtype=f32)
    with pytest.raises(ConfigError, match="take 16 bytes"):
        weight_only_linear(x, packed, step, UniformGrid(2), out_dtype=f32)
    with pytest.raises(ConfigError, match="not of 32, 64 or 128"):
        weight_only_linear(x, packed, step.expand(4, 4), UniformGrid(1), out_dtype=f32)
    with pytest.raises(ConfigError, match="float32, bfloat16 or float16"):
        weight_only_linear(x.double(), packed, step, UniformGrid(1), out_dtype=f32)
    with pytest.raises(ConfigError, match="must be int8"):
        a8_linear(x, step[:1], None, packed, step, form_of(UniformGrid(8)), UniformGrid(1), out_dtype=f32)
    wide = torch.zeros(1, 2**17, dtype=torch.int8, device=device)
    weights = torch.zeros(4, 2**14, dtype=torch.uint8, device=device)
    with pytest.raises(ConfigError, match="sum exactly"):
        a8_linear(wide, step[:1], None, weights, step, form_of(UniformGrid(8)), UniformGrid(1), out_dtype=f32)

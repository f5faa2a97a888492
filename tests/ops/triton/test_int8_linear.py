"""The s8 product against numerics/integers.py: exact integers, pairs of widths, groups, tails, bounds and limits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.grids import FP4, TERNARY, CodebookGrid, Grid, UniformGrid
from bitquest.numerics.integers import IntegerForm, integer_form, integer_linear, integer_product

pytest.importorskip("triton")
from bitquest.ops.triton import int8_linear as launchers
from bitquest.ops.triton.int8_linear import HAND_SCHEDULED, group_candidates, int8_linear, int8_product, row_candidates
from bitquest.ops.triton.tuning import Config

GRIDS = {
    **{f"{bits}": UniformGrid(bits) for bits in (2, 3, 4, 5, 6, 7, 8)},
    "ternary": TERNARY,
    "fp4": FP4,
    "wide": CodebookGrid("wide", (-127.0, -64.0, 3.0, 127.0)),
}
PAIRS = [("2", "2"), ("3", "3"), ("4", "4"), ("5", "5"), ("6", "6"), ("7", "7"), ("8", "8"), ("ternary", "ternary"),
         ("fp4", "fp4"), ("8", "2"), ("4", "8"), ("8", "ternary"), ("fp4", "8"), ("8", "wide")]  # fmt: skip
CONFIGS = {
    "pointers": Config(16, 32, 32),
    "descriptors": Config(32, 16, 32, descriptors=True),
    "one row of tiles a stripe": Config(16, 16, 64, group=1),
}


@pytest.fixture(autouse=True)
def _no_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITQUEST_TUNE", "0")


def _random(rows: int, width: int, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (rows, width), dtype=torch.int8, generator=generator).to(device)


def _codes(grid: Grid, rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shift = 2 ** (grid.bits - 1)
    return torch.randint(0, len(grid.levels), (rows, width), generator=generator).sub_(shift).to(torch.int8)


def _form(grid: Grid) -> IntegerForm:
    form = integer_form(grid)
    assert form is not None
    return form


def _operand(grid: Grid, rows: int, width: int, groups: int, seed: int) -> tuple[Tensor, Tensor, IntegerForm]:
    form = _form(grid)
    generator = torch.Generator().manual_seed(seed + 100)
    return form.of_codes(_codes(grid, rows, width, seed)), torch.rand(rows, groups, generator=generator) + 0.1, form


def _run(device: torch.device, x: Any, w: Any, **options: Any) -> Tensor:
    (x_a, x_step, x_form), (w_a, w_step, w_form) = x, w
    options = {name: v.to(device) if isinstance(v, Tensor) else v for name, v in options.items()}
    options.setdefault("out_dtype", torch.float32)
    operands = [a.to(device) for a in (x_a, x_step, w_a, w_step)]
    return int8_linear(*operands, x_form, w_form, **options).cpu()


def _reference(x: Any, w: Any) -> Tensor:
    return integer_linear(x[0], x[1], w[0], w[1], x[2], w[2])


def _close(y: Tensor, reference: Tensor) -> None:
    largest = reference.abs().max().item()
    torch.testing.assert_close(y, reference, rtol=1e-6, atol=2e-7 * largest)


# --- the integer product -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 33), (33, 70, 160), (17, 24, 50), (48, 16, 64)], ids=str)
def test_products_are_exact(shape: tuple[int, int, int], config: Config, device: torch.device) -> None:
    tokens, channels, width = shape
    x_a, w_a = _random(tokens, width, device, 1), _random(channels, width, device, 2)
    y = int8_product(x_a, w_a, config=config)
    assert y.dtype == torch.int32
    assert torch.equal(y.cpu(), integer_product(x_a.cpu(), w_a.cpu()))


def test_the_default_configuration_is_exact(device: torch.device) -> None:
    x_a, w_a = _random(70, 200, device, 3), _random(41, 200, device, 4)
    assert torch.equal(int8_product(x_a, w_a).cpu(), integer_product(x_a.cpu(), w_a.cpu()))


@pytest.mark.parametrize("descriptors", [False, True])
def test_the_longest_and_largest_sums_fit(descriptors: bool, device: torch.device) -> None:
    width = 2**17 - 1
    x_a = torch.full((2, width), -128, dtype=torch.int8)
    x_a[1] = 127
    y = int8_product(x_a.to(device), x_a.to(device), config=Config(16, 16, 1024, stages=2, descriptors=descriptors))
    assert y.tolist() == [[16384 * width, -16256 * width], [-16256 * width, 16129 * width]]


@pytest.mark.parametrize(("tokens", "channels"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_do(tokens: int, channels: int, device: torch.device) -> None:
    for config in (None, *CONFIGS.values()):
        y = int8_product(_random(tokens, 32, device, 0), _random(channels, 32, device, 0), config=config)
        assert y.shape == (tokens, channels)
    x, w = (_operand(UniformGrid(8), rows, 32, 1, 0) for rows in (tokens, channels))
    assert _run(device, x, w).shape == (tokens, channels)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_views_are_read_inside_their_bounds(config: Config, device: torch.device) -> None:
    """Rows of a wider buffer, the rest of which is not zero, K no multiple of the block, and misaligned rows."""
    buffer = torch.full((40, 160), 77, dtype=torch.int8, device=device)
    inner = buffer[3:22, 16:96]
    inner.copy_(_random(19, 80, device, 5))
    w_a = _random(9, 80, device, 6)
    reference = integer_product(inner.cpu(), w_a.cpu())
    assert torch.equal(int8_product(inner, w_a, config=config).cpu(), reference)
    shifted = torch.full((40, 160), 77, dtype=torch.int8, device=device)[3:22, 5:85]
    shifted.copy_(inner)
    assert torch.equal(int8_product(shifted, w_a, config=config).cpu(), reference)
    assert torch.equal(int8_product(inner.t().contiguous().t(), w_a, config=config).cpu(), reference)
    every_other = torch.full((19, 160), 77, dtype=torch.int8, device=device)[:, ::2]
    every_other.copy_(inner)
    assert torch.equal(int8_product(every_other, w_a, config=config).cpu(), reference)


@pytest.mark.parametrize("groups", [1, 2])
def test_nothing_is_read_outside_the_inputs(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every address that the interpreter loads from lies in an operand, a step, a sum or the bias."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    loaded: list[tuple[int, int]] = []
    plain = interpreter._interpreter.load

    class Recording:
        store = staticmethod(interpreter._interpreter.store)

        @staticmethod
        def load(pointers: Any, mask: Any, other: Any, dtype: Any) -> Any:
            if mask.any():
                loaded.append((int(pointers[mask].min()), int(pointers[mask].max()) + dtype.itemsize))
            return plain(pointers, mask, other, dtype)

    monkeypatch.setattr(interpreter, "_interpreter", Recording)
    width = 96 if groups == 1 else 64 * groups  # a tail of K, or whole groups
    x, w = _operand(UniformGrid(8), 19, width, groups, 1), _operand(UniformGrid(8), 21, width, groups, 2)
    sums = [a.unflatten(1, (groups, -1)).sum(2, dtype=torch.int32) for a in (x[0], w[0])]
    bias = torch.ones(21)
    _run(torch.device("cpu"), x, w, x_sums=sums[0], w_sums=sums[1], bias=bias, config=Config(16, 16, 64))
    given = [x[0], x[1], w[0], w[1], *sums, bias]
    ranges = [(a.data_ptr(), a.data_ptr() + a.numel() * a.element_size()) for a in given]
    assert len(loaded) > len(given)
    assert all(any(low >= start and high <= end for start, end in ranges) for low, high in loaded)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("channels", [15, 16])
def test_nothing_is_written_outside_the_output(
    channels: int, config: Config, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers: list[Tensor] = []

    def guarded(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
        buffers.append(torch.full((shape[0] * shape[1] + 512,), -5, dtype=dtype, device=device))
        return buffers[-1][256:-256].view(shape)

    monkeypatch.setattr(torch, "empty", guarded)
    int8_product(_random(19, 64, device, 7), _random(channels, 64, device, 8), config=config)
    assert buffers[0][:256].eq(-5).all()
    assert buffers[0][-256:].eq(-5).all()


# --- the linear layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIGS["pointers"], CONFIGS["descriptors"]], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(("x_name", "w_name"), PAIRS)
def test_row_scales(x_name: str, w_name: str, config: Config, device: torch.device) -> None:
    x, w = _operand(GRIDS[x_name], 19, 72, 1, 1), _operand(GRIDS[w_name], 37, 72, 1, 2)
    _close(_run(device, x, w, config=config), _reference(x, w))


@pytest.mark.parametrize(("x_name", "w_name"), [("4", "4"), ("8", "8"), ("8", "2"), ("fp4", "8")])
@pytest.mark.parametrize("groups", [(4, 4), (1, 4), (4, 1), (2, 4), (4, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("descriptors", [False, True])
def test_group_scales(
    groups: tuple[int, int], x_name: str, w_name: str, descriptors: bool, device: torch.device
) -> None:
    x, w = _operand(GRIDS[x_name], 19, 128, groups[0], 3), _operand(GRIDS[w_name], 21, 128, groups[1], 4)
    config = Config(16, 16, 128 // max(groups), descriptors=descriptors)
    _close(_run(device, x, w, config=config), _reference(x, w))


@pytest.mark.parametrize("size", [32, 64, 128])
def test_group_sizes_by_default(size: int, device: torch.device) -> None:
    x, w = _operand(UniformGrid(8), 5, 384, 384 // size, 5), _operand(UniformGrid(4), 9, 384, 384 // size, 6)
    _close(_run(device, x, w), _reference(x, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("descriptors", [False, True])
def test_bias_and_output_types(dtype: torch.dtype, groups: int, descriptors: bool, device: torch.device) -> None:
    x, w = _operand(UniformGrid(4), 19, 64, groups, 7), _operand(UniformGrid(4), 24, 64, groups, 8)
    bias = torch.randn(24, generator=torch.Generator().manual_seed(9)).to(dtype)
    config = Config(16, 16, 32, descriptors=descriptors)
    y = _run(device, x, w, bias=bias, out_dtype=dtype, config=config)
    assert y.dtype == dtype
    reference = _reference(x, w) + bias.float()
    torch.testing.assert_close(y.float(), reference, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize(("x_name", "w_name"), [("8", "8"), ("8", "7"), ("7", "8"), ("8", "wide")])
def test_totals_beyond_int32_are_rounded_once(x_name: str, w_name: str, device: torch.device) -> None:
    """At the widest rows, both at the extremes, where the total is past 2^32, and where it is random."""
    width = 2**17 - 1
    x, w = _operand(GRIDS[x_name], 3, width, 1, 10), _operand(GRIDS[w_name], 3, width, 1, 11)
    for a, step, _ in (x, w):
        a[0], a[1] = a.min(), a.max()
        step.fill_(1)
    reference = _reference(x, w)
    assert reference.abs().max() > x[2].unit * w[2].unit * 2**31
    assert torch.equal(_run(device, x, w, config=Config(16, 16, 1024)), reference)


def test_given_sums_are_used_and_those_of_another_grouping_are_not(device: torch.device) -> None:
    x, w = _operand(UniformGrid(8), 5, 64, 1, 12), _operand(UniformGrid(8), 6, 64, 2, 13)
    reference = _reference(x, w)
    sums = [a.unflatten(1, (2, 32)).sum(2, dtype=torch.int32) for a in (x[0], w[0])]
    _close(_run(device, x, w, x_sums=sums[0], w_sums=sums[1]), reference)
    assert not torch.allclose(_run(device, x, w, x_sums=sums[0] + 9, w_sums=sums[1]), reference)
    assert not torch.allclose(_run(device, x, w, x_sums=sums[0], w_sums=sums[1] + 9), reference)
    coarse = x[0].sum(1, keepdim=True, dtype=torch.int32) + 9
    _close(_run(device, x, w, x_sums=coarse, w_sums=sums[1]), reference)


def test_one_step_for_the_whole_tensor(device: torch.device) -> None:
    x, w = _operand(UniformGrid(4), 5, 64, 1, 14), _operand(UniformGrid(4), 6, 64, 1, 15)
    one = w[1][:1]
    _close(_run(device, x, (w[0], one, w[2])), _reference(x, (w[0], one, w[2])))


def test_what_is_refused(device: torch.device) -> None:
    x, w = _operand(UniformGrid(4), 5, 96, 1, 16), _operand(UniformGrid(4), 6, 96, 1, 17)
    a = x[0].to(device)
    wide = torch.zeros(1, 2**17, dtype=torch.int8, device=device)
    with pytest.raises(ConfigError, match="exact below 131072 elements, not for 131072"):
        int8_product(wide, wide)
    with pytest.raises(ConfigError, match="two-dimensional int8"):
        int8_product(a.float(), a)
    with pytest.raises(ConfigError, match="rows of 96 and 32 factors"):
        int8_product(a, a[:, :32])
    with pytest.raises(ConfigError, match="rows of 0 and 0 factors"):
        int8_product(a[:, :0], a[:, :0])
    with pytest.raises(ConfigError, match="32, 64 or 128 elements, not 16"):
        _run(device, (x[0], torch.ones(5, 6), x[2]), w)
    with pytest.raises(ConfigError, match="3 and 2 scale groups do not subdivide"):
        _run(device, (x[0], torch.ones(5, 3), x[2]), (w[0], torch.ones(6, 2), w[2]))
    with pytest.raises(ConfigError, match="x_step must be float32 with a row for each of 5"):
        _run(device, (x[0], torch.ones(4, 1), x[2]), w)
    with pytest.raises(ConfigError, match="writes float32, bfloat16 or float16"):
        _run(device, x, w, out_dtype=torch.float64)
    with pytest.raises(ConfigError, match="bias must have 6 elements"):
        _run(device, x, w, bias=torch.zeros(5))
    with pytest.raises(ConfigError, match="factor 2 with offset 1"):
        _run(device, (x[0], x[1], IntegerForm(0.5, 2, 0, 4)), w)


def test_a_kernel_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    a = torch.zeros(4, 32, dtype=torch.int8)
    with pytest.raises(ConfigError, match="need a CUDA device, not cpu"):
        int8_product(a, a)


def test_what_tuning_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token counts share a key up to the next power of two; the loop scheduled by hand waits for a request."""
    asked: list[tuple[Any, ...]] = []

    def best_config(kernel: str, key: Any, candidates: Any, run: Any) -> Config:
        asked.append((kernel, key, candidates))
        return CONFIGS["pointers"]

    monkeypatch.setattr(launchers, "best_config", best_config)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    cpu = torch.device("cpu")
    w_a = _random(7, 64, cpu, 0)
    for tokens in (100, 128, 129):
        out = torch.empty((tokens, 7), dtype=torch.int32)
        assert launchers._tuned(_random(tokens, 64, cpu, 0), w_a, out, None, 1) == CONFIGS["pointers"]
    assert asked[0] == asked[1]
    assert asked[1][1] != asked[2][1]
    assert not set(HAND_SCHEDULED) & set(asked[0][2])
    monkeypatch.setenv("BITQUEST_GLUON", "1")
    launchers._tuned(_random(100, 64, cpu, 0), w_a, torch.empty((100, 7), dtype=torch.int32), None, 1)
    assert set(HAND_SCHEDULED) < set(asked[3][2])
    launchers._tuned(_random(5, 64, cpu, 0), w_a, torch.empty((5, 7), dtype=torch.int32), None, 2)
    assert asked[4][2] == group_candidates(8, 90, 32)


# --- every configuration that tuning may choose --------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [5, 64, 300])
def test_every_candidate_computes_the_same(tokens: int) -> None:
    device = torch.device("cuda")
    capability = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    bucket = 1 << (tokens - 1).bit_length()
    by_hand = HAND_SCHEDULED if capability == 90 else ()
    x, w = _operand(UniformGrid(8), tokens, 1056, 1, 18), _operand(UniformGrid(8), 520, 1056, 1, 19)
    for config in (*row_candidates(bucket, capability), *by_hand):
        _close(_run(device, x, w, config=config), _reference(x, w))
    for config in by_hand:  # fewer tiles of K than stages, an output whose rows TMA cannot write, raw integers, a bias
        x, w = _operand(UniformGrid(4), tokens, 96, 1, 22), _operand(UniformGrid(4), 77, 96, 1, 23)
        bias = torch.ones(77)
        _close(_run(device, x, w, config=config, bias=bias), _reference(x, w) + bias)
        product = int8_product(x[0].to(device), w[0].to(device), config=config)
        assert torch.equal(product.cpu(), integer_product(x[0], w[0]))
    for size in (32, 64, 128):
        x, w = _operand(UniformGrid(8), tokens, 1024, 1024 // size, 20), _operand(UniformGrid(4), 520, 1024, 1, 21)
        for config in group_candidates(bucket, capability, size):
            _close(_run(device, x, w, config=config), _reference(x, w))

"""The fused quantization against numerics: codes, packed bytes, steps, masks and sums; what it refuses.

A code may differ from the reference's where x/Δ lies on a threshold to within the rounding of two float32 rotations:
1e-5 of a step (METHOD), and a few units in the last place of x/Δ where 8 bits make that larger.
"""

import pytest
import torch
from torch import Tensor

from bitquest.errors import ConfigError
from bitquest.numerics.estimators import Clip, Estimator, StraightThrough, Trust
from bitquest.numerics.fake_quant import dequantize
from bitquest.numerics.grids import ALL_GRIDS, FP4, INT8_SYMMETRIC, TERNARY, CodebookGrid, Grid, UniformGrid
from bitquest.numerics.integers import integer_form
from bitquest.numerics.packing import pack, packed_width, unpack
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import hadamard, rotation_from_block
from bitquest.numerics.scaling import AbsMax, AbsMean, GaussianMSE, Learned, PerGroup, PerTensor, PowerOfTwo, TwoLevel
from bitquest.numerics.sparsity import NofM
from bitquest.ops.engine import TorchEngine, bits_to_mask, mask_bits
from bitquest.ops.linear_spec import LinearSpec
from bitquest.ops.rows import Prologue, QuantizedRows, RMSNorm, SwiGLU, apply_prologue
from bitquest.ops.triton.dequantize import dequantize_rows
from bitquest.ops.triton.engine import TritonEngine
from bitquest.ops.triton.quantize import MAX_LEVELS, quantize_rows, rotate_rows

PARTS = frozenset({"factors", "packed", "mask", "sums"})
NEAR = 1e-5


def rows(shape: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Gaussian rows of different sizes, with outliers: some are clipped and masked."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator).add_(0.1)
    x *= 1 + 5 * (torch.rand(shape, generator=generator) > 0.98)
    return x.to(dtype).to(device)


def in_steps(x: Tensor, step: Tensor, block: int) -> Tensor:
    """x_h/Δ in float64, of x as the kernel reads it."""
    x_h = x.double()
    if block > 1:
        signs = hadamard(block, torch.device("cpu")).sign().double().to(x.device)
        x_h = (x_h.reshape(-1, block) @ signs).reshape(x.shape) * block**-0.5
    wide = step.double().expand(x.shape[0], -1)
    return (x_h.unflatten(-1, (wide.shape[-1], -1)) / wide.unsqueeze(-1)).reshape(x.shape)


def thresholds(grid: Grid) -> Tensor:
    levels = torch.tensor(grid.levels, dtype=torch.float64)
    return (levels[1:] + levels[:-1]) / 2


def near(t: Tensor, points: Tensor) -> Tensor:
    distance = (t.unsqueeze(-1) - points.to(t.device)).abs().amin(-1)
    return distance <= torch.maximum(torch.full_like(t, NEAR), t.abs() * 3e-7)


def agree(made: QuantizedRows, x: Tensor, quantizer: Quantizer, block: int, wanted: QuantizedRows) -> int:
    """Check the parts of `made` against the reference's, and one another; how many codes lie on a threshold."""
    width, bits = x.shape[1], quantizer.bits
    torch.testing.assert_close(made.step, wanted.step, rtol=1e-6, atol=0)
    assert made.packed is not None
    assert wanted.packed is not None
    codes, expected = unpack(made.packed, bits, width), unpack(wanted.packed, bits, width)
    t = in_steps(x, wanted.step, block)
    flipped = codes != expected
    assert near(t[flipped], thresholds(quantizer.grid)).all(), f"{int(flipped.sum())} codes differ"
    assert ((codes.int() - expected.int()).abs() <= 1).all()
    torch.testing.assert_close(made.packed, pack(codes, bits), rtol=0, atol=0)
    form = integer_form(quantizer.grid)
    if form is not None:
        assert made.factors is not None
        assert made.sums is not None
        torch.testing.assert_close(made.factors, form.of_codes(codes), rtol=0, atol=0)
        grouped = made.factors.unflatten(-1, (made.sums.shape[1], -1))
        torch.testing.assert_close(made.sums, grouped.sum(-1, dtype=torch.int32), rtol=0, atol=0)
    assert made.mask is not None
    assert wanted.mask is not None
    assert made.mask.shape == wanted.mask.shape
    if made.mask.numel():
        m = bits_to_mask(made.mask, width)
        torch.testing.assert_close(made.mask, mask_bits(m), rtol=0, atol=0)  # spare bits are zero
        differs = m != bits_to_mask(wanted.mask, width)
        limits = quantizer.estimator.range(quantizer.grid)
        if limits is None:
            levels = torch.tensor(quantizer.grid.levels, dtype=torch.float64)
            reach = quantizer.estimator.threshold(quantizer.grid)  # type: ignore[union-attr]
            edges = torch.cat([levels - reach, levels + reach])
        else:
            edges = torch.tensor(limits, dtype=torch.float64)
        assert (near(t, edges) | ~differs).all(), f"{int(differs.sum())} mask bits differ"
    return int(flipped.sum())


def check(
    x: Tensor, quantizer: Quantizer, block: int, step: Tensor | None = None, prologue: Prologue | None = None
) -> None:
    want = PARTS if integer_form(quantizer.grid) else PARTS - {"factors", "sums"}
    made = quantize_rows(x, quantizer, block, want=want, step=step, prologue=prologue)
    wanted = TorchEngine().quantize_rows(x, quantizer, block, want, step, prologue)
    agree(made, apply_prologue(x, prologue), quantizer, block, wanted)


FUSED_GRIDS = [grid for grid in ALL_GRIDS if isinstance(grid, UniformGrid) or len(grid.levels) <= MAX_LEVELS]


@pytest.mark.parametrize("grid", FUSED_GRIDS, ids=str)
def test_every_grid(grid: Grid, device: torch.device) -> None:
    check(rows((5, 160), device, torch.bfloat16), Quantizer(grid=grid), 32)


@pytest.mark.parametrize(
    ("quantizer", "reason"),
    [
        (Quantizer(FP4, PerGroup(32), PowerOfTwo()), "PowerOfTwo scales are not computed"),
        (Quantizer(FP4, PerGroup(32), TwoLevel("row")), "TwoLevel scales are not computed"),
        (Quantizer(FP4, PerGroup(16)), "32, 64 or 128 elements, not 16"),
        (Quantizer(FP4, scale=Learned("lsq")), "Learned scales are not computed"),
        (Quantizer(FP4, scale=Learned(offset=True)), "a learned offset is not subtracted"),
        (Quantizer(INT8_SYMMETRIC), "up to 16 levels"),
    ],
    ids=str,
)
def test_what_the_fused_kernels_leave_to_torch(quantizer: Quantizer, reason: str, device: torch.device) -> None:
    engine = TritonEngine()
    assert reason in str(engine.refuses_rows(quantizer, 1))
    spec = LinearSpec(128, 32, Quantizer(FP4), quantizer, 1)
    given = quantizer.is_learned and not quantizer.scale.offset  # type: ignore[union-attr]
    assert (engine.refuses(spec) is None) == given  # a learned step is given to a packed layer
    assert engine.refuses_training(spec) is not None
    with pytest.raises(ConfigError, match=reason):
        quantize_rows(rows((2, 128), device), quantizer, 1, want=frozenset({"packed"}))


# K: one chunk and less, odd, not whole chunks, whole ones; several rows a tile, one, a row longer than 64 chunks; and
# 2560, three rows a tile in five tiles: what one tile wrote too much of would spoil one that was finished before.
@pytest.mark.parametrize(
    ("tokens", "width", "block"),
    [(3, 1, 1), (7, 33, 1), (2, 2, 2), (9, 20, 4), (5, 72, 8), (4, 48, 16), (5, 96, 32), (3, 320, 64), (1, 128, 128),
     (11, 256, 128), (2, 640, 128), (37, 288, 32), (1, 4480, 128), (13, 2560, 128), (2, 8448, 128)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shapes_blocks_and_dtypes(
    tokens: int, width: int, block: int, dtype: torch.dtype, device: torch.device
) -> None:
    for bits in (1, 3, 4) if dtype == torch.bfloat16 else (4,):
        check(rows((tokens, width), device, dtype, seed=width), Quantizer(grid=UniformGrid(bits)), block)


@pytest.mark.slow
@pytest.mark.parametrize("width", [11008, 32768])
@pytest.mark.parametrize("bits", range(1, 9))
def test_long_rows(width: int, bits: int, device: torch.device) -> None:
    check(rows((9, width), device, torch.bfloat16), Quantizer(grid=UniformGrid(bits)), 128)


@pytest.mark.parametrize("estimator", [Trust(), Trust(0.5), Trust(2.0), Clip(), Clip(1.3), StraightThrough()], ids=str)
@pytest.mark.parametrize("grid", [UniformGrid(1), UniformGrid(4), TERNARY, FP4, ALL_GRIDS[-1]], ids=str)
def test_estimators(estimator: Estimator, grid: Grid, device: torch.device) -> None:
    check(rows((6, 128), device), Quantizer(grid=grid, estimator=estimator), 64)


@pytest.mark.parametrize("block", [1, 32, 128])
@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("scale", [GaussianMSE(), AbsMax()], ids=str)
def test_groups(block: int, size: int, scale: GaussianMSE | AbsMax, device: torch.device) -> None:
    quantizer = Quantizer(grid=UniformGrid(3), granularity=PerGroup(size), scale=scale)
    check(rows((3, 384), device, torch.bfloat16), quantizer, block)


def test_groups_in_narrow_rows(device: torch.device) -> None:
    check(rows((3, 96), device), Quantizer(granularity=PerGroup(32)), 32)
    check(rows((3, 32), device), Quantizer(granularity=PerGroup(32)), 16)


@pytest.mark.parametrize("grid", [UniformGrid(1), TERNARY], ids=str)
def test_mean_and_maximum(grid: Grid, device: torch.device) -> None:
    for width in (160, 640):  # the second leaves blocks of a tile idle
        for rule in (AbsMean(), AbsMax(), Learned()):
            check(rows((5, width), device, torch.bfloat16), Quantizer(grid=grid, scale=rule), 32)


def test_given_steps(device: torch.device) -> None:
    x = rows((7, 640), device, torch.bfloat16)
    learned = Quantizer(grid=UniformGrid(4), scale=Learned())
    check(x, learned, 128, step=torch.rand(7, 1, device=device) + 0.05)
    check(x, Quantizer(granularity=PerTensor(), scale=Learned()), 128, step=torch.full((1, 1), 0.3, device=device))
    groups = Quantizer(granularity=PerGroup(64))
    check(x, groups, 128, step=(torch.rand(10, 7, device=device) + 0.05).t())


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # NumPy's, from the interpreter
def test_a_given_step_may_be_tiny(device: torch.device) -> None:
    x = rows((7, 640), device, torch.bfloat16) * 1e9
    quantizer, tiny = Quantizer(scale=Learned()), torch.full((7, 1), 1e-30, device=device)  # x/Δ leaves float32's range
    made, wanted = quantize_rows(x, quantizer, 128, want=PARTS, step=tiny), TorchEngine()
    assert made.step is tiny
    assert made.packed is not None
    assert torch.equal(made.packed, wanted.quantize_rows(x, quantizer, 128, PARTS, tiny).packed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [48, 640, 1024])
def test_prologues(dtype: torch.dtype, width: int, device: torch.device) -> None:
    block = 16 if width == 48 else 128
    x, up = rows((5, width), device, dtype), rows((5, 2 * width), device, dtype, seed=1)[:, width:]
    weight = torch.rand(width, device=device) + 0.5
    for prologue in (RMSNorm(weight, 1e-5), RMSNorm(weight.to(torch.bfloat16), 1e-6), SwiGLU(up)):
        # the prologue's own rounding is not the rotation's: compare with what the kernel makes of the reference's
        quantizer = Quantizer(grid=UniformGrid(4))
        check(x, quantizer, block, prologue=prologue)
        y = rotate_rows(x, block, prologue=prologue, dtype=torch.float32)
        wanted = rotation_from_block(block).apply(apply_prologue(x, prologue))
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=float(wanted.abs().max()) * 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rotation_alone(dtype: torch.dtype, device: torch.device) -> None:
    for shape, block in (((3, 33), 1), ((5, 24), 8), ((4, 384), 128)):
        x = rows(shape, device, dtype)
        for out in (torch.float32, torch.bfloat16, torch.float16):
            y = rotate_rows(x, block, dtype=out)
            wanted = rotation_from_block(block).apply(x)
            assert y.dtype == out
            torch.testing.assert_close(
                y.float(), wanted, rtol={torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[out], atol=2e-6
            )


@pytest.mark.parametrize("bits", range(1, 9))
def test_rows_of_zeros(bits: int, device: torch.device) -> None:
    x = rows((5, 160), device)
    x[1:4] = 0
    check(x, Quantizer(grid=UniformGrid(bits)), 32)
    zero = quantize_rows(torch.zeros(2, 64, device=device), Quantizer(grid=UniformGrid(bits)), 32, want=PARTS)
    assert zero.packed is not None
    assert (unpack(zero.packed, bits, 64) == (-1 if bits == 1 else unpack(zero.packed, bits, 64)[0, 0])).all()


def test_no_rows(device: torch.device) -> None:
    made = quantize_rows(torch.empty(0, 96, device=device), Quantizer(grid=UniformGrid(3)), 32, want=PARTS)
    assert [tuple(part.shape) for part in made if part is not None] == [(0, 96), (0, 36), (0, 1), (0, 12), (0, 1)]
    values = dequantize_rows(made.packed, made.step, UniformGrid(3), 96, dtype=torch.float32)
    assert values.shape == (0, 96)
    assert rotate_rows(torch.empty(0, 96, device=device), 32, dtype=torch.float16).shape == (0, 96)


def test_rows_of_any_stride(device: torch.device) -> None:
    base = rows((6, 400), device, torch.bfloat16)
    for x in (base[:, 37:165], base[::2, :128], base.t()[:128].t()[:, :128], rows((128, 6), device).t()):
        check(x, Quantizer(), 64)


def test_only_what_is_wanted(device: torch.device) -> None:
    x = rows((4, 64), device)
    everything = quantize_rows(x, Quantizer(), 32, want=PARTS)
    for part in PARTS:
        made = quantize_rows(x, Quantizer(), 32, want=frozenset({part}))
        for name, value in made._asdict().items():
            if name in (part, "step"):
                torch.testing.assert_close(value, getattr(everything, name), rtol=0, atol=0)
            else:
                assert value is None


def test_a_mask_that_passes_everything_is_empty(device: torch.device) -> None:
    made = quantize_rows(rows((4, 64), device), Quantizer(estimator=StraightThrough()), 32, want=PARTS)
    assert made.mask is not None
    assert made.mask.numel() == 0


@pytest.mark.parametrize(("bits", "rate"), [(4, 4e-7), (8, 5e-6)])
def test_how_many_codes_flip(bits: int, rate: float, device: torch.device) -> None:
    """Against float64 at the kernel's step: METHOD's rates between two float32 rotations, chance allowed."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
        quantizer = Quantizer(grid=UniformGrid(bits))
        made = quantize_rows(x, quantizer, 128, want=frozenset({"packed"}))
        assert made.packed is not None
        codes = unpack(made.packed, bits, 1024)
        flips = int((codes != quantizer.grid.encode(in_steps(x, made.step, 128))).sum())
        expected = rate * x.numel()
        assert flips <= expected + 4 * expected**0.5 + 1


@pytest.mark.parametrize("grid", ALL_GRIDS, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (5, 45), (3, 160), (9, 384)])
def test_dequantize(grid: Grid, tokens: int, width: int, device: torch.device) -> None:
    half = 2 ** (grid.bits - 1)
    generator = torch.Generator().manual_seed(width)
    codes = torch.randint(0, len(grid.levels), (tokens, width), generator=generator).sub_(half).to(torch.int8)
    codes = codes.to(device)
    kept = (torch.rand(tokens, width, generator=generator) > 0.5).to(device)
    form = integer_form(grid)
    for groups in (1, width // 32) if width % 32 == 0 else (1,):
        step = (torch.rand(tokens, groups, generator=generator) + 0.1).to(device)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            packed = dequantize_rows(pack(codes, grid.bits), step, grid, width, dtype=dtype)
            assert torch.equal(packed, dequantize(codes, step, grid).to(dtype))
            if form is not None:
                assert torch.equal(dequantize_rows(form.of_codes(codes), step, grid, width, dtype=dtype), packed)
        dropped = dequantize_rows(pack(codes, grid.bits), step, grid, width, dtype=torch.float32, kept=kept)
        assert torch.equal(dropped, dequantize(codes, step, grid, kept))
    one = torch.full((1, 1), 0.7, device=device)
    whole = dequantize_rows(pack(codes, grid.bits), one, grid, width, dtype=torch.float32)
    assert torch.equal(whole, dequantize(codes, one, grid))


def test_refusals(device: torch.device) -> None:
    x = rows((4, 64), device)
    many = CodebookGrid("many", tuple(float(i * i) for i in range(1, MAX_LEVELS + 2)))
    odd = CodebookGrid("odd", (-1.0, 0.1234, 1.0))
    cases = [
        (x, Quantizer(sparsity=NofM(2, 4)), 32, {}, "sparsity"),
        (x, Quantizer(granularity=PerTensor()), 32, {}, "whole tensor"),
        (x, Quantizer(grid=many), 32, {}, "17"),
        (x, Quantizer(grid=odd), 32, {}, "no factors"),
        (rows((2, 256), device), Quantizer(), 256, {}, "256"),
        (x, Quantizer(), 3, {}, "power of two"),
        (x, Quantizer(), 128, {}, "does not fit"),
        (rows((1, 32769), device), Quantizer(), 1, {}, "32769"),
        (x.long(), Quantizer(), 32, {}, "int64"),
        (x[0], Quantizer(), 32, {}, "rows"),
        (x, Quantizer(), 32, {"want": frozenset({"codes"})}, "codes"),
        (x, Quantizer(), 32, {"step": torch.ones(3, 1, device=device)}, "step"),
        (x, Quantizer(), 32, {"step": torch.ones(4, 1, device=device).double()}, "float32"),
        (x, Quantizer(), 32, {"prologue": RMSNorm(torch.ones(63, device=device), 1e-5)}, "63"),
        (x, Quantizer(), 32, {"prologue": SwiGLU(torch.ones(4, 63, device=device))}, "63"),
    ]
    for operand, quantizer, block, more, message in cases:
        with pytest.raises(ConfigError, match=message):
            quantize_rows(operand, quantizer, block, **{"want": PARTS, **more})
    with pytest.raises(ConfigError, match="float64"):
        rotate_rows(x, 32, dtype=torch.float64)
    packed = torch.zeros(4, packed_width(64, 4), dtype=torch.uint8, device=device)
    step = torch.ones(4, 1, device=device)
    for codes, given, more in (
        (packed[:, 1:], step, {}),
        (packed.short(), step, {}),
        (packed, step[1:], {}),
        (packed, torch.ones(4, 3, device=device), {}),
        (packed, step, {"dtype": torch.float64}),
        (packed, step, {"kept": torch.ones(4, 63, dtype=torch.bool, device=device)}),
    ):
        with pytest.raises(ConfigError):
            dequantize_rows(codes, given, UniformGrid(4), 64, **{"dtype": torch.float32, **more})
    with pytest.raises(ConfigError, match="no factors"):
        dequantize_rows(torch.zeros(4, 64, dtype=torch.int8, device=device), step, odd, 64, dtype=torch.float32)

"""Layers: the paths that cache and share give what the definition gives; packed is trained."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitquest as bq
from bitquest.errors import ConfigError
from bitquest.nn import (
    PackedEmbedding,
    PackedLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    Scheme,
    pack_,
    quantize_,
    record_masked_share,
)
from bitquest.numerics import (
    AbsMax,
    BlockHadamard,
    Clip,
    CodebookGrid,
    Learned,
    NofM,
    PerGroup,
    PerTensor,
    Quantizer,
    UniformGrid,
    fake_quantize,
)


@pytest.fixture(autouse=True)
def _the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are of the layers themselves, on torch; tests/ops compares the other backends with it."""
    monkeypatch.setenv("BITQUEST_BACKEND", "torch")


SCHEMES = [
    *(
        "w1a1",
        "w2a2",
        "w3a3",
        "w4a4",
        "w5a6",
        "w7a7",
        "w8a8",
        "w1a8",
        "w2a8",
        "w4a8",
        "w8a1",
        "w4a16",
        "w16a4",
        "w16a16",
    ),
    *(
        "w4a4-fp4",
        "w2a2-ternary",
        "w4a4-2:4",
        "w1a1-4:8",
        "w4a4-g32",
        "w8a8-g32",
        "w4a16-g32",
        "w1a1-norot",
        "w1a8-g32-norot",
    ),
]


def scheme(name: str) -> Scheme:
    return Scheme.parse(name)


def layer(name: str | Scheme, width: int = 96, out: int = 33, bias: bool = True) -> QuantizedLinear:
    torch.manual_seed(0)
    s = scheme(name) if isinstance(name, str) else name
    return QuantizedLinear(
        nn.Linear(width, out, bias=bias), weight=s.weight, activation=s.activation, rotation=s.rotation
    )


def direct(made: QuantizedLinear, x: Tensor) -> Tensor:
    """The layer by the definition alone."""
    specs = made.activation_quantizer.spec, made.weight_quantizer.spec
    operands = []
    for tensor, spec in zip((x, made.weight), specs, strict=True):
        q = made.rotation.apply(tensor) if spec is None else fake_quantize(tensor, spec, made.rotation)
        operands.append(q)
    return F.linear(operands[0], operands[1], made.bias)


def near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).norm()) <= tolerance * float(b.norm())


@pytest.mark.parametrize("name", SCHEMES)
def test_layer_is_the_definition_values_and_gradients(name: str) -> None:
    made, results = layer(name), []
    for function in (direct, QuantizedLinear.forward, QuantizedLinear.forward):
        made.zero_grad()
        x = torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = function(made, x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
        assert made.bias.grad is not None
        results.append((y.detach(), x.grad, made.weight.grad, made.bias.grad.clone()))
    for other in results[1:]:
        for expected, got in zip(results[0], other, strict=True):
            assert expected is not None
            assert got is not None
            # autograd adds the stages of a rotation in another order
            assert torch.equal(expected, got) or (got is not other[0] and near(got, expected, 1e-6))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("width", [96, 288, 64])
def test_packed_is_trained(name: str, width: int) -> None:
    made = layer(name, width)
    packed = PackedLinear.of(made)
    x = torch.randn(2, 5, width)
    with torch.no_grad():
        expected, got = made(x), packed(x)
    assert float((got - expected).norm() / expected.norm()) < 1e-5 / 3
    codes = made.encode_weight(), packed.encode_weight()
    if codes[0] is not None and codes[1] is not None:
        assert torch.equal(codes[0].codes, codes[1].codes)
    ours, theirs = made.encode_input(x), packed.encode_input(x)
    if ours is not None and theirs is not None:
        assert torch.equal(ours.codes, theirs.codes)


def test_unquantized_rotated_layer_is_the_layer() -> None:
    made, x = layer("w16a16"), torch.randn(4, 96)
    assert torch.allclose(made(x), F.linear(x, made.weight, made.bias), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    made = layer("w4a4").to(dtype)
    x = torch.randn(4, 96).to(dtype).requires_grad_()
    y = made(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == made.weight.grad.dtype == dtype  # type: ignore[union-attr]


# --- learned steps ---


def learned(bits: int) -> Scheme:
    weight = Quantizer(UniformGrid(bits), scale=Learned(), estimator=Clip(1.0))
    activation = Quantizer(UniformGrid(bits), PerTensor(), Learned(), Clip(1.0))
    return Scheme(weight, activation)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_learned_steps_train_and_pack(bits: int) -> None:
    made, x = layer(learned(bits)), torch.randn(20, 96)
    assert bool(made.activation_quantizer.step.isnan().all())  # type: ignore[union-attr]
    target = F.linear(x, torch.randn(33, 96))
    optimizer, losses = torch.optim.Adam(made.parameters(), lr=1e-2), []
    for _ in range(30):
        loss = F.mse_loss(made(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert bool(torch.stack([p.grad.isfinite().all() for p in made.parameters() if p.grad is not None]).all())
    with torch.no_grad():
        expected, got = made(x), PackedLinear.of(made)(x)
    assert float((got - expected).norm() / expected.norm()) < 1e-5


def test_a_learned_step_cannot_vanish() -> None:
    made, x = layer(learned(1)), torch.randn(20, 96)
    before = made(x)
    with torch.no_grad():
        made.activation_quantizer.step.neg_()  # type: ignore[union-attr]
    assert torch.equal(made(x), before)
    with torch.no_grad():
        made.weight_quantizer.step.zero_()  # type: ignore[union-attr]
        made.activation_quantizer.step.neg_()  # type: ignore[union-attr]
    y = made(x)
    y.sum().backward()
    assert bool(y.isfinite().all())
    assert float(made.weight_quantizer.effective_step().detach().min()) > 0  # type: ignore[union-attr]


# --- embedding, conversion ---


class Toy(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(50, 96)
        self.up = nn.Linear(96, 64)
        self.down = nn.Linear(64, 96, bias=False)
        self.lm_head = nn.Linear(96, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        result: Tensor = self.lm_head(self.down(torch.relu(self.up(self.embed(ids)))))
        return result


class Scaled(nn.Embedding):
    """As some models have it."""


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["w1a1", "w4a4-h8", "w2a8-g32-h4", "w16a16-norot-h8"])
def test_whole_models_pack(name: str, tied: bool) -> None:
    model, ids = quantize_(Toy(tied), scheme(name)), torch.randint(0, 50, (3, 7))
    model(ids).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert set(model.state_dict()) == set(Toy().state_dict())
    with torch.no_grad():
        expected = model(ids)
        pack_(model)
        got = model(ids)
    assert float((got - expected).norm() / expected.norm()) < 1e-5
    assert not any(isinstance(m, QuantizedLinear | QuantizedEmbedding) for m in model.modules())
    if tied and name.endswith(("h8", "h4")):
        assert isinstance(model.embed, PackedEmbedding)
        assert isinstance(model.lm_head, PackedLinear)
        assert model.embed.packed is model.lm_head.packed


def test_which_layers_are_taken() -> None:
    model = quantize_(Toy(), scheme("w4a4"))
    assert {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)} == {"up", "down"}
    only = quantize_(Toy(), scheme("w4a4"), lambda module, fqn: fqn == "up")
    assert {n for n, m in only.named_modules() if isinstance(m, QuantizedLinear)} == {"up"}
    both = quantize_(Toy(), "w4a4-h8")
    assert isinstance(both.embed, QuantizedEmbedding)
    assert isinstance(both.lm_head, QuantizedLinear)
    assert both.lm_head.activation_quantizer.spec is None
    plain = quantize_(Toy(), "none")
    assert not any(isinstance(m, QuantizedLinear) for m in plain.modules())
    assert isinstance(quantize_(nn.Linear(64, 64), "w4a4"), QuantizedLinear)


def test_parameters_keep_name_and_identity() -> None:
    model = Toy()
    before = dict(model.named_parameters())
    after = dict(quantize_(model, "w4a4").named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert len(after) == len(before)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: quantize_(nn.Sequential(nn.Linear(48, 8)), "w4a4-g32"), "0: groups of 32 do not divide"),
        (lambda: quantize_(nn.Sequential(nn.Linear(6, 8)), "w4a4-2:4"), "0: 2:4 sparsity covers 4"),
        (lambda: quantize_(nn.Sequential(nn.Linear(96, 8)), Scheme(rotation=BlockHadamard(64))), "width 96"),
        (lambda: quantize_(quantize_(Toy(), "w4a4"), "w4a4"), "quantized already"),
        (lambda: quantize_(nn.Sequential(nn.ReLU()), "w4a4"), r"no nn\.Linear"),
        (lambda: quantize_(nn.ModuleDict({"e": Scaled(9, 96)}), "w4a4-h8"), "e: Scaled has a forward of its own"),
        (lambda: quantize_(nn.ModuleDict({"e": nn.Embedding(9, 96, max_norm=1.0)}), "w4a4-h8"), "e: .* no max_norm"),
        (lambda: quantize_(Toy(), "w4a4", lambda m, n: False), "filter_fn refused"),
        (lambda: quantize_(Toy(tied=True), Scheme(head=Quantizer(UniformGrid(8)))), "share one weight"),
        (lambda: pack_(quantize_(Toy(), "w8a8-2:4")), "up: sparse 8-bit weights cannot be packed"),
        (lambda: pack_(quantize_(Toy(), "w4a4"), backend="metal"), "unknown backend"),
    ],
)
def test_refusals_name_the_layer(act: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        act()  # type: ignore[operator]


def test_grids_without_integers_still_pack() -> None:
    grid = CodebookGrid("nf", (-1.0, -0.333, 0.4, 1.0))
    made = layer(Scheme(Quantizer(grid, scale=AbsMax()), Quantizer(UniformGrid(4))))
    x = torch.randn(4, 96)
    with torch.no_grad():
        assert torch.allclose(PackedLinear.of(made)(x), made(x), atol=1e-5)


def test_moving_a_packed_layer_keeps_its_numbers() -> None:
    packed = PackedLinear.of(layer("w4a4"))
    step = packed.step.clone()  # type: ignore[union-attr]
    packed.to(torch.bfloat16)
    assert packed.step.dtype == torch.float32  # type: ignore[union-attr]
    assert torch.equal(packed.step, step)  # type: ignore[arg-type]
    assert packed(torch.randn(2, 96).bfloat16()).dtype == torch.bfloat16


def test_moving_a_packed_model_keeps_its_numbers() -> None:
    model = quantize_(nn.ModuleDict({"embed": nn.Embedding(9, 96), "up": nn.Linear(96, 8)}), "w4a4-h8")
    before = {name: tensor.clone() for name, tensor in pack_(model).state_dict().items()}
    for name, tensor in model.to(torch.bfloat16).float().state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_learned_steps_stay_float32() -> None:
    made = layer(learned(4))
    made(torch.randn(3, 96))
    made.to(torch.bfloat16)(torch.randn(3, 96).bfloat16()).sum().backward()
    packed = PackedLinear.of(made)
    for step in (made.weight_quantizer.step, made.activation_quantizer.step, packed.step, packed.activation_step):
        assert step is not None
        assert step.dtype == torch.float32


@pytest.mark.parametrize("name", ["w1a1", "w4a4", "w8a8", "w4a16", "w16a4", "w4a4-fp4", "w1a8"])
@pytest.mark.parametrize("width", [1, 3, 576])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (2, 3)], ids=str)
def test_any_shape(name: str, width: int, shape: tuple[int, ...]) -> None:
    made = layer(name, width, 5)
    x = torch.randn(*shape, width, requires_grad=True)
    y = made(x)
    y.sum().backward()
    assert y.shape == (*shape, 5)
    assert bool(made.weight.grad.isfinite().all())  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.allclose(PackedLinear.of(made)(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["w4a16", "w4a4", "w16a4"])
def test_packed_layers_compute_in_float32_under_autocast(name: str) -> None:
    packed, x = PackedLinear.of(layer(name)), torch.randn(4, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = packed(x)
    assert torch.equal(inside, packed(x.clone()))


def test_mixed_group_sizes() -> None:
    made = layer(Scheme(Quantizer(UniformGrid(4), PerGroup(64)), Quantizer(UniformGrid(8), PerGroup(32))), width=128)
    x = torch.randn(4, 128)
    with torch.no_grad():
        assert torch.allclose(PackedLinear.of(made)(x), made(x), rtol=1e-4, atol=1e-5)


def test_masked_share() -> None:
    made, x = layer("w4a4", width=128, out=512), torch.randn(2000, 128)
    with record_masked_share(made) as share:
        made(x)
    assert 0.003 < share.value < 0.012  # 2·Φ(−α(1 + 1/15)) = 0.0073
    with record_masked_share(nn.Linear(1, 1)) as other:
        made(torch.randn(2, 128))
    assert other.value == 0.0
    sparse = layer(Scheme(Quantizer(UniformGrid(4), sparsity=NofM(2, 4))), width=128)
    with record_masked_share(sparse) as share:
        sparse(x)
    assert 0.3 < share.value < 0.5


def test_public_names() -> None:
    assert set(bq.__all__) >= {"quantize_", "pack_", "Scheme", "fake_quantize", "save", "load", "UniformGrid"}
    assert bq.Scheme is Scheme
    assert "quantize_" in dir(bq)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        bq.nonsense  # noqa: B018

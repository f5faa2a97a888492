"""What is computed once: an input that several layers read, a weight between two optimizer steps. Never stale."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from bitquest.models import Llama, LlamaConfig
from bitquest.nn import PackedLinear, QuantizedLinear, Scheme, quantize_
from bitquest.nn import quantizer as quantizer_module
from bitquest.numerics import fake_quantize
from bitquest.ops import registry


@pytest.fixture(autouse=True)
def _the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are of the layers themselves, on torch; tests/ops compares the other backends with it."""
    monkeypatch.setenv("BITQUEST_BACKEND", "torch")


def layer(name: str | Scheme = "w4a4", out: int = 33, seed: int = 0) -> QuantizedLinear:
    s = Scheme.parse(name) if isinstance(name, str) else name
    torch.manual_seed(seed)
    return QuantizedLinear(nn.Linear(96, out), weight=s.weight, activation=s.activation, rotation=s.rotation)


def direct(made: QuantizedLinear, x: Tensor) -> Tensor:
    """The layer by the definition alone."""
    specs = made.activation_quantizer.spec, made.weight_quantizer.spec
    operands = []
    for tensor, spec in zip((x, made.weight), specs, strict=True):
        assert spec is not None
        operands.append(fake_quantize(tensor, spec, made.rotation))
    return F.linear(operands[0], operands[1], made.bias)


@pytest.fixture
def quantized(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of everything that is quantized in the test, in order."""
    calls: list[tuple[int, ...]] = []
    original = registry.fake_quantize_forward

    def counted(x: Tensor, *rest: object) -> object:
        calls.append(tuple(x.shape))
        return original(x, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(registry, "fake_quantize_forward", counted)
    return calls


# --- the input -----------------------------------------------------------------------------------------------------


def test_no_dense_rotation_and_each_input_quantized_once(quantized: list[tuple[int, ...]]) -> None:
    q, k, v = layer(), layer(out=7), layer(out=7)
    x = torch.randn(4, 96, requires_grad=True)
    y = x * 1
    sum(p(y).sum() for p in (q, k, v)).backward()  # type: ignore[union-attr]
    assert quantized.count((4, 96)) == 1
    assert len(quantized) == 4
    # A second micro-batch quantizes its input only; after an optimizer step the weights too.
    optimizer = torch.optim.AdamW([*q.parameters(), *k.parameters(), *v.parameters()], fused=True)
    sum(p(x * 1).sum() for p in (q, k, v)).backward()  # type: ignore[union-attr]
    assert len(quantized) == 4 + 3  # three different tensors here, no weight
    optimizer.step()
    q(y.detach())
    assert sorted(quantized[-2:]) == [(4, 96), (33, 96)]


def test_shared_input_gradient_is_the_sum() -> None:
    q, k = layer("w2a2"), layer("w2a2", out=7)
    gradients = []
    for share in (True, False):
        x = torch.randn(4, 96, generator=torch.Generator().manual_seed(3)).requires_grad_()
        y = x * 1
        (q(y).sum() + k(y if share else y * 1).sum()).backward()
        gradients.append(x.grad)
    assert torch.allclose(*gradients, atol=1e-6)  # type: ignore[arg-type]


def test_different_quantizers_do_not_share() -> None:
    x = torch.randn(4, 96)
    for name in ("w4a4", "w1a1", "w4a8", "w4a4-norot", "w4a4-g32"):
        made = layer(name)
        assert torch.equal(made(x), direct(made, x.clone()))


def test_an_input_may_be_used_again_after_backward_and_after_a_write() -> None:
    made, leaf = layer(), torch.randn(4, 96, requires_grad=True)
    for x in (leaf, leaf * 1):
        (first,) = torch.autograd.grad(made(x).sum(), leaf, retain_graph=True)
        (again,) = torch.autograd.grad(made(x).sum(), leaf, retain_graph=True)
        assert torch.equal(again, first)
    with torch.no_grad():
        before = made(leaf)
        leaf.mul_(-1)
        assert not torch.equal(made(leaf), before)
        assert torch.equal(made(leaf), direct(made, leaf))
    assert made(leaf).requires_grad  # not the result without gradients


@pytest.mark.parametrize("make", [layer, lambda: PackedLinear.of(layer())], ids=["trained", "packed"])
@pytest.mark.parametrize("write", ["in place", "data", "assigned", "numpy"])
def test_an_input_written_to_is_quantized_anew(write: str, make: object) -> None:
    """Also by the ways that raise no version, as a buffer that a loop fills again from NumPy."""
    made, x = make(), torch.randn(4, 96)  # type: ignore[operator]
    made(x)
    if write == "in place":
        x.mul_(-3)
    elif write == "data":
        x.data.mul_(-3)
    elif write == "assigned":
        x.data = torch.randn(4, 96)
    else:
        x.numpy()[0, :5] = 9.0
    assert torch.equal(made(x), made(x.clone()))


@pytest.mark.parametrize("make", [layer, lambda seed: PackedLinear.of(layer(seed=seed))], ids=["trained", "packed"])
@pytest.mark.parametrize("write", ["in place", "assigned"])
def test_an_input_written_to_between_two_layers(write: str, make: object) -> None:
    q, k, x = make(seed=0), make(seed=1), torch.randn(4, 96)  # type: ignore[operator]
    q(x)
    if write == "in place":
        x.mul_(-3)
    else:
        x.data = torch.randn(4, 96)
    assert torch.equal(k(x), k(x.clone()))


def test_a_spent_graph_is_not_used_again() -> None:
    q, k, start = layer(), layer(seed=1), torch.randn(4, 96, requires_grad=True)
    x = start * 1.0
    q(x).sum().backward()
    (got,) = torch.autograd.grad(k(x).sum(), x)
    (expected,) = torch.autograd.grad(k(y := x.detach().clone().requires_grad_()).sum(), y)
    assert torch.equal(got, expected)


def test_an_input_detached_in_place_gets_no_gradient() -> None:
    q, k, start = layer(), layer(seed=1), torch.randn(4, 96, requires_grad=True)
    x = start * 1
    q(x)
    x.detach_()
    k(x).sum().backward()
    assert start.grad is None


def test_a_gradient_asked_for_later_arrives() -> None:
    q, k, x = layer(), layer(seed=1), torch.randn(4, 96)
    q(x)
    x.requires_grad_()
    k(x).sum().backward()
    assert x.grad is not None


def test_inference_tensors_are_not_shared() -> None:
    made = layer()
    with torch.inference_mode():
        x = torch.randn(4, 96)
        before = made(x)
        x.mul_(2).add_(1)
        assert torch.equal(made(x), direct(made, x.clone()))
        assert not torch.equal(made(x), before)


def test_an_address_used_again_is_another_tensor() -> None:
    """Tensors made and freed in a loop share ids and memory."""
    made = layer()
    with torch.no_grad():
        for seed in range(20):
            x = torch.randn(4, 96, generator=torch.Generator().manual_seed(seed))
            assert torch.equal(made(x), direct(made, x))
            del x


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("backward", [True, False])
def test_nothing_is_kept_alive(leaf: bool, backward: bool) -> None:
    """Neither the input, nor what it became, nor their graph: not even where no backward pass ever frees it."""
    gc.collect()
    others = set(quantizer_module._shared)  # of inputs that somebody else still holds
    q, k = layer(), layer(seed=1)
    alive = []
    q.activation_quantizer.register_forward_hook(lambda m, a, result: alive.append(weakref.ref(result)))
    for _ in range(3):
        start = torch.randn(4, 96, requires_grad=True)
        x = start if leaf else start * 1
        y = q(x).sum() + k(x).sum()
        if backward:
            y.backward()
        alive += [weakref.ref(x), weakref.ref(y)]
        del start, x, y
    gc.collect()
    assert not [reference for reference in alive if reference() is not None]
    assert set(quantizer_module._shared) <= others


def test_inputs_copy_and_save_as_before() -> None:
    """What is attached to a tensor travels into its copies and files."""
    made, x = layer(), torch.randn(4, 96, requires_grad=True)
    made(x), made(x.detach())
    assert torch.equal(copy.deepcopy(x), x)
    assert not x.__dict__


@pytest.mark.parametrize("outside", ["nothing", "before", "after"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(outside: str, reentrant: bool) -> None:
    """A checkpointed part reads a tensor that others may read too; it is recomputed in the backward pass."""
    q, k, other = layer(), layer(seed=1), layer(seed=2)

    def part(x: Tensor) -> Tensor:
        return q(x) * k(x)  # type: ignore[no-any-return]

    gradients = []
    for run in (part, lambda x: checkpoint(part, x, use_reentrant=reentrant)):
        start = torch.randn(4, 96, generator=torch.Generator().manual_seed(5)).requires_grad_()
        x = start * 1
        y = other(x) if outside == "before" else 0.0
        y = y + run(x)
        y = y + other(x) if outside == "after" else y
        q.zero_grad(), k.zero_grad()
        y.sum().backward()
        gradients.append([tensor.grad for tensor in (start, *q.parameters(), *k.parameters())])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, rtol=1e-5, atol=1e-5)


def test_fake_tensors_pass_through() -> None:
    """As tools that count memory or operations do."""
    with FakeTensorMode():
        made = quantize_(nn.Linear(96, 8), "w4a4")
        assert made(torch.randn(4, 96, requires_grad=True)).shape == (4, 8)


# --- the weight ----------------------------------------------------------------------------------------------------


def _change(made: QuantizedLinear, change: str) -> None:
    weight = made.weight
    match change:
        case "data":
            weight.data.mul_(1.5)
        case "rows swapped in data":
            weight.data[[0, 1]] = weight.data[[1, 0]]
        case "signs swapped in data":
            weight.data[:, :2] = weight.data[:, :2].abs() * torch.tensor([-1.0, 1.0])
        case "numpy":
            weight.detach().numpy()[3, 5] += 1.0
        case "data assigned":
            weight.data = torch.randn(33, 96)
        case "in place":
            with torch.no_grad():
                weight.neg_()
        case "fused":
            torch.optim.AdamW(made.parameters(), lr=0.5, fused=True).step()
        case "sgd":
            torch.optim.SGD(made.parameters(), lr=0.5).step()
        case "load":
            made.load_state_dict({**made.state_dict(), "weight": torch.randn(33, 96)})
        case "load and assign":
            made.load_state_dict({**made.state_dict(), "weight": torch.randn(33, 96)}, assign=True)
        case "parameter":
            made.weight = nn.Parameter(torch.randn(33, 96))
        case "there and back":
            made.double().weight.data.mul_(2)
            made.float()
        case "under no_grad":
            with torch.no_grad():
                weight.mul_(2)
                made(torch.randn(4, 96))


CHANGES = [
    *("data", "rows swapped in data", "signs swapped in data", "numpy", "data assigned", "in place", "fused", "sgd"),
    *("load", "load and assign", "parameter", "there and back", "under no_grad"),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_quantized_anew(change: str, transposed: bool) -> None:
    made, x = layer(), torch.randn(4, 96)
    if transposed:  # not contiguous, as tied or loaded weights may be
        made.weight = nn.Parameter(made.weight.detach().t().contiguous().t())
    with torch.no_grad():
        made.weight[:, :2] = made.weight[:, :2].abs() * torch.tensor([1.0, -1.0])
    made(x).sum().backward()
    before = made.weight.detach().clone()
    _change(made, change)
    assert not torch.equal(made.weight, before)
    assert torch.equal(made(x), direct(made, x))


def test_another_weight_at_the_same_address_is_quantized_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where contents are not looked at, as on a GPU: the tensor itself is known again, not its number."""
    monkeypatch.setattr("bitquest.nn.quantizer.weight_state", lambda weight: (0,))
    made, x = layer(), torch.randn(4, 96)
    made(x)
    made.weight = nn.Parameter(torch.randn(33, 96))
    assert torch.equal(made(x), direct(made, x))


NOTICED_ON_A_GPU = [
    "in place",
    "fused",
    "sgd",
    "load",
    "load and assign",
    "data assigned",
    "parameter",
    "there and back",
]


@pytest.mark.parametrize("change", NOTICED_ON_A_GPU)
def test_a_changed_weight_is_noticed_without_looking_at_it(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zlib.crc32", lambda data: 0)
    made, x = layer(), torch.randn(4, 96)
    made(x).sum().backward()
    _change(made, change)
    assert torch.equal(made(x), direct(made, x))


def test_copies_do_not_share_a_cache() -> None:
    made, x = layer(), torch.randn(4, 96)
    made(x)
    twin = copy.deepcopy(made)
    assert twin.weight_quantizer._cached is None
    with torch.no_grad():
        twin.weight.neg_()
    assert torch.equal(made(x), direct(made, x))
    assert torch.equal(twin(x), direct(twin, x))


def test_forgetting_quantizes_anew(quantized: list[tuple[int, ...]]) -> None:
    made = layer()
    made(torch.randn(4, 96)), made(torch.randn(4, 96))
    assert quantized.count((33, 96)) == 1
    made.weight_quantizer.forget()
    made(torch.randn(4, 96))
    assert quantized.count((33, 96)) == 2


@pytest.mark.parametrize("name", ["w4a4", "w1a1", "w2a8-2:4"])
def test_micro_batches_add_up_to_the_batch(
    name: str, grouped_config: LlamaConfig, quantized: list[tuple[int, ...]]
) -> None:
    model = quantize_(Llama(grouped_config).init_weights(0), name)
    ids = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(0))

    def gradient(batches: tuple[Tensor, ...]) -> Tensor:
        model.zero_grad()
        for part in batches:
            (F.cross_entropy(model(part).flatten(0, 1), part.flatten()) / len(batches)).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    whole = gradient((ids,))
    layers = 2 * 7
    assert sum(len(shape) == 2 for shape in quantized) == layers  # weights
    assert sum(len(shape) == 3 for shape in quantized) == 2 * 4  # inputs of qkv, o, gate and up, down
    parts = gradient(ids.split(1))
    assert sum(len(shape) == 2 for shape in quantized) == layers  # still the same ones
    assert float((parts - whole).norm() / whole.norm()) < 1e-5

"""Training on integers gives the values and gradients of fake quantization, and keeps only codes and mask bits."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitquest.models import Llama, LlamaConfig
from bitquest.models.fuse import fuse_
from bitquest.nn import QuantizedLinear, Scheme, quantize_, training_backends, weights_held
from bitquest.nn.integer_training import TrainingPlan
from bitquest.ops import Backend
from bitquest.ops.backend import engine
from bitquest.ops.linear_spec import LinearSpec

SCHEMES = ["w1a1", "w2a2", "w3a3", "w4a4", "w8a8", "w1a8", "w4a4-fp4", "w2a2-ternary", "w4a4-g32", "w4a4-2:4"]
SCHEMES += ["w2a8-norot-ste", "w1a1-norot"]


def on_integers(model: nn.Module, backend: Backend = Backend.TORCH) -> nn.Module:
    """The model with its layers on the integer path of a backend that `auto` would not take here."""
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            operands = layer.weight_quantizer.spec, layer.activation_quantizer.spec
            spec = LinearSpec(layer.in_features, layer.out_features, *operands, layer.rotation.block)
            assert engine(backend.value).refuses_training(spec) is None
            layer._plan = TrainingPlan(spec, backend)
    return model


def layer(name: str, bias: bool = False, width: int = 96, out: int = 40) -> QuantizedLinear:
    scheme = Scheme.parse(name)
    torch.manual_seed(3)
    made = nn.Linear(width, out, bias=bias)
    return QuantizedLinear(
        made, weight=scheme.weight, activation=scheme.activation, rotation=scheme.rotation, backend="torch"
    )


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    x = x.clone().requires_grad_()
    y = model(x * 1.0)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=y.dtype))
    assert x.grad is not None
    return y.detach(), [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def near(a: Tensor, b: Tensor, tolerance: float = 2e-6) -> bool:
    return a.dtype == b.dtype and float((a - b).norm()) <= tolerance * float(b.norm())


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_fake_quantization(name: str, bias: bool) -> None:
    x = torch.randn(3, 7, 96)
    expected, wanted = gradients(layer(name, bias), x)
    got, given = gradients(on_integers(layer(name, bias)), x)
    assert near(got, expected)
    assert len(given) == len(wanted)
    assert all(near(a, b) for a, b in zip(given, wanted, strict=True))


def test_layers_that_read_one_input_quantize_and_rotate_back_once() -> None:
    calls: list[str] = []
    q, k = on_integers(layer("w4a4")), on_integers(layer("w4a4", out=24))
    x = torch.randn(5, 96, requires_grad=True)
    inner = x * 1.0
    with torch.profiler.profile() as profile:
        (q(inner).sum() + k(inner).sum()).backward()
    calls = [event.name for event in profile.events() if event.name.startswith("bitquest::")]
    assert calls.count("bitquest::quantize_rows") == 3  # two weights, one input
    assert calls.count("bitquest::mask_rotate") == 3


@pytest.mark.parametrize(("name", "bits"), [("w4a4", 5), ("w1a1", 2), ("w8a8", 9)])
def test_the_backward_pass_keeps_codes_and_mask_bits(name: str, bits: int) -> None:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    made, tokens = on_integers(layer(name, width=512, out=512)), 512
    x = torch.randn(tokens, 512, requires_grad=True) * 1.0
    made(x)  # the weight's rows are cached: what is kept from here on is the input's
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = made(x * 1.0)
    rows = made._weight_rows.get(made.weight, made._plan.weight, None)
    of_weight = sum(
        t.numel() * t.element_size() for t in (rows.factors, rows.packed, rows.step, rows.mask) if t is not None
    )
    assert y.requires_grad
    assert sum(kept.values()) <= tokens * (512 * bits / 8 + 4) + of_weight


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["w1a1", "w4a4", "w2a8-g32-2:4"])
def test_a_model_trains_alike(name: str, checkpointing: bool, grouped_config: LlamaConfig) -> None:
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    results = []
    for prepare in (lambda model: model, on_integers):
        model = prepare(quantize_(Llama(grouped_config).init_weights(0), name, backend="torch")).train()
        model.activation_checkpointing = checkpointing
        F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert near(results[1], results[0], 2e-2)  # a code that flips at a threshold changes the layers behind it


@pytest.fixture
def _compile_afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compile_afresh")
@pytest.mark.parametrize("held", [False, True])
def test_a_compiled_model_is_one_graph(held: bool, grouped_config: LlamaConfig) -> None:
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    model = on_integers(quantize_(Llama(grouped_config).init_weights(0), "w4a4", backend="torch")).train()
    results = []
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for function in (model, compiled):
        model.zero_grad()
        if held:
            with weights_held(model):
                F.cross_entropy(function(ids).flatten(0, 1), ids.flatten()).backward()
        else:
            F.cross_entropy(function(ids).flatten(0, 1), ids.flatten()).backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert near(results[1], results[0], 1e-5)


def test_held_weights_are_quantized_once_and_keep_their_memory() -> None:
    made = on_integers(layer("w4a4"))
    x, pointers = torch.randn(4, 96), []
    for _ in range(2):
        with weights_held(made), torch.profiler.profile() as profile:
            before = made(x.clone())
            made(x.clone())
            pointers.append(made._weight_rows.held.packed.data_ptr())
        names = [event.name for event in profile.events()]
        assert names.count("bitquest::quantize_rows") == 2  # the two inputs
        with torch.no_grad():
            made.weight.mul_(-1)
        assert not torch.equal(made(x.clone()), before)
    assert pointers[0] == pointers[1]


def test_autocast_decides_the_dtype_of_the_product() -> None:
    made, x = on_integers(layer("w4a4")), torch.randn(4, 96, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x * 1.0)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert made.weight.grad is not None
    assert made.weight.grad.dtype == torch.float32


def test_a_pass_for_inference_leaves_nothing_that_training_takes() -> None:
    made, x = on_integers(layer("w4a4")), torch.randn(4, 96)
    with torch.inference_mode():
        made(x)
    made(x.clone()).sum().backward()
    assert made.weight.grad is not None
    assert bool(made.weight.grad.isfinite().all())


# --- on a GPU ------------------------------------------------------------------------------------------------------


def on_gpu(config: LlamaConfig, name: str, backend: str) -> Llama:
    model = quantize_(Llama(config).init_weights(0), name, backend=backend).to("cuda").train()
    assert isinstance(model, Llama)
    return model


def step(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(ids).float().flatten(0, 1), ids.flatten())
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["w1a1", "w4a4", "w8a8", "w2a8-g32"])
@pytest.mark.parametrize("how", ["eager", "checkpointing", "compiled", "graph", "fused"])
def test_a_model_trains_on_the_gpu(name: str, how: str) -> None:
    config = LlamaConfig.preset("1M", vocab_size=97, max_position_embeddings=64, num_hidden_layers=2)
    ids = torch.randint(0, 97, (4, 64), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    expected = step(on_gpu(config, name, "torch"), ids)
    model = on_gpu(config, name, "auto")
    assert training_backends(model) in ("cuda", "triton")
    model.activation_checkpointing = how == "checkpointing"
    if how == "fused":
        fuse_(model)
    if how == "compiled":
        torch._dynamo.reset()
        function = torch.compile(model, fullgraph=True, dynamic=False)
        with weights_held(model):
            got = step(function, ids)
    elif how == "graph":
        got = _captured(model, ids)
    else:
        got = step(model, ids)
    assert near(got, expected, 5e-2)  # bfloat16 products, and codes that flip


def _captured(model: nn.Module, ids: Tensor) -> Tensor:
    """Forward and backward pass as one CUDA graph, replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with weights_held(model):
        with torch.cuda.stream(stream):
            for _ in range(3):
                model.zero_grad(set_to_none=True)
                step(model, ids)
        torch.cuda.current_stream().wait_stream(stream)
        model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(model, ids)
        graph.replay()
        torch.cuda.synchronize()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

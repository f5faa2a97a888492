"""What every engine is asked: packed layers and training like the reference's, values and gradients, every scheme."""

import pytest
import torch
from torch import Tensor, nn

from bitquest.nn import PackedLinear, QuantizedLinear, Scheme
from bitquest.ops.backend import Backend, engine
from bitquest.ops.linear_spec import LinearSpec

SCHEMES = [
    *("w1a1", "w1a2", "w2a2", "w3a3", "w4a4", "w5a5", "w6a6", "w7a7", "w8a8", "w1a8", "w2a8", "w4a8", "w4a1"),
    *("w1a16", "w2a16", "w3a16", "w4a16", "w8a16", "w4a4-fp4", "w2a2-ternary", "w4a16-fp4"),
    *("w4a4-g32", "w1a1-g128", "w8a8-g64", "w2a16-g32", "w4a4-2:4", "w4a4-4:8", "w1a1-2:4", "w4a16-2:4"),
    *("w1a1-norot", "w4a4-ste", "w4a4-clip"),
]
TRAINED = [name for name in SCHEMES if "a16" not in name]


def linear(name: str, width: int, out: int, seed: int) -> QuantizedLinear:
    """A layer of fake-quantized floats, the same for the same seed."""
    scheme = Scheme.parse(name)
    torch.manual_seed(seed)
    return QuantizedLinear(
        nn.Linear(width, out),
        weight=scheme.weight,
        activation=scheme.activation,
        rotation=scheme.rotation,
        backend="torch",
    )


def near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return a.dtype == b.dtype and bool(a.isfinite().all()) and float((a - b).norm()) <= tolerance * float(b.norm())


def spec_of(layer: QuantizedLinear) -> LinearSpec:
    weight, activation = layer.weight_quantizer.spec, layer.activation_quantizer.spec
    return LinearSpec(layer.in_features, layer.out_features, weight, activation, layer.rotation.block)


def _same_codes(backend: str, operand: Tensor, layer: QuantizedLinear, of_weight: bool) -> bool:
    spec = spec_of(layer)
    quantizer = spec.weight if of_weight else spec.activation
    used = engine(backend)
    if quantizer is None or used.refuses_rows(quantizer, spec.block) is not None:
        return True
    packed = [
        e.quantize_rows(operand, quantizer, spec.block, frozenset({"packed"})).packed for e in (used, engine("torch"))
    ]
    assert packed[0] is not None
    assert packed[1] is not None
    return torch.equal(packed[0], packed[1])


def inputs(backend: str, device: torch.device, name: str, tokens: int, width: int, out: int) -> tuple[int, Tensor]:
    """A seed of the layer and an input, none of whose codes lies so near a threshold that rounding decides it."""
    for seed in range(50):
        layer = linear(name, width, out, seed).to(device)
        x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(device)
        operands = [(x.to(dtype), False) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
        if all(_same_codes(backend, t, layer, w) for t, w in [*operands, (layer.weight.detach(), True)]):
            return seed, x
    raise AssertionError("codes differ with every seed: this is no rounding at a threshold")


def check_packed(backend: str, device: torch.device, name: str, tokens: int, width: int, out: int) -> None:
    """A packed layer on this backend is the one on torch, in float32, bfloat16 and float16."""
    refused = engine(backend).refuses(spec_of(linear(name, width, out, 0)))
    if refused is not None:
        pytest.skip(f"{backend}: {refused}")
    seed, x = inputs(backend, device, name, tokens, width, out)
    layer = linear(name, width, out, seed)
    reference = PackedLinear.of(layer, backend="torch").to(device)
    packed = PackedLinear.of(layer.to(device), backend=backend)
    assert near(packed(x), reference(x), 1e-5)
    for dtype, tolerance in ((torch.bfloat16, 8e-3), (torch.float16, 1e-3)):  # one ulp: the interpreter cuts bfloat16
        assert near(packed(x.to(dtype)).float(), reference(x.to(dtype)).float(), tolerance)


def check_training(backend: str, device: torch.device, name: str, tokens: int, width: int, out: int) -> None:
    """Values and gradients of x, weight and bias are those of fake quantization."""
    refused = engine(backend).refuses_training(spec_of(linear(name, width, out, 0)))
    if refused is not None:
        pytest.skip(f"{backend}: {refused}")
    seed, fixed = inputs(backend, device, name, 2 * tokens, width, out)
    results = []
    for used in ("torch", backend):
        made = linear(name, width, out, seed).to(device)
        made.backend = Backend(used)
        made._plan = made._make_plan()
        assert made.training_backend == used
        x = fixed.reshape(2, tokens, width).clone().requires_grad_()
        y = made(x * 1.0)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(8)).to(device))
        results.append((y.detach(), x.grad, made.weight.grad, made.bias.grad))
    for expected, got in zip(*results, strict=True):
        assert expected is not None
        assert got is not None
        assert near(got, expected, 2e-5)


def check_no_tokens(backend: str, device: torch.device) -> None:
    packed = PackedLinear.of(linear("w4a4", 128, 10, 0).to(device), backend=backend)
    assert packed(torch.randn(2, 0, 128, device=device)).shape == (2, 0, 10)

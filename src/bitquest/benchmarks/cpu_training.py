"""Training on a CPU: the whole step against the unquantized float32 one, and what inputs cost until the backward."""

from typing import Any

import torch
from torch import Tensor, nn

from bitquest.benchmarks.train_step import StepShape, compare_train_step
from bitquest.nn import QuantizedLinear, quantize_


def measure_step(scheme: str, shape: StepShape, repetitions: int) -> dict[str, Any]:
    """Seconds of a step at the scheme, on the backend that trains it fastest, and without quantization."""
    found = compare_train_step(["none", scheme], shape, repetitions).to_json()
    ours = found["schemes"][scheme]
    speedup = {"of_medians": 1 / ours["ratio_of_medians"], "of_minima": 1 / ours["ratio_of_minima"]}
    return {"shape": found["shape"], "schemes": found["schemes"], "speedup": speedup}


def measure_memory(scheme: str, width: int, tokens: int = 64) -> dict[str, Any]:
    """Bytes that a linear layer of width×width keeps of its input for the backward, at a scheme and in float32.

    What is kept for each further token, so that the weight's part, kept once, is not counted. The float32 scale of each
    token is listed apart.
    """
    plain = nn.Linear(width, width, bias=False)
    layer = quantize_(nn.Sequential(nn.Linear(width, width, bias=False)), scheme)[0]  # type: ignore[index]
    assert isinstance(layer, QuantizedLinear)
    kept = {name: _kept_per_token(made, width, tokens) for name, made in (("float32", plain), ("ours", layer))}
    data = kept["ours"]["bytes"] - kept["ours"]["scales"]
    return {
        "width": width,
        "backend": layer.training_backend.value,
        "bytes_per_token": kept,
        "bits_per_element": {"codes_and_masks": 8 * data / width, "with_scales": 8 * kept["ours"]["bytes"] / width},
        "ratio": kept["float32"]["bytes"] / data,
        "ratio_with_scales": kept["float32"]["bytes"] / kept["ours"]["bytes"],
    }


def _kept_per_token(layer: nn.Module, width: int, tokens: int) -> dict[str, float]:
    few, many = _kept(layer, width, tokens), _kept(layer, width, 2 * tokens)
    return {name: (many[name] - few[name]) / tokens for name in few}


def _kept(layer: nn.Module, width: int, tokens: int) -> dict[str, int]:
    """Bytes of the memory that autograd keeps after a forward pass, each once; and those of float32 columns (T, 1)."""
    memory: dict[int, tuple[int, bool]] = {}

    def keep(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        is_scale = saved.dtype == torch.float32 and saved.dim() == 2 and saved.shape[1] == 1
        memory[storage.data_ptr()] = (storage.nbytes(), is_scale)
        return saved

    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        y = layer(x * 1.0)
    del y
    return {
        "bytes": sum(size for size, _ in memory.values()),
        "scales": sum(size for size, is_scale in memory.values() if is_scale),
    }

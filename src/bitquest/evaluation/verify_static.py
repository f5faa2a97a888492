"""What can be compared without running anything: descriptions, weight codes, steps, and all other tensors, exactly.

N out_features, K in_features.
"""

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bitquest.evaluation.verify_report import Check
from bitquest.models import Llama, Tokenizer
from bitquest.nn import PackedEmbedding, PackedLinear, QuantizedEmbedding, QuantizedLinear
from bitquest.numerics.quantizer import Quantizer

TrainedLayer = QuantizedLinear | QuantizedEmbedding
PackedLayer = PackedLinear | PackedEmbedding


def trained_layers(model: nn.Module) -> dict[str, TrainedLayer]:
    """Quantized layers by name, in the order of the model."""
    return {
        n: m
        for n, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, (QuantizedLinear, QuantizedEmbedding))
    }


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Packed layers by name, in the order of the model."""
    return {
        n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, (PackedLinear, PackedEmbedding))
    }


def is_comparable(trained: Llama, packed: Llama) -> bool:
    """Whether the two have the same configuration and the same layers of the same shapes, so that both can be run."""
    ours, theirs = trained_layers(trained), packed_layers(packed)
    return (
        trained.config == packed.config
        and list(ours) == list(theirs)
        and all(_shape(ours[name]) == _shape(theirs[name]) for name in ours)
    )


def check_description(
    trained: Llama, packed: Llama, ours: Tokenizer, theirs: Tokenizer | None, rounded: Collection[str] = ()
) -> Check:
    """The model's configuration, the tokenizer, and each layer's quantizers and rotation.

    rounded: names of the tables that the packed model's metadata call rounded after training.
    """
    failures: list[str] = []
    before, after = trained.config.to_json(), packed.config.to_json()
    failures += [
        f"{key}: trained {before[key]!r}, packed {after[key]!r}" for key in before if before[key] != after[key]
    ]
    if theirs is None:
        failures.append("the packed model has no tokenizer")
    elif theirs.sha256 != ours.sha256:
        failures.append("the packed model's tokenizer is not the run's")
    layers, found = trained_layers(trained), packed_layers(packed)
    failures += [
        f"{name}: {'rounded, as the metadata say' if name in rounded else 'quantized in training'}, not packed"
        for name in layers
        if name not in found
    ]
    failures += [f"{name}: packed, not quantized in training" for name in found if name not in layers]
    for name in layers:
        if name in found:
            was, now = describe(layers[name]), describe(found[name])
            failures += [f"{name}: {key}: {_distinction(was[key], now[key])}" for key in was if was[key] != now[key]]
    return Check.of("description", f"{len(layers)} layers, configuration and tokenizer", failures)


def describe(layer: TrainedLayer | PackedLayer) -> dict[str, Any]:
    """What a layer is, apart from its numbers."""
    if isinstance(layer, (QuantizedLinear, QuantizedEmbedding)):
        weight = layer.weight_quantizer.spec
        activation = layer.activation_quantizer.spec if isinstance(layer, QuantizedLinear) else None
    else:
        weight = layer.weight_spec
        activation = layer.activation_spec if isinstance(layer, PackedLinear) else None
    return {"shape": _shape(layer), "weight": weight, "activation": activation, "rotation": layer.rotation}


def _distinction(trained: Any, packed: Any) -> str:
    """Two things that differ; of two quantizers, the parts that do."""
    if isinstance(trained, Quantizer) and isinstance(packed, Quantizer):
        parts = [part.name for part in dataclasses.fields(Quantizer)]
        parts = [part for part in parts if getattr(trained, part) != getattr(packed, part)]
        was, now = (", ".join(f"{part} {getattr(q, part)}" for part in parts) for q in (trained, packed))
        return f"trained {was}, packed {now}"
    return f"trained {trained}, packed {packed}"


def _shape(layer: TrainedLayer | PackedLayer) -> tuple[str, int, int]:
    if isinstance(layer, (QuantizedEmbedding, PackedEmbedding)):
        return "embedding", layer.num_embeddings, layer.embedding_dim
    return "linear", layer.out_features, layer.in_features


def check_weights(trained: Llama, packed: Llama) -> Check:
    """Weight codes, kept masks and steps of every layer, equal exactly."""
    failures: list[str] = []
    codes = steps = 0
    for name, layer, twin in _pairs(trained, packed):
        was, now = layer.encode_weight(), twin.encode_weight()
        if was is None or now is None:
            if (was is None) != (now is None):
                failures.append(
                    f"{name}: the weight is {'packed' if was is None else 'trained'} as codes, the other not"
                )
            continue
        codes, steps = codes + was.codes.numel(), steps + was.step.numel()
        failures += _differences(f"{name}: kept mask", was.kept, now.kept)
        failures += _differences(f"{name}: weight codes", was.codes, now.codes)
        failures += _differences(f"{name}: steps", was.step, now.step)
    return Check.of("weights", f"{codes} codes and {steps} steps equal", failures, {"codes": codes, "steps": steps})


def check_tensors(trained: Llama, packed: Llama) -> Check:
    """Everything that is not a code or a step, bit for bit: norms, embedding, head, biases, learned steps."""
    failures: list[str] = []
    ours, theirs = dict(_other_tensors(trained)), dict(_other_tensors(packed))
    failures += [f"{name}: missing in the packed model" for name in ours if name not in theirs]
    failures += [f"{name}: only in the packed model" for name in theirs if name not in ours]
    numbers = 0
    for name in ours:
        if name in theirs:
            numbers += ours[name].numel()
            failures += _differences(name, ours[name], theirs[name])
    summary = f"{len(ours)} tensors, {numbers} numbers equal bit for bit"
    return Check.of("tensors", summary, failures, {"tensors": len(ours), "numbers": numbers})


def _pairs(trained: Llama, packed: Llama) -> Iterator[tuple[str, TrainedLayer, PackedLayer]]:
    theirs = packed_layers(packed)
    for name, layer in trained_layers(trained).items():
        if name in theirs and _shape(layer) == _shape(theirs[name]):
            yield name, layer, theirs[name]


def _other_tensors(model: Llama) -> Iterator[tuple[str, Tensor]]:
    layers: dict[str, TrainedLayer | PackedLayer] = {**trained_layers(model), **packed_layers(model)}
    parts: tuple[Tensor | None, ...]
    for name, layer in layers.items():
        if isinstance(layer, QuantizedLinear):
            unquantized = layer.quantized_weight() if layer.weight_quantizer.spec is None else None
            parts = (layer.bias, layer.activation_quantizer.effective_step(), unquantized)
        elif isinstance(layer, PackedLinear):
            parts = (layer.bias, layer.activation_step, layer.float_weight)
        else:
            continue
        for suffix, tensor in zip(("bias", "activation step", "rotated weight"), parts, strict=True):
            if tensor is not None:
                yield f"{name}, {suffix}", tensor.detach()
    prefixes = tuple(f"{name}." for name in layers)
    yield from ((name, tensor) for name, tensor in model.state_dict().items() if not name.startswith(prefixes))


def _differences(what: str, trained: Tensor | None, packed: Tensor | None) -> list[str]:
    """One line if two tensors are not the same bits: how many differ, and the first of them."""
    if trained is None or packed is None:
        return [] if trained is None and packed is None else [f"{what}: only one of the two has it"]
    if trained.shape != packed.shape or trained.dtype != packed.dtype:
        return [f"{what}: trained {trained.dtype} {tuple(trained.shape)}, packed {packed.dtype} {tuple(packed.shape)}"]
    size = trained.element_size()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    packed = packed.to(trained.device)
    differ = trained.contiguous().view(bits) != packed.contiguous().view(bits)
    count = int(differ.sum())
    if not count:
        return []
    place = tuple(differ.nonzero()[0].tolist())
    return [
        f"{what}: {count} of {trained.numel()} differ, the first at {list(place)}: "
        f"trained {trained[place].item()!r}, packed {packed[place].item()!r}"
    ]

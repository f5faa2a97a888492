"""Builds the model of a packed directory, or puts its layers and tensors into a module that is passed in."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from bitquest.errors import ConfigError, FormatError
from bitquest.export.format import LayerSpec
from bitquest.export.reader import PackedFile, layer_prefix, open_packed
from bitquest.models import Llama, LlamaConfig
from bitquest.models.llama import rope_tables
from bitquest.nn import PackedEmbedding, PackedLinear
from bitquest.ops.backend import Backend, resolve_backend

_SHOWN = 5


def load(
    dir: str | os.PathLike[str],
    model: nn.Module | None = None,
    device: str | torch.device = "cpu",
    backend: str | Backend = "auto",
) -> nn.Module:
    """The model that `save` wrote, ready to run: packed layers, eval mode, on the device.

    model None rebuilds the Llama of the configuration. Another module is changed in place and returned: its Linear and
    Embedding layers named in the file become packed ones, its other tensors take the stored values and types.
    Raises FormatError for a damaged or impossible file, and where the module's names and the file's differ (the module
    is then unchanged).
    """
    chosen = resolve_backend(backend)
    target = usable_device(device)
    with open_packed(Path(dir)) as packed:
        try:
            if model is not None:
                return _fill(model, packed, target, chosen).to(target).eval()
            if packed.llama is None:
                raise FormatError(
                    f"{packed.folder} holds the layers of a module of your own; pass it: load(dir, model=module)"
                )
            return _llama(packed.llama, packed, target, chosen)
        except ConfigError as error:
            raise FormatError(f"{packed.folder}: {error}") from None


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name. Raises ConfigError, with PyTorch's reason, if there is none or it cannot be used."""
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device {str(device)!r} cannot be used here: {reason}. Take cpu") from None
    return target


def _llama(config: LlamaConfig, packed: PackedFile, device: torch.device, backend: Backend) -> Llama:
    with torch.device("meta"):
        model = Llama(config)
    for name in packed.plain:
        if not packed.entry(name).dtype.is_floating_point:
            raise FormatError(f"{packed.where}: tensor {name!r} is {packed.entry(name).dtype}, expected a float")
    _fill(model, packed, device, backend)
    decoder = model.model
    decoder.cos, decoder.sin = rope_tables(config, device)
    return model.requires_grad_(False).eval()


def _fill(model: nn.Module, packed: PackedFile, device: torch.device, backend: Backend) -> nn.Module:
    """Check every name and shape, read everything, and only then touch the module."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for fqn, spec in packed.layers.items():
        _check_layer(modules.get(fqn), fqn, spec, packed)
    state = model.state_dict(keep_vars=True)
    _check_plain(state, packed)
    read: dict[tuple[str, object], Tensor] = {}

    def on_device(name: str, tensor: Tensor, meaning: object = None) -> Tensor:
        """Names that share a tensor in the file, and read it in the same way, share it in memory."""
        return read.setdefault((packed.shared.get(name, name), meaning), tensor.to(device))

    layers = {
        fqn: _packed_layer(
            spec,
            {
                suffix: on_device(
                    layer_prefix(fqn) + suffix, tensor, (spec.out_features, spec.in_features, spec.weight)
                )
                for suffix, tensor in packed.read_layer(fqn).items()
            },
            backend,
        )
        for fqn, spec in packed.layers.items()
    }
    plain = {name: on_device(name, packed.read(name)) for name in packed.plain}
    parameters: dict[int, nn.Parameter] = {}
    for name, tensor in plain.items():
        parent, _, leaf = name.rpartition(".")
        owner, before = modules[parent], state[name]
        if isinstance(before, nn.Parameter):
            made = nn.Parameter(tensor, requires_grad=before.requires_grad)
            owner.register_parameter(leaf, parameters.setdefault(id(tensor), made))
        else:
            owner._buffers[leaf] = tensor
    for fqn, layer in layers.items():
        if not fqn:
            return layer
        parent, _, leaf = fqn.rpartition(".")
        setattr(modules[parent], leaf, layer)
    return model


def _packed_layer(spec: LayerSpec, tensors: dict[str, Tensor], backend: Backend) -> PackedLinear | PackedEmbedding:
    if spec.kind == "embedding":
        assert spec.weight is not None
        return PackedEmbedding(
            spec.out_features,
            spec.in_features,
            weight=spec.weight,
            rotation=spec.rotation,
            packed=tensors["codes"],
            step=tensors["step"],
            kept=tensors.get("kept"),
        )
    return PackedLinear(
        spec.in_features,
        spec.out_features,
        weight=spec.weight,
        activation=spec.activation,
        rotation=spec.rotation,
        packed=tensors.get("codes"),
        step=tensors.get("step"),
        kept=tensors.get("kept"),
        bias=tensors.get("bias"),
        activation_step=tensors.get("activation_step"),
        float_weight=tensors.get("float_weight"),
        backend=backend,
    )


def _check_layer(module: nn.Module | None, fqn: str, spec: LayerSpec, packed: PackedFile) -> None:
    name = f"{packed.folder}: layer {fqn!r}"
    if isinstance(module, nn.Linear | PackedLinear) and spec.kind == "linear":
        n, k, bias = module.out_features, module.in_features, module.bias is not None
    elif isinstance(module, nn.Embedding | PackedEmbedding) and spec.kind == "embedding":
        n, k, bias = module.num_embeddings, module.embedding_dim, False
    elif module is None:
        raise FormatError(f"{name} is not in the module")
    else:
        raise FormatError(f"{name} is a {spec.kind} layer in the file, and {type(module).__name__} in the module")
    if (n, k, bias) != (spec.out_features, spec.in_features, spec.bias):
        raise FormatError(
            f"{name} is ({spec.out_features}, {spec.in_features}), bias {spec.bias}, in the file, "
            f"and ({n}, {k}), bias {bias}, in the module"
        )


def _check_plain(state: dict[str, Tensor], packed: PackedFile) -> None:
    prefixes = tuple(layer_prefix(fqn) for fqn in packed.layers)
    wanted = {name for name in state if not name.startswith(prefixes)}
    missing, extra = sorted(wanted - set(packed.plain)), sorted(set(packed.plain) - wanted)
    if missing or extra:
        parts = [
            f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}"
            for names, what in ((missing, "tensors of the model are missing"), (extra, "tensors are not the model's"))
            if names
        ]
        raise FormatError(f"{packed.where} does not fit the model; {'; '.join(parts)}")
    for name in packed.plain:
        entry, tensor = packed.entry(name), state[name]
        same_kind = entry.dtype == tensor.dtype or (entry.dtype.is_floating_point and tensor.is_floating_point())
        if entry.shape != tuple(tensor.shape) or not same_kind:
            raise FormatError(
                f"{packed.where}: tensor {name!r} is {entry.dtype} {entry.shape}, "
                f"the model has {tensor.dtype} {tuple(tensor.shape)}"
            )

"""Writes a packed model, layer by layer, from a trained one that stays as it is; a directory is whole or absent."""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from bitquest.errors import ConfigError, FormatError, UserError
from bitquest.export.codes import codes_to_bytes
from bitquest.export.format import (
    CONFIG,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    MODEL,
    TOKENIZER,
    LayerSpec,
    check_step,
    common_scheme,
)
from bitquest.export.manifest import canonical_json, manifest_bytes
from bitquest.export.tensorfile import write_tensors
from bitquest.files import sync
from bitquest.models import Llama, Tokenizer
from bitquest.nn import PackedEmbedding, PackedLinear, QuantizedEmbedding, QuantizedLinear
from bitquest.numerics.quantizer import Quantizer

Identity = tuple[Any, ...]
_QUANTIZED = (QuantizedLinear, QuantizedEmbedding)
_PACKED = (PackedLinear, PackedEmbedding)


def save(
    model: nn.Module,
    dir: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    metadata: Mapping[str, Any] | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write a model, its quantized layers packed, as a directory that `load` reads. Returns the directory.

    Takes models with quantized layers (which stay as they are), packed ones, and plain ones. Tensors that are not
    quantized keep their type, weights that are shared are stored once. The same model gives the same bytes. metadata: a
    JSON object kept beside it. overwrite: replace a packed model that stands there. Raises FormatError for what the
    format cannot hold, ConfigError if the directory exists, and UserError if it cannot be written; nothing half-written
    is left.
    """
    out = Path(dir)
    _check_target(out, overwrite)
    layers, tensors, shared = _gather(model)
    config = _config(model, layers, shared, metadata or {})
    if tokenizer is not None and isinstance(model, Llama) and tokenizer.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} words, the model {model.config.vocab_size}: "
            "they do not belong together"
        )
    contents: dict[str, Callable[[BinaryIO], Any]] = {
        MODEL: lambda file: write_tensors(file, tensors),
        CONFIG: lambda file: file.write(config),
    }
    if tokenizer is not None:
        text = tokenizer.to_json().encode("utf-8")
        contents[TOKENIZER] = lambda file: file.write(text)
    _write_directory(out, contents)
    return out


# --- what is written -----------------------------------------------------------------------------------------------


def _gather(model: nn.Module) -> tuple[dict[str, LayerSpec], dict[str, Tensor], dict[str, str]]:
    """Packed layers by name, stored CPU tensors by name, and the names that are others' tensors."""
    layers: dict[str, LayerSpec] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[Identity, str] = {}

    def keep(name: str, identity: Identity, made: Callable[[], Tensor]) -> None:
        owner = first.setdefault(identity, name)
        if owner != name:
            shared[name] = owner
        else:
            tensors[name] = made().detach().cpu()

    with torch.no_grad():
        for fqn, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, (*_QUANTIZED, *_PACKED)):
                _gather_layer(fqn, module, layers, keep)
        prefixes = tuple(_prefix(fqn) for fqn in layers)
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name.startswith(prefixes):
                continue
            if not isinstance(tensor, Tensor):
                raise FormatError(f"{name}: a state of type {type(tensor).__name__} has no place in this format")
            keep(name, _storage(tensor), lambda tensor=tensor: tensor)  # type: ignore[misc]
    return layers, tensors, shared


def _prefix(fqn: str) -> str:
    return f"{fqn}." if fqn else ""


def _storage(tensor: Tensor) -> Identity:
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def _gather_layer(
    fqn: str,
    module: nn.Module,
    layers: dict[str, LayerSpec],
    keep: Callable[[str, Identity, Callable[[], Tensor]], None],
) -> None:
    where = fqn or "the module"
    try:
        packed = _pack(module)
        spec = LayerSpec.of(packed)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    layers[fqn] = spec
    stored: dict[str, Tensor] = {}
    encoded = packed.encode_weight()
    if encoded is not None:
        stored = codes_to_bytes(encoded.codes, encoded.kept, spec) | {"step": encoded.step}
    if isinstance(packed, PackedLinear):
        others = {"float_weight": packed.float_weight, "activation_step": packed.activation_step, "bias": packed.bias}
        stored |= {suffix: tensor for suffix, tensor in others.items() if tensor is not None}
    _check_layer(spec, stored, where)
    source = _source(module, spec)
    for suffix, tensor in stored.items():
        mine = suffix in ("bias", "activation_step")
        identity = ("layer", id(module), suffix) if mine else (*source, suffix)
        keep(_prefix(fqn) + suffix, identity, lambda tensor=tensor: tensor)  # type: ignore[misc]


def _pack(module: nn.Module) -> PackedLinear | PackedEmbedding:
    if isinstance(module, QuantizedLinear):
        return PackedLinear.of(module)
    if isinstance(module, QuantizedEmbedding):
        return PackedEmbedding.of(module)
    assert isinstance(module, _PACKED)
    return module


def _source(module: nn.Module, spec: LayerSpec) -> Identity:
    """What two layers have in common that share one packed weight: the trained weight, or the codes."""
    how = (spec.weight, spec.rotation)
    if isinstance(module, _QUANTIZED):
        learned = () if module.weight_quantizer.step is None else (id(module.weight_quantizer.step),)
        return ("weight", *_storage(module.weight), *how, *learned)
    assert isinstance(module, _PACKED)
    held = module.packed if module.packed is not None else getattr(module, "float_weight", None)
    assert isinstance(held, Tensor)
    return ("codes", *_storage(held), *how)


def _check_layer(spec: LayerSpec, stored: Mapping[str, Tensor], where: str) -> None:
    """What the reader will ask of the layer, asked before anything is written."""
    wanted = spec.tensors()
    if set(stored) != set(wanted):
        raise FormatError(f"{where}: holds {sorted(stored)}, and a layer like it has {sorted(wanted)}")
    for suffix, (dtype, shape) in wanted.items():
        tensor = stored[suffix]
        if tuple(tensor.shape) != shape or (tensor.dtype != dtype if dtype else not tensor.is_floating_point()):
            raise FormatError(f"{where}.{suffix}: {tensor.dtype} {tuple(tensor.shape)} instead of {dtype} {shape}")
    if "activation_step" in stored and bool(stored["activation_step"].isnan().any()):
        raise FormatError(f"{where}: its learned activation step was never set; run a batch through the model first")
    for suffix in ("step", "activation_step"):
        if suffix in stored:
            check_step(stored[suffix], f"{where}.{suffix}")


def _config(
    model: nn.Module, layers: dict[str, LayerSpec], shared: dict[str, str], metadata: Mapping[str, Any]
) -> bytes:
    quantizers: list[Quantizer] = []

    def index(quantizer: Quantizer) -> int:
        if quantizer not in quantizers:
            quantizers.append(quantizer)
        return quantizers.index(quantizer)

    described = {name: spec.to_json(index) for name, spec in layers.items()}
    scheme = common_scheme(layers)
    fields = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "architecture": "llama" if isinstance(model, Llama) else None,
        "model": model.config.to_json() if isinstance(model, Llama) else None,
        "scheme": None if scheme is None else scheme.to_json(),
        "quantizers": [quantizer.to_json() for quantizer in quantizers],
        "layers": described,
        "shared": shared,
        "metadata": dict(metadata),
    }
    try:
        return canonical_json(fields) + b"\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metadata must be JSON (strings, finite numbers, lists, objects): {error}") from None


# --- onto the disk -------------------------------------------------------------------------------------------------


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise ConfigError(f"{out}: there is a file of this name; choose another directory")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{out} exists; choose another directory, or replace it with --overwrite (overwrite=True)")
    foreign = {entry.name for entry in out.iterdir()} - {CONFIG, MODEL, TOKENIZER, MANIFEST}
    if foreign or not (out / MANIFEST).is_file():
        raise ConfigError(f"{out} is not only a packed model, so it is not overwritten; choose another directory")


def _write_directory(out: Path, contents: Mapping[str, Callable[[BinaryIO], Any]]) -> None:
    """Everything beside its place, synced, the manifest last; then one rename."""
    out = Path(os.path.abspath(out))
    aside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        listed = {name: _write_file(aside / name, write) for name, write in contents.items()}
        manifest = manifest_bytes(listed)
        _write_file(aside / MANIFEST, lambda file: file.write(manifest))
        sync(aside)
        _rename(aside, out)
        sync(out.parent)
    except BaseException as error:
        with suppress(OSError):
            shutil.rmtree(aside)
        if isinstance(error, OSError):
            raise UserError(f"{out}: could not be written: {error.strerror or error}; nothing was kept") from error
        raise


def _write_file(path: Path, write: Callable[[BinaryIO], Any]) -> tuple[int, str]:
    with path.open("xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _rename(aside: Path, out: Path) -> None:
    if not out.is_dir() or not any(out.iterdir()):
        os.replace(aside, out)
        return
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    os.replace(out, old)
    try:
        os.replace(aside, out)
    except BaseException:
        os.replace(old, out)
        raise
    shutil.rmtree(old)

"""Turn the layers of any module into quantized ones for training, and those into packed ones for running."""

from collections.abc import Callable

from torch import nn

from bitquest.errors import ConfigError
from bitquest.nn.embedding import PackedEmbedding, QuantizedEmbedding
from bitquest.nn.linear import QuantizedLinear
from bitquest.nn.packed_linear import PackedLinear
from bitquest.nn.scheme import Scheme
from bitquest.ops.backend import Backend

Filter = Callable[[nn.Module, str], bool]
HEAD = "lm_head"


def is_head(fqn: str) -> bool:
    """Whether a module of this name is the `lm_head`."""
    return fqn.rsplit(".", 1)[-1] == HEAD


def quantize_(
    model: nn.Module, scheme: Scheme | str, filter_fn: Filter | None = None, backend: str | Backend = Backend.AUTO
) -> nn.Module:
    """Replace linear layers by QuantizedLinear, in place, for training at the scheme's widths. Returns the model.

    filter_fn(module, fqn) says which layers (of the very type nn.Linear) are taken; the default takes every one but
    `lm_head`. Embeddings and `lm_head` follow the scheme's own `embedding` and `head`, whatever the filter says.
    backend: which code trains the layers; `auto` takes the fastest that is there for the device of each (bitquest
    doctor lists them), `torch` multiplies fake-quantized floats.
    Parameters keep their names and identity, so optimizers and checkpoints made before still fit.
    Raises ConfigError naming the layer whose width does not fit, and where there is nothing to quantize.
    """
    scheme = Scheme.parse(scheme) if isinstance(scheme, str) else scheme
    _check_tied(model, scheme)
    replacements: dict[str, nn.Module] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLinear | QuantizedEmbedding | PackedLinear | PackedEmbedding):
            raise ConfigError(f"{fqn or 'the module'} is quantized already; quantize_ takes a plain model")
        try:
            made = _quantized(module, fqn, scheme, filter_fn, backend)
        except ConfigError as error:
            raise type(error)(f"{fqn or 'the module'}: {error}") from None
        if made is not None:
            replacements[fqn] = made
    if not replacements and scheme != Scheme.parse("none"):
        raise ConfigError("found no nn.Linear to quantize in this module (or filter_fn refused them all)")
    return replace_modules(model, replacements)


def _quantized(
    module: nn.Module, fqn: str, scheme: Scheme, filter_fn: Filter | None, backend: str | Backend
) -> nn.Module | None:
    if isinstance(module, nn.Embedding):
        if scheme.embedding is None:
            return None
        if type(module) is not nn.Embedding:
            raise ConfigError(
                f"{type(module).__name__} has a forward of its own, which a quantized embedding would lose; "
                "use a scheme that leaves the embedding as it is"
            )
        return QuantizedEmbedding(module, weight=scheme.embedding, rotation=scheme.rotation)
    if type(module) is not nn.Linear:  # a subclass has a forward of its own, which a replacement would lose
        return None
    if is_head(fqn):
        if scheme.head is None:
            return None
        return QuantizedLinear(
            module, weight=scheme.head, activation=None, rotation=scheme.rotation, backend=Backend.AUTO
        )
    if scheme.is_plain or (filter_fn is not None and not filter_fn(module, fqn)):
        return None
    return QuantizedLinear(
        module, weight=scheme.weight, activation=scheme.activation, rotation=scheme.rotation, backend=backend
    )


def _check_tied(model: nn.Module, scheme: Scheme) -> None:
    """A table used by both the embedding and the head has one quantizer or none."""
    if scheme.embedding == scheme.head:
        return
    tables = {id(m.weight): fqn for fqn, m in model.named_modules() if isinstance(m, nn.Embedding)}
    for fqn, module in model.named_modules():
        if isinstance(module, nn.Linear) and is_head(fqn) and id(module.weight) in tables:
            raise ConfigError(
                f"{fqn} and {tables[id(module.weight)]} share one weight; quantize both alike, or neither"
            )


def pack_(model: nn.Module, backend: str | Backend = Backend.AUTO) -> nn.Module:
    """Replace QuantizedLinear and QuantizedEmbedding by their packed forms, in place. Returns the model.

    Layers that share a weight share its codes afterwards. Raises ConfigError for a layer that has no packed form.
    """
    replacements: dict[str, nn.Module] = {}
    by_weight: dict[tuple[int, str], PackedLinear | PackedEmbedding] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, QuantizedLinear | QuantizedEmbedding):
            continue
        packed: PackedLinear | PackedEmbedding
        try:
            packed = (
                PackedLinear.of(module, backend) if isinstance(module, QuantizedLinear) else PackedEmbedding.of(module)
            )
        except ConfigError as error:
            raise ConfigError(f"{fqn or 'the module'}: {error}") from None
        twin = by_weight.setdefault((id(module.weight), module.weight_quantizer.text), packed)
        if twin is not packed:
            _share(packed, twin)
        replacements[fqn] = packed
    return replace_modules(model, replacements)


def _share(packed: PackedLinear | PackedEmbedding, twin: PackedLinear | PackedEmbedding) -> None:
    """Let two layers of one weight hold one copy of its codes."""
    if twin.packed is None:
        return
    packed.packed, packed.step, packed.kept = twin.packed, twin.step, twin.kept
    if isinstance(packed, PackedLinear):
        packed.prepare()


def replace_modules(model: nn.Module, replacements: dict[str, nn.Module]) -> nn.Module:
    """Put modules at their names, in place. Returns the model, which is the replacement of "" if there is one."""
    if "" in replacements:
        return replacements[""]  # the model is itself a linear layer: nothing holds it, so it is returned
    for fqn, module in replacements.items():
        parent, _, name = fqn.rpartition(".")
        setattr(model.get_submodule(parent), name, module)
    return model

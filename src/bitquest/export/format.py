"""The packed format, version 1: what docs/format.md says, as values that the writer and the reader share.

N out_features (or words), K in_features (or embedding_dim).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bitquest.errors import ConfigError, FormatError
from bitquest.nn import PackedEmbedding, PackedLinear, Scheme
from bitquest.numerics.grids import CodebookGrid
from bitquest.numerics.packing import packed_width
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import BlockHadamard, NoRotation, Rotation, rotation_from_json
from bitquest.numerics.scaling import PerGroup
from bitquest.numerics.sparsity import NofM

FORMAT = "bitquest-packed"
FORMAT_VERSION = 1

CONFIG, MODEL, TOKENIZER, MANIFEST = "config.json", "model.safetensors", "tokenizer.json", "manifest.json"

# No size of a layer or a model may exceed this: every product of two of them then fits 64 bits.
LARGEST_SIZE = 1 << 28

HEAD = "lm_head"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerSpec:
    """One packed layer as config.json describes it; from it follow the names, types and shapes of its tensors.

    kind "linear" or "embedding"; weight None: the float32 weight in rotated space is stored.
    """

    kind: Literal["linear", "embedding"]
    out_features: int
    in_features: int
    weight: Quantizer | None
    activation: Quantizer | None
    rotation: Rotation
    bias: bool

    def __post_init__(self) -> None:
        n, k = self.out_features, self.in_features
        for size in (n, k):
            if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= LARGEST_SIZE:
                raise ConfigError(f"{size!r} is no width of a layer")
        if self.rotation.resolve(k) != self.rotation:
            raise ConfigError(f"{self.rotation} does not name the block size of a layer of width {k}")
        if self.kind == "embedding" and (self.weight is None or self.activation is not None or self.bias):
            raise ConfigError("a packed embedding has a weight quantizer and nothing else")
        for spec in (self.weight, self.activation):
            if spec is not None:
                _check_values(spec)
                spec.check(k)
        if self.weight is not None and self.weight.is_sparse and self.weight.bits == 8:
            raise ConfigError("sparse 8-bit weights have no packed form")
        Scheme(activation=self.activation)  # refuses what no activation can be, with the reason

    def tensors(self) -> dict[str, tuple[torch.dtype | None, Shape]]:
        """Suffix: (dtype, shape) of what the file holds for this layer; dtype None is any float."""
        n, k, found = self.out_features, self.in_features, dict[str, tuple[torch.dtype | None, Shape]]()
        if self.weight is None:
            found["float_weight"] = (torch.float32, (n, k))
        else:
            pattern = self.weight.sparsity
            kept = k
            if isinstance(pattern, NofM):
                kept = k // pattern.m * pattern.n
                found["kept"] = (torch.uint8, (n, packed_width(k // (2 if pattern.pair else 1), 1)))
            found["codes"] = (torch.uint8, (n, packed_width(kept, self.weight.bits)))
            found["step"] = (torch.float32, self.weight.granularity.step_shape((n, k)))
        if self.activation is not None and self.activation.is_learned:
            found["activation_step"] = (torch.float32, (1, 1))
        if self.bias:
            found["bias"] = (None, (n,))
        return found

    def to_json(self, index: Callable[[Quantizer], int]) -> dict[str, Any]:
        """The layer's entry in config.json; `index` gives a quantizer's place in the list of all of them."""
        return {
            "kind": self.kind,
            "out_features": self.out_features,
            "in_features": self.in_features,
            "weight": None if self.weight is None else index(self.weight),
            "activation": None if self.activation is None else index(self.activation),
            "rotation": self.rotation.to_json(),
            "bias": self.bias,
        }

    @staticmethod
    def from_json(fields: Any, quantizers: list[Quantizer], where: str) -> "LayerSpec":
        """The layer that `to_json` described. Raises FormatError beginning with `where`."""
        if not isinstance(fields, dict) or set(fields) != _LAYER_KEYS or fields["kind"] not in ("linear", "embedding"):
            raise FormatError(f"{where}: expected a layer with the keys {sorted(_LAYER_KEYS)}")
        if not isinstance(fields["bias"], bool):
            raise FormatError(f"{where}: bias must be true or false")

        def quantizer(key: str) -> Quantizer | None:
            i = fields[key]
            if i is None:
                return None
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < len(quantizers):
                raise FormatError(f"{where}: {key} is quantizer {i!r}, and there are {len(quantizers)}")
            return quantizers[i]

        weight, activation = quantizer("weight"), quantizer("activation")
        try:
            return LayerSpec(
                fields["kind"],
                fields["out_features"],
                fields["in_features"],
                weight,
                activation,
                rotation_from_json(fields["rotation"]),
                fields["bias"],
            )
        except ConfigError as error:
            raise FormatError(f"{where}: {error}") from None

    @staticmethod
    def of(layer: PackedLinear | PackedEmbedding) -> "LayerSpec":
        """The description of a packed layer."""
        if isinstance(layer, PackedEmbedding):
            n, k = layer.num_embeddings, layer.embedding_dim
            return LayerSpec("embedding", n, k, layer.weight_spec, None, layer.rotation, False)
        return LayerSpec(
            "linear",
            layer.out_features,
            layer.in_features,
            layer.weight_spec,
            layer.activation_spec,
            layer.rotation,
            layer.bias is not None,
        )


_LAYER_KEYS = {"kind", "out_features", "in_features", "weight", "activation", "rotation", "bias"}


def _check_values(spec: Quantizer) -> None:
    """Refuse what the values' own checks let through: 32.0 for 32, and levels that float32 does not tell apart."""
    if isinstance(spec.granularity, PerGroup) and type(spec.granularity.size) is not int:
        raise ConfigError(f"a group size is a whole number, not {spec.granularity.size!r}")
    if isinstance(spec.grid, CodebookGrid):
        levels = torch.tensor(spec.grid.levels, dtype=torch.float32)
        if not bool(levels.isfinite().all()) or not bool((levels[1:] > levels[:-1]).all()):
            raise ConfigError(f"the levels of codebook {spec.grid.name!r} do not stay apart in float32")


def common_scheme(layers: dict[str, LayerSpec]) -> Scheme | None:
    """The scheme that made these layers, or None where they do not follow one.

    The linear layers but `lm_head` must agree on weight, activation and rotation, the tables on theirs.
    """

    def one(specs: list[Any]) -> Any:
        if any(spec != specs[0] for spec in specs):
            raise ValueError
        return specs[0] if specs else None

    heads = [s for name, s in layers.items() if s.kind == "linear" and _is_head(name)]
    blocks = [s for name, s in layers.items() if s.kind == "linear" and not _is_head(name)]
    tables = [s for s in layers.values() if s.kind == "embedding"]
    rotations: tuple[Rotation, ...] = (NoRotation(), BlockHadamard(), *(s.rotation for s in layers.values()))
    try:
        fits = (r for r in rotations if all(_resolves(r, s) for s in layers.values()))
        return Scheme(
            one([s.weight for s in blocks]),
            one([s.activation for s in blocks]),
            next(fits, NoRotation()),
            one([s.weight for s in tables]),
            one([s.weight for s in heads]),
        )
    except ValueError:
        return None


def _resolves(rotation: Rotation, spec: LayerSpec) -> bool:
    try:
        return rotation.resolve(spec.in_features) == spec.rotation
    except ConfigError:
        return False


def _is_head(fqn: str) -> bool:
    return fqn.rsplit(".", 1)[-1] == HEAD


def check_step(step: Tensor, where: str) -> None:
    """Raise FormatError unless every Δ is a positive, finite number."""
    if not bool((step > 0).all()) or not bool(step.isfinite().all()):
        raise FormatError(f"{where}: has a step that is not a positive, finite number")

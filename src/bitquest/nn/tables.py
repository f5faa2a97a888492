"""Rounding a trained model's embedding and head to few bits after training: no training with them, weight-only.

In a small model of few bits the float tables dominate: they are most of its bytes, and most of what it reads for each
token. Schemes with -h8 and -h4 train them on few bits; this rounds tables that were trained as floats.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from bitquest.errors import ConfigError
from bitquest.nn.convert import is_head, replace_modules
from bitquest.nn.embedding import PackedEmbedding, QuantizedEmbedding
from bitquest.nn.linear import QuantizedLinear
from bitquest.nn.packed_linear import PackedLinear
from bitquest.nn.scheme import Scheme
from bitquest.numerics.grids import UniformGrid
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import BlockHadamard, Rotation, rotation_from_json
from bitquest.numerics.scaling import AbsMax, PerRow
from bitquest.ops.backend import Backend

_BITS = (8, 4)
# Chosen by the loss of trained models (docs/experiments.md). Training takes the Gaussian fit, whose clipping it can
# learn to live with; in a table that was trained as floats the largest elements of a row matter.
_SCALE = AbsMax()

_KEYS = {"rounded", "bits", "quantizer", "rotation"}
_WHEN = "after training"


@dataclass(frozen=True)
class TableRounding:
    """How float tables are rounded: quantizer and rotation, the same for embedding and head.

    Raises ConfigError for a quantizer that no table can have: a sparse one, or one with a learned step.
    """

    quantizer: Quantizer
    rotation: Rotation = BlockHadamard()

    def __post_init__(self) -> None:
        Scheme(rotation=self.rotation, embedding=self.quantizer)  # refuses, with the reason

    @staticmethod
    def to_bits(bits: int, rotation: Rotation | None = None) -> "TableRounding":
        """The rounding to 8 or 4 bits, one step for each row. rotation: the scheme's own, default BlockHadamard()."""
        if bits not in _BITS:
            raise ConfigError(f"tables are rounded to {' or '.join(map(str, _BITS))} bits, not to {bits!r}")
        quantizer = Quantizer(UniformGrid(bits), PerRow(), _SCALE)
        return TableRounding(quantizer, BlockHadamard() if rotation is None else rotation)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.quantizer.bits

    def to_json(self) -> dict[str, Any]:
        """What a packed model's metadata say under "tables"; `from_json` turns it back."""
        return {
            "rounded": _WHEN,
            "bits": self.bits,
            "quantizer": self.quantizer.to_json(),
            "rotation": self.rotation.to_json(),
        }

    @staticmethod
    def from_json(fields: Any) -> "TableRounding":
        """The rounding that `to_json` described. Raises ConfigError naming what is not understood."""
        if not isinstance(fields, dict) or set(fields) != _KEYS or fields["rounded"] != _WHEN:
            raise ConfigError(f"not a rounding of tables: {fields!r}; expected the keys {sorted(_KEYS)}")
        try:
            quantizer = Quantizer.from_json(fields["quantizer"])
            found = TableRounding(quantizer, rotation_from_json(fields["rotation"]))
        except (TypeError, OverflowError) as error:
            raise ConfigError(f"not a rounding of tables: {error}") from None
        if fields["bits"] != found.bits:
            raise ConfigError(f"tables of {fields['bits']!r} bits, whose quantizer has {found.bits}")
        return found


def round_tables_(model: nn.Module, rounding: TableRounding) -> dict[str, nn.Module]:
    """Replace every nn.Embedding and every `lm_head`, in place, by its rounded form. Returns the float ones by name.

    Parameters keep their identity and their values: rounding is in the forward pass, as in training, and `save` and
    `pack_` store the codes. Tied tables stay one. Raises ConfigError, the model unchanged: tables that are quantized
    already, tables that the rotation does not fit, and a model without any.
    """
    found: dict[str, nn.Module] = {}
    made: dict[str, nn.Module] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        if (bits := _bits_of_table(module, fqn)) is not None:
            raise ConfigError(
                f"{fqn or 'the module'} has {bits}-bit codes already: only a float embedding and head can be rounded"
            )
        try:
            rounded = _rounded(module, fqn, rounding)
        except ConfigError as error:
            raise ConfigError(f"{fqn or 'the module'}: {error}") from None
        if rounded is not None:
            found[fqn], made[fqn] = module, rounded
    if not found:
        raise ConfigError("found no embedding and no lm_head to round in this module")
    if "" in found:
        raise ConfigError("the module is itself a table: nothing holds it, so it cannot be replaced in place")
    replace_modules(model, made)
    return found


def _rounded(module: nn.Module, fqn: str, rounding: TableRounding) -> nn.Module | None:
    """The module's rounded form, None for what is no table."""
    if type(module) is nn.Embedding:
        return QuantizedEmbedding(module, weight=rounding.quantizer, rotation=rounding.rotation)
    if isinstance(module, nn.Embedding):
        raise ConfigError(f"{type(module).__name__} has a forward of its own, which a rounded table would lose")
    if is_head(fqn) and type(module) is nn.Linear:
        return QuantizedLinear(
            module, weight=rounding.quantizer, activation=None, rotation=rounding.rotation, backend=Backend.TORCH
        )
    return None


def _bits_of_table(module: nn.Module, fqn: str) -> int | None:
    """The width of a table that is quantized, None for float tables and for all other modules."""
    spec: Quantizer | None
    if isinstance(module, QuantizedEmbedding) or (is_head(fqn) and isinstance(module, QuantizedLinear)):
        spec = module.weight_quantizer.spec
    elif isinstance(module, PackedEmbedding) or (is_head(fqn) and isinstance(module, PackedLinear)):
        spec = module.weight_spec
    else:
        return None
    return None if spec is None else spec.bits

"""A scheme says how a whole model is quantized: weights, activations, rotation, embedding and head."""

import difflib
import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

from bitquest.errors import ConfigError
from bitquest.nn.formats import FORMATS
from bitquest.nn.methods import METHODS
from bitquest.numerics.estimators import Clip, Estimator, StraightThrough, Trust
from bitquest.numerics.grids import CodebookGrid, Grid, UniformGrid
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import BlockHadamard, NoRotation, Rotation, rotation_from_json
from bitquest.numerics.scaling import Granularity, Learned, PerGroup, PerTensor, TwoLevel
from bitquest.numerics.sparsity import Dense, NofM, Sparsity

# METHOD, "Backward": what "trust" means at 1 bit, with the rotation and without.
ONE_BIT_CLIP = Clip(1.30)
ONE_BIT_CLIP_UNROTATED = Clip(1.25)

_SPARSITIES: dict[str, Sparsity] = {"2:4": NofM(2, 4), "4:8": NofM(2, 4, pair=True)}
_ESTIMATORS: dict[str, Estimator] = {"ste": StraightThrough(), "clip": Clip(1.0)}
_TABLE_BITS = {"h8": 8, "h4": 4}
# Which weights share a step; groups also of an activation whose step is computed.
_GRANULARITIES: dict[str, Granularity] = {
    **{f"g{size}": PerGroup(size) for size in (32, 64, 128)},
    "tensor": PerTensor(),
}
_GRAMMAR = (
    f"none, or wBaB[{'|'.join(f'-{name}' for name in FORMATS)}][-2:4|-4:8][-g32|-g64|-g128|-tensor][-norot]"
    f"[-ste|-clip|{'|'.join(f'-{name}' for name in METHODS)}][-h8|-h4] with B from 1 to 8, or 16"
)
_WIDTHS = re.compile(r"w(0|[1-9][0-9]{0,2})a(0|[1-9][0-9]{0,2})")


@dataclass(frozen=True)
class Scheme:
    """Quantizers of a model's operands; None leaves an operand unquantized (it is still rotated inside a layer).

    weight, activation: of every linear layer in the blocks. embedding, head: weight-only, of the token table and the
    `lm_head`. Raises ConfigError, with the reason, for combinations that make no sense.
    """

    weight: Quantizer | None = None
    activation: Quantizer | None = None
    rotation: Rotation = BlockHadamard()
    embedding: Quantizer | None = None
    head: Quantizer | None = None

    def __post_init__(self) -> None:
        if self.activation is not None:
            _check_activation(self.activation)
        if self.weight is not None and isinstance(self.weight.scale, Learned) and self.weight.scale.offset:
            raise ConfigError("a learned offset is for activations; LSQ+ keeps weights symmetric")
        for name, table in (("embedding", self.embedding), ("head", self.head)):
            if table is not None and (table.is_learned or table.is_sparse):
                raise ConfigError(f"the {name} takes a dense quantizer whose scale is computed, not {table}")

    @property
    def is_plain(self) -> bool:
        """Whether the linear layers stay as they are."""
        return self.weight is None and self.activation is None and isinstance(self.rotation, NoRotation)

    @staticmethod
    def parse(text: str) -> "Scheme":
        """The scheme a short name stands for, such as "w1a1", "w4a4-2:4" or "w2a8-g64-h8"; also the JSON of str().

        Raises ConfigError naming the part that is not understood and the nearest one that is.
        """
        if not isinstance(text, str):
            raise ConfigError(f"a scheme's name is a string such as 'w4a4', not {text!r}")
        text = text.strip().lower() if not text.lstrip().startswith("{") else text.strip()
        if text.startswith("{"):
            try:
                return Scheme.from_json(json.loads(text))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ConfigError(f"this scheme is not valid JSON: {error}") from None
        if text == "none":
            return Scheme(rotation=NoRotation())
        head, *suffixes = text.split("-")
        widths = _WIDTHS.fullmatch(head)
        if widths is None:
            raise ConfigError(f"unknown scheme {text!r}. A scheme is {_GRAMMAR}; for example w1a1, w4a4-2:4, w2a8-h8")
        return _compose(text, int(widths[1]), int(widths[2]), suffixes)

    def __str__(self) -> str:
        """The short name where there is one, else compact JSON; `parse` reads both."""
        short = _short_name(self)
        return short if short is not None else json.dumps(self.to_json(), separators=(",", ":"))

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back into an equal scheme."""
        return {
            "weight": None if self.weight is None else self.weight.to_json(),
            "activation": None if self.activation is None else self.activation.to_json(),
            "rotation": self.rotation.to_json(),
            "embedding": None if self.embedding is None else self.embedding.to_json(),
            "head": None if self.head is None else self.head.to_json(),
        }

    @staticmethod
    def from_json(fields: Any) -> "Scheme":
        """The scheme that `to_json` described."""
        wanted = {"weight", "activation", "rotation", "embedding", "head"}
        if not isinstance(fields, dict) or set(fields) != wanted:
            raise ConfigError(f"a scheme has the keys {sorted(wanted)}, not {fields!r}")

        def operand(name: str) -> Quantizer | None:
            return None if fields[name] is None else Quantizer.from_json(fields[name])

        rotation = rotation_from_json(fields["rotation"])
        return Scheme(operand("weight"), operand("activation"), rotation, operand("embedding"), operand("head"))


def _check_activation(spec: Quantizer) -> None:
    if spec.scale == TwoLevel("tensor"):
        raise ConfigError(
            "a float32 scale shared by the whole activation tensor lets a token see later ones; use TwoLevel('row')"
        )
    if spec.is_learned:
        if not isinstance(spec.granularity, PerTensor):
            raise ConfigError("a learned activation step is one number per layer: rows are tokens; use PerTensor()")
    elif isinstance(spec.granularity, PerTensor):
        raise ConfigError(
            "a scale computed over the whole activation tensor lets a token see later ones; "
            "use PerRow(), PerGroup(size) or a Learned() scale"
        )
    if spec.is_sparse:
        raise ConfigError("N:M sparsity is for weights; activations stay dense")


def _compose(text: str, weight_bits: int, activation_bits: int, suffixes: list[str]) -> Scheme:
    def pick(options: Any, what: str) -> str | None:
        found = [suffix for suffix in suffixes if suffix in options]
        if len(found) > 1:
            raise ConfigError(f"scheme {text!r} names more than one {what}: {', '.join(found)}")
        return found[0] if found else None

    known = [*FORMATS, *_SPARSITIES, *_GRANULARITIES, "norot", *_ESTIMATORS, *METHODS, *_TABLE_BITS]
    for suffix in suffixes:
        if suffix not in known:
            nearest = difflib.get_close_matches(suffix, known, 1)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
            raise ConfigError(f"scheme {text!r}: {suffix!r} is unknown{hint} A scheme is {_GRAMMAR}")
    format_name, shared = pick(FORMATS, "format"), pick(_GRANULARITIES, "group size")
    sparsity = _SPARSITIES.get(pick(_SPARSITIES, "sparsity") or "", Dense())
    how, table = pick([*_ESTIMATORS, *METHODS], "estimator or method"), pick(_TABLE_BITS, "width of embedding and head")
    chosen = None if format_name is None else FORMATS[format_name]
    if chosen is not None and chosen.in_blocks and (shared or how in METHODS):
        raise ConfigError(
            f"scheme {text!r}: {format_name} has blocks and scales of its own, which {shared or how} would replace"
        )
    rotation: Rotation = NoRotation() if pick(["norot"], "norot") else BlockHadamard()

    def operand(letter: str, bits: int) -> Quantizer | None:
        if bits == 16:
            return None
        if not 1 <= bits <= 8:
            raise ConfigError(f"scheme {text!r}: {letter}{bits} is no width; it is 1 to 8, or 16 for not quantized")
        made = None if chosen is None else (chosen.weight if letter == "w" else chosen.activation)(bits)
        if made is not None and made.bits != bits:
            raise ConfigError(
                f"scheme {text!r}: {format_name} codes have {made.bits} bits, so write {letter}{made.bits}"
            )
        if how in METHODS:
            method = METHODS[how]
            try:
                make = method.weight if letter == "w" else method.activation
                made = make(bits, None if made is None else made.grid)
            except ConfigError as error:
                raise ConfigError(f"scheme {text!r}: {error}") from None
        else:
            made = Quantizer(UniformGrid(bits)) if made is None else made
            estimator = _ESTIMATORS[how] if how else default_estimator(made.grid, rotation)
            made = replace(made, estimator=estimator)
        if shared is None or (letter == "a" and (made.is_learned or shared == "tensor")):
            return made
        return replace(made, granularity=_GRANULARITIES[shared])

    weight, activation = operand("w", weight_bits), operand("a", activation_bits)
    if not isinstance(sparsity, Dense):
        if weight is None:
            raise ConfigError(f"scheme {text!r}: sparsity is of quantized weights, and w16 does not quantize them")
        weight = replace(weight, sparsity=sparsity)
    if weight is None and shared == "tensor":
        raise ConfigError(f"scheme {text!r}: -tensor is of quantized weights, and w16 does not quantize them")
    if weight is None and activation is None and (format_name or shared or how):
        raise ConfigError(f"scheme {text!r}: w16a16 quantizes nothing that {'-'.join(suffixes)} could apply to")
    tables = Quantizer(UniformGrid(_TABLE_BITS[table])) if table else None
    return Scheme(weight, activation, rotation, tables, tables)


def default_estimator(grid: Grid, rotation: Rotation) -> Estimator:
    """The paper's choice: trust, which at 1 bit means clipping at 1.30·s (1.25·s without a rotation)."""
    if grid.bits == 1:
        return ONE_BIT_CLIP_UNROTATED if isinstance(rotation, NoRotation) else ONE_BIT_CLIP
    return Trust()


def _is_grid_of(format_name: str, grid: CodebookGrid) -> bool:
    """Whether a format has this grid; by their names first, since computing a codebook takes a while."""
    alike = grid.name.startswith(format_name) or format_name.endswith(grid.name)
    return alike and FORMATS[format_name].weight(grid.bits).grid == grid


@lru_cache(maxsize=1024)
def _short_name(scheme: Scheme) -> str | None:
    """The canonical short name: the first one, with the fewest parts, that parses back to this very scheme."""
    if scheme == Scheme(rotation=NoRotation()):
        return "none"

    def bits(spec: Quantizer | None) -> int:
        return 16 if spec is None else spec.bits

    widths = f"w{bits(scheme.weight)}a{bits(scheme.activation)}"
    specs = [spec for spec in (scheme.weight, scheme.activation) if spec is not None]
    sparsities = [f"-{name}" for name, pattern in _SPARSITIES.items() if specs and pattern == specs[0].sparsity]
    norot = "-norot" if isinstance(scheme.rotation, NoRotation) else ""
    tables = [f"-{name}" for name, b in _TABLE_BITS.items() if scheme.head is not None and scheme.head.bits == b]
    grids = {spec.grid for spec in specs if isinstance(spec.grid, CodebookGrid)}
    formats = [name for name in FORMATS if any(_is_grid_of(name, grid) for grid in grids)]
    axes = [["", *(f"-{name}" for name in names)] for names in ((*_ESTIMATORS, *METHODS), formats, _GRANULARITIES)]
    candidates = sorted(product(*axes), key=lambda parts: sum(map(bool, parts))) if specs else [("", "", "")]
    for how, format_name, shared in candidates:
        candidate = "".join([widths, format_name, *sparsities, shared, norot, how, *tables])
        try:
            if Scheme.parse(candidate) == scheme:
                return candidate
        except ConfigError:
            continue
    return None

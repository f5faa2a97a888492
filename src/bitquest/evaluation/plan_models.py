"""What Llamas of many shapes weigh: bytes packed, key-value cache, memory in training, floating-point operations.

Arrays are over candidate shapes, (C,). N counts parameters without token table and head, as the scaling law does.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitquest.errors import ConfigError
from bitquest.evaluation.scaling_runs import UNQUANTIZED
from bitquest.export.format import LayerSpec
from bitquest.models import LlamaConfig
from bitquest.models.config import swiglu_size
from bitquest.nn import Scheme
from bitquest.numerics import Quantizer, Rotation, UniformGrid

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

HEAD_SIZE = 128  # channels of a head, as in the presets; narrower models have narrower heads
TABLE_BITS = (16, 8, 4)
_WIDTHS = 128 * np.concatenate([np.arange(1, 33), np.arange(34, 65, 2), np.arange(68, 129, 4), np.arange(136, 257, 8)])
_HIDDEN = (2.0, 7 / 3, 2.5, 8 / 3, 17 / 6, 3.0, 3.5)  # hidden width over width
_DEPTHS = (0.7, 0.8, 0.9, 1.0, 1.15, 1.3)  # blocks over width / 128
_LEAST_BLOCKS, _SMALL = 4, 384  # models up to this width, as the small presets, may be up to three times as deep

# Bytes of training. Parameters, gradients and AdamW's two averages are float32. What the backward pass keeps was
# counted with saved-tensor hooks under bfloat16 autocast, nothing recomputed (tests/evaluation/test_plan.py): of a
# block 36 per token and channel and 8 per token and hidden channel, outside 10 per token and channel and 8 per token
# and word (logits and their gradient), 3 per weight of the blocks (the quantized copy and its mask).
STATE_BYTES = 16
_KEPT_WIDTH, _KEPT_HIDDEN, _KEPT_OUTSIDE, _KEPT_WORD, _KEPT_WEIGHT = 36, 8, 10, 8, 3


@dataclass(frozen=True)
class Shapes:
    """Candidate shapes with as many key-value heads as heads: width, hidden width and blocks, each (C,)."""

    width: Ints
    hidden: Ints
    layers: Ints
    vocabulary: int

    @staticmethod
    def candidates(vocabulary: int) -> "Shapes":
        """Shapes in about the presets' proportions, from 0.6 million to 10^13 parameters, and the presets' own."""
        found = set()
        for width in map(int, _WIDTHS):
            small = (1.5, 2.0, 3.0) if width <= _SMALL else ()
            depths = {max(_LEAST_BLOCKS, round(width / 128 * share)) for share in (*_DEPTHS, *small)}
            hidden = {round(width * share / 128) * 128 for share in _HIDDEN} | {swiglu_size(width)}
            found |= {(width, h, layers) for h in hidden for layers in depths}
        width, hidden_, layers_ = np.array(sorted(found), dtype=np.int64).T
        return Shapes(width, hidden_, layers_, vocabulary)

    @staticmethod
    def proportional(vocabulary: int) -> "Shapes":
        """One shape for each width, as the presets grow: as many blocks as width / 128, hidden 8/3 of the width."""
        width = np.asarray(_WIDTHS, dtype=np.int64)
        return Shapes(width, 128 * (width // 48), np.maximum(_LEAST_BLOCKS, width // 128), vocabulary)

    @property
    def parameters(self) -> Ints:
        """N of every shape."""
        d = self.width
        return np.asarray(self.layers * (4 * d * d + 3 * d * self.hidden + 2 * d) + d)

    @property
    def table_parameters(self) -> Ints:
        """Parameters of the token table; the head has as many."""
        return np.asarray(self.vocabulary * self.width)

    def only(self, place: int) -> "Shapes":
        """One of the shapes, as arrays of one."""
        part = slice(place, place + 1)
        return Shapes(self.width[part], self.hidden[part], self.layers[part], self.vocabulary)

    def config(self, place: int, positions: int) -> LlamaConfig:
        """One of the shapes as the trainer takes it."""
        width = int(self.width[place])
        heads = max(width // HEAD_SIZE, 4)
        return LlamaConfig(
            self.vocabulary, width, int(self.hidden[place]), int(self.layers[place]), heads, heads, positions
        )


@dataclass(frozen=True)
class Weights:
    """Bytes of packed models in one format, each (C,): blocks (norms and scales included), token table, head."""

    blocks: Ints
    embedding: Ints
    head: Ints
    row: Ints  # of the token table

    @property
    def total(self) -> Ints:
        """All that is stored."""
        return np.asarray(self.blocks + self.embedding + self.head)

    @property
    def read_per_token(self) -> Ints:
        """What generating one token reads: everything, but one row of the token table. No key-value cache."""
        return np.asarray(self.blocks + self.head + self.row)


def packed_bytes(shapes: Shapes, format_name: str, table_bits: int) -> Weights:
    """Bytes as the packed format stores them, tensors only; 16 bits (blocks of bf16, or tables) are 2 bytes a value.

    table_bits: of token table and head, 16, 8 or 4; a format with -h8 or -h4 says so itself. Norms are float32.
    """
    scheme = _scheme(format_name)
    d, h = shapes.width, shapes.hidden
    of_d = _row_bytes(d, scheme.weight, scheme.rotation)
    of_h = _row_bytes(h, scheme.weight, scheme.rotation)
    blocks = shapes.layers * ((4 * d + 2 * h) * of_d + d * of_h + 8 * d) + 4 * d
    table = scheme.head or (None if table_bits == 16 else Quantizer(UniformGrid(table_bits)))
    row = _row_bytes(d, table, scheme.rotation)
    whole: Ints = shapes.vocabulary * row
    return Weights(np.asarray(blocks, dtype=np.int64), whole, whole, row)


def why_not_packed(format_name: str) -> str | None:
    """Why a format has no packed form; None where it has one."""
    one = np.array([128], dtype=np.int64)
    try:
        packed_bytes(Shapes(one, one, one, 2), format_name, 16)
    except ConfigError as error:
        return str(error)
    return None


def cache_bytes(shapes: Shapes, context: int, bits: int) -> Ints:
    """Keys and values of `context` positions."""
    return np.asarray(2 * shapes.layers * shapes.width * context * bits // 8)


def training_bytes(shapes: Shapes, tokens_at_once: int) -> tuple[Ints, Ints]:
    """(state, activations): what one device holds without sharding. tokens_at_once: of one forward pass."""
    state = STATE_BYTES * (shapes.parameters + 2 * shapes.table_parameters)
    d, h = shapes.width, shapes.hidden
    per_token = shapes.layers * (_KEPT_WIDTH * d + _KEPT_HIDDEN * h) + _KEPT_OUTSIDE * d
    kept = tokens_at_once * (per_token + _KEPT_WORD * shapes.vocabulary) + _KEPT_WEIGHT * shapes.parameters
    return np.asarray(state), np.asarray(kept)


def training_flops(shapes: Shapes) -> Floats:
    """Floating-point operations per token: 6 for each parameter of blocks and head; attention's products left out."""
    return np.asarray(6.0 * (shapes.parameters + shapes.table_parameters))


def _scheme(format_name: str) -> Scheme:
    """A format's scheme; what follows an @ (the recipe) does not change its size."""
    name = format_name.partition("@")[0]
    return Scheme.parse("none" if name == UNQUANTIZED else name)


def _row_bytes(widths: Ints, spec: Quantizer | None, rotation: Rotation) -> Ints:
    """Bytes of one row (an output channel) of each width: codes, scales, and the mask of kept elements."""
    if spec is None:
        return np.asarray(2 * widths)
    known: dict[int, int] = {}
    for k in {int(width) for width in widths}:
        layer = LayerSpec("linear", 1, k, spec, None, rotation.resolve(k), False)
        known[k] = 0
        for dtype, shape in layer.tensors().values():
            if dtype is None:
                raise ConfigError(f"{spec}: a layer of unknown type")
            known[k] += int(np.prod(shape)) * dtype.itemsize
    return np.array([known[int(width)] for width in widths], dtype=np.int64)

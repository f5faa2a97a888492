"""Embedding tables of few bits: weight-only, one scale per row, trained as such and stored as codes.

V words, K embedding_dim.
"""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitquest.errors import ConfigError
from bitquest.nn.quantizer import WeightQuantizer, keeping_dtype
from bitquest.numerics.fake_quant import Encoded, dequantize
from bitquest.numerics.packing import pack, unpack
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import Rotation
from bitquest.ops.registry import rotate_op


class QuantizedEmbedding(nn.Embedding):
    """Rows of Q(WH)Hᵀ: quantized in rotated space, handed out in the model's own space. The weight keeps its name."""

    def __init__(self, embedding: nn.Embedding, *, weight: Quantizer, rotation: Rotation) -> None:
        nn.Module.__init__(self)
        if embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse:
            raise ConfigError("a quantized embedding has no max_norm, scale_grad_by_freq or sparse gradients")
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = embedding.padding_idx, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self.weight = embedding.weight
        self.rotation = rotation.resolve(self.embedding_dim)
        weight.check(self.embedding_dim)
        self.weight_quantizer = WeightQuantizer(weight, embedding.weight, self.rotation)
        self.quantizes = True  # switched off by unquantized() alone
        self.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        """ids (…) int64 to rows (…, K)."""
        if not self.quantizes:
            return F.embedding(input, self.weight, self.padding_idx)
        rows = F.embedding(input, self.weight_quantizer(self.weight, self.rotation), self.padding_idx)
        return rows if self.rotation.block == 1 else rotate_op(rows, self.rotation.block)

    def encode_weight(self) -> Encoded | None:
        """The table's codes (V, K) and steps."""
        return self.weight_quantizer.encode(self.weight, self.rotation)

    def quantized_weight(self) -> Tensor:
        """The float32 table (V, K) in rotated space."""
        with torch.no_grad():
            return self.weight_quantizer(self.weight, self.rotation).to(torch.float32)


class PackedEmbedding(nn.Module):
    """The trained table as codes, int8 (V, K), centred, and float32 steps (V, 1), (V, groups) or (1, 1).

    The codes are kept as `packed`, uint8 (V, ⌈K·bits/8⌉), which may be given instead.
    """

    packed: Tensor
    step: Tensor
    kept: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        weight: Quantizer,
        rotation: Rotation,
        codes: Tensor | None = None,
        packed: Tensor | None = None,
        step: Tensor,
        kept: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight_spec = weight
        self.rotation = rotation.resolve(embedding_dim)
        if packed is None:
            assert codes is not None, "a table has codes, packed or not"
            packed = pack(codes, weight.bits)
        self.register_buffer("packed", packed)
        self.register_buffer("step", step)
        self.register_buffer("kept", kept)

    @staticmethod
    def of(layer: QuantizedEmbedding) -> "PackedEmbedding":
        """The packed form of a trained table."""
        encoded, spec = layer.encode_weight(), layer.weight_quantizer.spec
        assert encoded is not None and spec is not None
        return PackedEmbedding(
            layer.num_embeddings,
            layer.embedding_dim,
            weight=spec,
            rotation=layer.rotation,
            codes=encoded.codes,
            step=encoded.step,
            kept=encoded.kept,
        )

    @property
    def codes(self) -> Tensor:
        """The table's codes, int8 (V, K), unpacked at every look."""
        return unpack(self.packed, self.weight_spec.bits, self.embedding_dim)

    def encode_weight(self) -> Encoded:
        """The stored codes, steps and kept mask."""
        return Encoded(self.codes, self.step, self.kept)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (…) int64 to float32 rows (…, K) in the model's own space."""
        step = self.step if self.step.shape[0] == 1 else self.step[ids]
        kept = None if self.kept is None else self.kept[ids]
        codes = unpack(self.packed[ids], self.weight_spec.bits, self.embedding_dim, trusted=True)
        rows = dequantize(codes, step, self.weight_spec.grid, kept)
        return rows if self.rotation.block == 1 else rotate_op(rows, self.rotation.block)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keeping_dtype(fn), recurse)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, weight={self.weight_spec}, rotation={self.rotation}"

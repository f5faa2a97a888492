"""Layers that train and run on few bits, and the two verbs that put them into a model."""

from bitquest.nn.convert import pack_, quantize_
from bitquest.nn.embedding import PackedEmbedding, QuantizedEmbedding
from bitquest.nn.integer_training import weights_held
from bitquest.nn.linear import QuantizedLinear, training_backends
from bitquest.nn.packed_linear import PackedLinear, running_backends
from bitquest.nn.quantizer import MaskedShare, record_masked_share
from bitquest.nn.scheme import Scheme
from bitquest.nn.tables import TableRounding, round_tables_
from bitquest.nn.unquantized import unquantized

__all__ = [
    "MaskedShare",
    "PackedEmbedding",
    "PackedLinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "Scheme",
    "TableRounding",
    "pack_",
    "quantize_",
    "record_masked_share",
    "round_tables_",
    "running_backends",
    "training_backends",
    "unquantized",
    "weights_held",
]

"""The packed format: specification (docs/format.md), writer, reader."""

from bitquest.export.format import FORMAT_VERSION
from bitquest.export.loader import load
from bitquest.export.reader import is_packed, packed_sizes, read_tokenizer
from bitquest.export.writer import save

__all__ = ["FORMAT_VERSION", "is_packed", "load", "packed_sizes", "read_tokenizer", "save"]

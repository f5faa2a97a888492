"""safetensors files, written in one fixed order and read with distrust: the header is checked before anything is built.

A file is 8 bytes of header length (little endian), the header (JSON: name → dtype, shape, data_offsets), the data.
Source: https://github.com/huggingface/safetensors, "Format".
"""

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bitquest.errors import FormatError
from bitquest.export.manifest import canonical_json, parse_json

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
_LARGEST_HEADER = 100_000_000  # as in the safetensors library
_MOST_DIMENSIONS = 16
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: begin and end in bytes after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """The tensors of a file by name, in the order they lie in it, and where the data begin."""

    entries: dict[str, Entry]
    data_begin: int


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    """Write CPU tensors; widest types first and then by name, so that each one is aligned and the bytes are fixed."""
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise FormatError(f"{name}: a tensor of {tensor.dtype} has no place in this format")
        if not tensor.numel():
            raise FormatError(f"{name}: an empty tensor, shape {tuple(tensor.shape)}, cannot be stored")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = canonical_json(header)
    text += b" " * (-len(text) % _ALIGNMENT)
    file.write(_LENGTH.pack(len(text)) + text)
    for name in names:
        file.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_header(file: BinaryIO, where: str) -> Header:
    """Check and return the header of an open file.

    Raises FormatError: impossible length, bad JSON, unknown types, shapes that do not fill their bytes, and tensors
    that overlap, leave gaps or reach beyond the file. Needs memory for the header only.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    first = file.read(_LENGTH.size)
    if len(first) < _LENGTH.size:
        raise FormatError(f"{where}: {size} bytes are too few for a safetensors file")
    (length,) = _LENGTH.unpack(first)
    if length > min(_LARGEST_HEADER, size - _LENGTH.size):
        raise FormatError(f"{where}: a header of {length} bytes does not fit into the file of {size}")
    fields = parse_json(file.read(length), f"{where}, header")
    metadata = fields.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{where}: {_METADATA} is no object of strings")
    entries, begin = dict[str, Entry](), _LENGTH.size + length
    parsed = [(name, _entry(entry, f"{where}, tensor {name!r}")) for name, entry in fields.items()]
    reached = 0
    for name, entry in sorted(parsed, key=lambda item: item[1].begin):
        if entry.begin != reached:
            what = "overlaps the tensor before it" if entry.begin < reached else "leaves a gap before it"
            raise FormatError(f"{where}: tensor {name!r} {what}")
        entries[name], reached = entry, entry.end
    if begin + reached != size:
        raise FormatError(f"{where}: its tensors take {reached} bytes, the file has {size - begin} for them")
    return Header(entries, begin)


def _entry(fields: Any, where: str) -> Entry:
    match fields:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end], **rest} if not rest:
            pass
        case _:
            raise FormatError(f"{where}: expected dtype, shape and data_offsets")
    if dtype not in DTYPES:
        raise FormatError(f"{where}: unknown type {dtype!r}")
    if len(shape) > _MOST_DIMENSIONS or not all(_is_size(n) and n > 0 for n in shape):
        raise FormatError(f"{where}: {shape[:_MOST_DIMENSIONS]} is no shape of a tensor")
    if not _is_size(begin) or not _is_size(end) or begin > end:
        raise FormatError(f"{where}: {[begin, end]} are no offsets")
    needed = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != needed:
        raise FormatError(f"{where}: {dtype} {shape} takes {needed} bytes, its offsets span {end - begin}")
    return Entry(DTYPES[dtype], tuple(shape), begin, end)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def read_tensor(file: BufferedReader, header: Header, name: str, where: str) -> Tensor:
    """One tensor, read into memory of its own."""
    entry = header.entries[name]
    data = torch.empty(entry.bytes, dtype=torch.uint8)
    file.seek(header.data_begin + entry.begin)
    if file.readinto(data.numpy().data) != entry.bytes:
        raise FormatError(f"{where}: the file ends within tensor {name!r}")
    if entry.dtype is torch.bool and int(data.max()) > 1:
        raise FormatError(f"{where}: tensor {name!r} has truth values other than 0 and 1")
    return data.view(entry.dtype).reshape(entry.shape)

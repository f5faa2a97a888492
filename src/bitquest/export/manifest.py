"""Reading files one does not trust, and the manifest that says what they must be.

The manifest is compact JSON on one line that ends in `"digest":"<64 hex digits>"}` and a newline; the digest is the
SHA-256 of every byte before its first hex digit, so not one byte of the manifest can change unseen either.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from bitquest.errors import FormatError
from bitquest.export.format import CONFIG, FORMAT, FORMAT_VERSION, MANIFEST, MODEL, TOKENIZER

_LARGEST_MANIFEST = 1 << 16
_OTHER_FORMATS = {
    "bitquest-checkpoint": ", a checkpoint of a run. Pack it with: bitquest export RUN --step N --out DIR",
    "bitquest-data": ", prepared data",
}
_TAIL = b'"}\n'
_HEX = 64
_PIECE = 1 << 20


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading, following no link. FormatError for anything else, and if it is missing."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FormatError(f"{path} is missing") from None
    except OSError as error:
        if path.is_symlink():
            raise FormatError(
                f"{path} is a symbolic link, and a packed model is made of plain files; copy it with `cp -rL`"
            ) from None
        raise FormatError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FormatError(f"{path} is not a plain file")
    with os.fdopen(handle, "rb") as file:
        yield file


def read_small(path: Path, largest: int) -> bytes:
    """All bytes of a file that has no business being larger than `largest`."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > largest:
            raise FormatError(f"{path} has {size} bytes; at most {largest} make sense here")
        return file.read(largest + 1)


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object, strictly: UTF-8, no key twice, no NaN, no number that overflows, no bottomless nesting.

    Raises FormatError beginning with `where`.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise FormatError(f"{where}: nested too deeply") from None
    except ValueError as error:  # also UnicodeDecodeError and integers of absurd length
        raise FormatError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{where}: not a JSON object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return fields


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def canonical_json(value: Any) -> bytes:
    """Compact JSON with sorted keys in UTF-8: the same bytes for the same value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def check_version(fields: Mapping[str, Any], where: str) -> None:
    """Raise FormatError if this is no packed model, or one from a later version than this reader knows."""
    if fields.get("format") != FORMAT:
        what = _OTHER_FORMATS.get(str(fields.get("format")), "")
        raise FormatError(f"{where}: not a packed BitQuEST model: its format is {fields.get('format')!r}{what}")
    version = fields.get("version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise FormatError(f"{where}: {version!r} is no format version")
    if version > FORMAT_VERSION:
        raise FormatError(
            f"{where}: the file has format version {version}, this bitquest reads up to {FORMAT_VERSION}. "
            "It comes from a later version: update with `pip install --upgrade bitquest`"
        )


def manifest_bytes(files: Mapping[str, tuple[int, str]]) -> bytes:
    """The manifest of files given as name: (bytes, hex SHA-256)."""
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()}
    body = canonical_json({"files": listed, "format": FORMAT, "version": FORMAT_VERSION})
    head = body[:-1] + b',"digest":"'
    return head + hashlib.sha256(head).hexdigest().encode() + _TAIL


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """name: (bytes, hex SHA-256) of the files of a packed model, after checking the manifest itself.

    Raises FormatError for a folder that is no packed model, a manifest that changed since it was written, and names
    other than those of the format.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such directory; a packed model is the directory that `bitquest export` wrote")
    if not path.exists() and not path.is_symlink():
        raise FormatError(_not_packed(folder))
    data = read_small(path, _LARGEST_MANIFEST)
    fields = parse_json(data, str(path))
    check_version(fields, str(path))
    head, digest, tail = data[: -_HEX - len(_TAIL)], data[-_HEX - len(_TAIL) : -len(_TAIL)], data[-len(_TAIL) :]
    if tail != _TAIL or hashlib.sha256(head).hexdigest().encode() != digest or set(fields) != _MANIFEST_KEYS:
        raise FormatError(f"{path}: damaged: its digest does not fit. Export or copy the model again")
    listed = fields["files"]
    if not isinstance(listed, dict) or set(listed) - {TOKENIZER} != {CONFIG, MODEL}:
        names = sorted(listed) if isinstance(listed, dict) else listed
        raise FormatError(f"{path}: lists {names}, not {CONFIG}, {MODEL} and at most {TOKENIZER}")
    if TOKENIZER not in listed and (folder / TOKENIZER).exists():
        raise FormatError(f"{folder / TOKENIZER} is not listed in {MANIFEST}: it does not belong to this model")
    return {name: _entry(entry, f"{path}: {name}") for name, entry in listed.items()}


_MANIFEST_KEYS = {"format", "version", "files", "digest"}


def _entry(entry: Any, where: str) -> tuple[int, str]:
    match entry:
        case {"bytes": int(size), "sha256": str(digest), **rest} if not rest and size >= 0 and len(digest) == _HEX:
            return size, digest
    raise FormatError(f"{where}: expected its bytes and sha256, not {entry!r}")


def _not_packed(folder: Path) -> str:
    if (folder / "config.toml").is_file():
        return f"{folder} is a run directory, not a packed model. Pack it with: bitquest export {folder} --out packed"
    if (folder / CONFIG).is_file():
        return f"{folder} has no {MANIFEST}: it is a Hugging Face checkpoint, or an incomplete copy of a packed model"
    return f"{folder} is no packed model: it has no {MANIFEST}. `bitquest export` writes one"


def check_file(file: BinaryIO, path: Path, size: int, digest: str) -> None:
    """Raise FormatError unless an open file has this many bytes and this SHA-256. Leaves it at its beginning."""
    if (found := os.fstat(file.fileno()).st_size) != size:
        raise FormatError(f"{path} has {found} bytes instead of {size}: it is truncated or another file")
    file.seek(0)
    sha = hashlib.sha256()
    while piece := file.read(_PIECE):
        sha.update(piece)
    if sha.hexdigest() != digest:
        raise FormatError(f"{path} changed since it was written (its SHA-256 differs). Export or copy the model again")
    file.seek(0)

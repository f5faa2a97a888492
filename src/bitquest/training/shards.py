"""Tokens on the disk: little-endian integers in shards, and a manifest with the SHA-256 of each, written last."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from bitquest.errors import DataError
from bitquest.files import sync

FORMAT, VERSION = "bitquest-data", 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def dtype_for(vocab_size: int) -> str:
    """The narrowest of the two that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def is_part(path: Path) -> bool:
    """Whether a file in a prepared folder bears the name of something that preparing writes there."""
    return path.name in (MANIFEST, TOKENIZER) or re.fullmatch(r"(train|val)-\d{5,}\.bin", path.name) is not None


class SplitWriter:
    """Writes one split's tokens to shards of at most `shard_tokens`, hashing as it goes."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int) -> None:
        self._folder, self._split, self._dtype, self._limit = folder, split, DTYPES[dtype], shard_tokens
        self._file: Any = None
        self.shards: list[dict[str, Any]] = []
        self.tokens = self.documents = 0

    def write(self, ids: "np.ndarray | list[int]", utf8_bytes: int, documents: int) -> None:
        """Append tokens, and count the bytes of text they stand for and the documents that end among them."""
        array = np.asarray(ids, dtype=self._dtype)
        self.tokens += len(array)
        self.documents += documents
        while True:
            if self._file is None:
                self._begin()
            room = self._limit - self.shards[-1]["tokens"]
            part, array = array[:room], array[room:]
            data = part.tobytes()
            self._file.write(data)
            self._hash.update(data)
            shard = self.shards[-1]
            shard["tokens"] += len(part)
            shard["utf8_bytes"] += utf8_bytes
            shard["documents"] += documents
            utf8_bytes = documents = 0
            if not len(array):
                return
            self.close()

    def _begin(self) -> None:
        name = f"{self._split}-{len(self.shards):05d}.bin"
        self._file, self._hash = (self._folder / name).open("wb"), hashlib.sha256()
        self.shards.append({"file": name, "tokens": 0, "utf8_bytes": 0, "documents": 0})

    def abandon(self) -> None:
        """Let go of an unfinished shard; what was written of it means nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def close(self) -> None:
        """Finish the open shard: on the disk, its digest known."""
        if self._file is not None:
            self._file.close()
            sync(self._folder / self.shards[-1]["file"])
            self.shards[-1]["sha256"] = self._hash.hexdigest()
            self._file = None


def manifest_digest(fields: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content without its own `digest`."""
    content = {key: value for key, value in fields.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a prepared folder, its own digest and the sizes of all files checked.

    Raises DataError saying what is wrong and to prepare the data again.
    """
    path = folder / MANIFEST
    again = "prepare the data again with: bitquest data prepare"
    if not folder.exists():
        raise DataError(f"{folder}: no such folder; make it with: bitquest data prepare INPUT --out {folder}")
    if not path.is_file():
        raise DataError(f"{folder}: not a prepared folder: it has no {MANIFEST}; {again} INPUT --out {folder}")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or numbers beyond what Python reads
        raise DataError(f"{path}: not valid JSON ({error}); {again}") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise DataError(f"{path}: this is no manifest of prepared data (format {FORMAT!r} expected)")
    version = fields.get("version")
    if version != VERSION:
        raise DataError(f"{path}: version {version!r} of the data format; this bitquest reads version {VERSION}")
    if fields.get("digest") != manifest_digest(fields):
        raise DataError(f"{path}: the manifest is damaged: its digest does not match; {again}")
    problem = _problem(fields)
    if problem:
        raise DataError(f"{path}: {problem}; {again}")
    for shards in fields["splits"].values():
        for shard in shards:
            _check_size(folder / shard["file"], shard["tokens"] * DTYPES[fields["dtype"]].itemsize, again)
    return fields


def _problem(fields: dict[str, Any]) -> str | None:
    """What is wrong with a manifest whose digest is right: somebody wrote it by hand, or with another program."""

    def count(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48

    if fields.get("dtype") not in tuple(DTYPES):
        return f"dtype {fields.get('dtype')!r} is neither {' nor '.join(DTYPES)}"
    if (
        not count(fields.get("vocab_size"))
        or not count(fields.get("eos_id"))
        or fields["eos_id"] >= fields["vocab_size"]
    ):
        return "vocab_size and eos_id do not make sense"
    if not isinstance(fields.get("tokenizer_sha256"), str):
        return "tokenizer_sha256 is missing"
    splits = fields.get("splits")
    if not isinstance(splits, dict) or set(splits) != {"train", "val"}:
        return "splits must be train and val"
    for shards in splits.values():
        for shard in shards if isinstance(shards, list) else [None]:
            if not isinstance(shard, dict) or not all(
                count(shard.get(k)) for k in ("tokens", "utf8_bytes", "documents")
            ):
                return f"a shard's counts do not make sense: {shard!r}"
            name = shard.get("file")
            if not isinstance(name, str) or Path(name).name != name or not name.endswith(".bin"):
                return f"{name!r} is not the name of a shard"
            if not isinstance(shard.get("sha256"), str):
                return f"{name} has no sha256"
    return None


def _check_size(path: Path, size: int, again: str) -> None:
    if not path.is_file():
        raise DataError(f"{path}: this shard is missing; {again}")
    found = path.stat().st_size
    if found != size:
        raise DataError(f"{path}: this shard has {found} bytes instead of {size}; {again}")

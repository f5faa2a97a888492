"""Prepared tokens in use: checked once, mapped into memory, sampled without replacement, read in windows."""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitquest.errors import DataError
from bitquest.files import sha256
from bitquest.models import Tokenizer
from bitquest.training.shards import DTYPES, TOKENIZER, read_manifest


@lru_cache(maxsize=4096)
def _digest(path: str, modified: int, size: int) -> str:
    return sha256(Path(path))


def _check_digest(path: Path, expected: str) -> None:
    status = path.stat()
    if _digest(str(path.absolute()), status.st_mtime_ns, status.st_size) != expected:
        raise DataError(
            f"{path}: the contents do not match their SHA-256: the file was changed or damaged; "
            "prepare the data again with: bitquest data prepare"
        )


def open_tokens(folder: str | Path, split: str = "train", verify: bool = True) -> "Tokens":
    """A split ("train" or "val") of a folder that `bitquest data prepare` wrote.

    Sizes are always checked, SHA-256 digests with `verify` (once per process and unchanged file).
    Raises DataError saying what is wrong, where, and what to do.
    """
    folder = Path(folder)
    fields = read_manifest(folder)
    if split not in fields["splits"]:
        raise DataError(f"{folder}: there is no split {split!r}; it has {', '.join(fields['splits'])}")
    shards = fields["splits"][split]
    if verify:
        for shard in shards:
            _check_digest(folder / shard["file"], shard["sha256"])
    tokenizer = folder / TOKENIZER
    made = Tokenizer.from_file(tokenizer) if tokenizer.is_file() else None
    if made is None or made.sha256 != fields["tokenizer_sha256"]:
        raise DataError(f"{tokenizer}: not the tokenizer that the data was prepared with; prepare the data again")
    if (made.vocab_size, made.eos_id) != (fields["vocab_size"], fields["eos_id"]):
        raise DataError(f"{folder}: vocab_size and eos_id are not those of its tokenizer; prepare the data again")
    dtype = DTYPES[fields["dtype"]]
    maps = [np.memmap(folder / s["file"], dtype=dtype, mode="r") for s in shards if s["tokens"]]
    return Tokens(folder, maps, fields["vocab_size"], fields["eos_id"], sum(s["utf8_bytes"] for s in shards))


class Tokens:
    """The tokens of a split, as one long row: documents one after the other, each followed by `eos_id`.

    utf8_bytes: the text's size, for bits per byte (the ends of documents count as nothing).
    """

    def __init__(self, folder: Path, shards: list[np.memmap], vocab_size: int, eos_id: int, utf8_bytes: int) -> None:
        self.folder, self.vocab_size, self.eos_id, self.utf8_bytes = folder, vocab_size, eos_id, utf8_bytes
        self._shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])
        self.count = int(self._ends[-1]) if shards else 0

    def tokenizer(self) -> Tokenizer:
        """The tokenizer the data was prepared with."""
        return Tokenizer.from_file(self.folder / TOKENIZER)

    def read(self, start: int, length: int) -> Tensor:
        """Tokens [start, start + length) as int64. Raises DataError for ids outside the vocabulary."""
        parts, shard = [], int(np.searchsorted(self._ends, start, side="right"))
        while length > 0:
            first = start - (int(self._ends[shard - 1]) if shard else 0)
            part = self._shards[shard][first : first + length]
            parts.append(part.astype(np.int64))
            start, length, shard = start + len(part), length - len(part), shard + 1
        ids = np.concatenate(parts)
        if ids.max() >= self.vocab_size:
            raise DataError(f"{self.folder}: token {ids.max()} is outside the vocabulary of {self.vocab_size}")
        return torch.from_numpy(ids)

    def _need(self, context: int) -> None:
        if context < 1:
            raise DataError(f"a context of {context} tokens predicts nothing; take 1 or more")
        if self.count < context + 1:
            raise DataError(
                f"{self.folder}: {self.count} tokens are too few for a sequence of {context} and its next token; "
                "lower the context or prepare more text"
            )

    def batch(self, seed: int, step: int, batch_size: int, context: int) -> Tensor:
        """The training batch of a step (counted from 0): (batch_size, context + 1) int64.

        Windows are drawn without replacement: each of an epoch's windows once, in an order of its own for every epoch,
        cut at an offset of its own. A function of (seed, step) alone, so that a run can go on anywhere.
        """
        self._need(context)
        windows = (self.count - 1) // context
        rows = []
        for sample in range(step * batch_size, (step + 1) * batch_size):
            epoch, number = divmod(sample, max(1, windows - 1))
            key = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
            # One window fewer than fit leaves room to begin an epoch at any of the first `context` tokens.
            offset = int.from_bytes(key[:8], "little") % context if windows > 1 else 0
            place = permuted(number, max(1, windows - 1), key)
            rows.append(self.read(offset + place * context, context + 1))
        return torch.stack(rows)

    def windows(self, context: int, batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
        """Non-overlapping windows in order, (≤ batch_size, context + 1) int64, at most `limit` batches.

        A window's last token is the next one's first: each token but the very first is predicted once. What fills no
        window comes last, as a batch of one shorter row.
        """
        self._need(context)
        total = (self.count - 1) // context
        for number, first in enumerate(range(0, total, batch_size)):
            if limit is not None and number >= limit:
                return
            yield torch.stack(
                [self.read(w * context, context + 1) for w in range(first, min(first + batch_size, total))]
            )
        rest, batches = self.count - total * context, -(-total // batch_size)
        if rest > 1 and (limit is None or batches < limit):
            yield self.read(total * context, rest).unsqueeze(0)


def permuted(index: int, size: int, key: bytes) -> int:
    """Where a pseudo-random permutation of range(size) sends an index; no memory, any size.

    A four-round Feistel network on the next even number of bits, walked until it lands inside (cycle walking; Black
    and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            mixed = hashlib.blake2b(right.to_bytes(8, "little") + bytes([turn]), key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(mixed, "little") & mask)
        index = (left << half) | right
        if index < size:
            return index

"""From text files to a folder of tokens: survey, tokenizer, shards, manifest; memory bounded whatever the size."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitquest.errors import DataError
from bitquest.files import sync, write_json
from bitquest.models import Tokenizer
from bitquest.training.data import permuted
from bitquest.training.readers import Piece, find_inputs, pieces
from bitquest.training.shards import (
    FORMAT,
    MANIFEST,
    TOKENIZER,
    VERSION,
    SplitWriter,
    dtype_for,
    is_part,
    manifest_digest,
    read_manifest,
)

Progress = Callable[[str, int, int], None]  # stage, bytes of the files read, bytes of all files
OnTokens = Callable[[int], None]  # told how many tokens there are so far

# With fewer documents the end of the text is held out, otherwise whole documents.
_FEW_DOCUMENTS = 20
_BATCH_CHARACTERS = 1 << 20
_BPE_SAMPLE_CHARACTERS = 20 << 20
_SHARD_TOKENS = 1 << 26


@dataclass(frozen=True)
class _Survey:
    """What a first look at the inputs found: the files with text, and its size; nothing of it kept."""

    files: tuple[Path, ...] = ()
    documents: int = 0
    utf8_bytes: int = 0


@dataclass(frozen=True)
class _HeldOut:
    """Which text is for validation: `count` of all `documents`, or everything from a byte of the whole on."""

    count: int = 0
    documents: int = 0
    key: bytes = b""
    from_byte: int | None = None

    def has(self, document: int) -> bool:
        """Whether the document of this number is held out: exactly `count` are, and none of them need be remembered."""
        return document < self.documents and permuted(document, self.documents, self.key) < self.count


def make_tokenizer(name: str, texts: Callable[[], Iterator[str]]) -> Tokenizer:
    """The tokenizer that --tokenizer names: "byte", "bpe:SIZE" trained on the texts, or a file or folder.

    Raises DataError saying what is possible.
    """
    if name in ("byte", "bytes"):
        return Tokenizer.byte_level()
    if name.startswith("bpe:"):
        size = name.removeprefix("bpe:")
        if not size.isdecimal():
            raise DataError(f"--tokenizer {name}: write bpe: and the size of the vocabulary, for example bpe:4096")
        return Tokenizer.train_bpe(texts(), int(size))
    if not Path(name).exists():
        raise DataError(f"--tokenizer {name}: neither 'byte' nor 'bpe:SIZE' nor a tokenizer.json or folder that exists")
    return Tokenizer.from_file(name)


def prepare(
    inputs: Sequence[Path | str],
    tokenizer: str,
    out: Path | str,
    *,
    val_inputs: Sequence[Path | str] = (),
    val_fraction: float = 0.01,
    text_field: str = "text",
    seed: int = 0,
    overwrite: bool = False,
    shard_tokens: int = _SHARD_TOKENS,
    progress: Progress | None = None,
    on_tokens: OnTokens | None = None,
) -> Path:
    """Tokenize text files into the folder `out`; returns it. The same inputs give the same bytes.

    Held out for validation are `val_inputs` if given; else documents drawn with `seed`, about val_fraction of them;
    else, with fewer than 20 documents, the last val_fraction of the text. Everything is written beside `out` and
    renamed when complete. Memory is bounded: neither text nor tokens nor lists of documents are kept.
    Raises DataError naming file and line, and for an `out` that exists without `overwrite`.
    """
    out, report = Path(out), progress or (lambda stage, done, total: None)
    place = out.resolve()
    if not 0 < val_fraction < 1:
        raise DataError(f"--val-fraction must lie between 0 and 1, not {val_fraction}")
    if shard_tokens < 1:
        raise DataError(f"--shard-tokens {shard_tokens}: a shard holds at least one token")
    _check_out(out, overwrite)
    found, val_found = find_inputs([Path(p) for p in inputs]), find_inputs([Path(p) for p in val_inputs])
    both = {file.resolve() for file in found} & {file.resolve() for file in val_found}
    if both:
        raise DataError(f"{min(both)}: this file is training text and held-out text at once; give it as one of them")
    survey = _survey(found, {Path(p) for p in inputs}, text_field, report)
    val_survey = _survey(val_found, {Path(p) for p in val_inputs}, text_field, report) if val_found else _Survey()
    held_out = _HeldOut() if val_found else _choose(survey, val_fraction, seed)
    made = make_tokenizer(tokenizer, lambda: _sample(survey, text_field, held_out, report))
    aside, replaced = (place.with_name(f".{place.name}.{what}") for what in ("partial", "replaced"))
    splits = {s: SplitWriter(aside, s, dtype_for(made.vocab_size), shard_tokens) for s in ("train", "val")}
    try:
        for left in (aside, replaced):  # by an interrupted start
            shutil.rmtree(left, ignore_errors=True)
        aside.mkdir(parents=True)
        for files, held, split in ((survey.files, held_out, "train"), (val_survey.files, _HeldOut(), "val")):
            for tokens in _tokenize(files, text_field, made, splits, held, split, report):
                if on_tokens is not None:
                    on_tokens(tokens)
        for name, writer in splits.items():
            writer.close()
            if not any(shard["utf8_bytes"] for shard in writer.shards):
                raise DataError(
                    f"{out}: no text is left for the {name} split: give more text, or another --val-fraction"
                )
        written = sum(shard["utf8_bytes"] for writer in splits.values() for shard in writer.shards)
        if written != survey.utf8_bytes + val_survey.utf8_bytes:
            raise DataError(f"{out}: an input changed while it was read; start again when nothing writes to the inputs")
        made.save(aside / TOKENIZER)
        fields: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": dtype_for(made.vocab_size),
            "vocab_size": made.vocab_size,
            "eos_id": made.eos_id,
            "tokenizer_sha256": made.sha256,
            "splits": {name: writer.shards for name, writer in splits.items()},
        }
        write_json(aside / MANIFEST, {**fields, "digest": manifest_digest(fields)})
        sync(aside)
        if place.exists():
            os.replace(place, replaced)
        os.replace(aside, place)
        sync(place.parent)
    except OSError as error:
        raise DataError(f"{out}: could not be written: {error.strerror or error}; nothing was kept") from error
    finally:
        for writer in splits.values():
            writer.abandon()
        if replaced.exists() and not place.exists():  # interrupted between the two renames
            os.replace(replaced, place)
        for left in (aside, replaced):
            shutil.rmtree(left, ignore_errors=True)
    return out


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"{out}: there is a file of this name; choose another --out")
    if not any(out.iterdir()):
        return
    if not (out / MANIFEST).is_file():
        raise DataError(f"{out}: this folder holds something else than prepared data; choose another --out")
    if not overwrite:
        raise DataError(f"{out}: holds prepared data already; add --overwrite to replace it, or choose another --out")
    # Only what this program wrote is ever removed.
    foreign = sorted(path.name for path in out.iterdir() if not is_part(path))
    if foreign:
        raise DataError(f"{out}: {foreign[0]!r} in there is not prepared data; move it away, or choose another --out")
    try:
        read_manifest(out)
    except DataError:
        if '"bitquest-data"' not in (out / MANIFEST).read_text(encoding="utf-8", errors="replace"):
            raise


def _survey(files: Sequence[Path], named: set[Path], text_field: str, report: Progress) -> _Survey:
    """Read everything once: every later pass knows what to expect, and mistakes show before any work is done.

    A file without text is a mistake where it was `named`, and left out where a folder has it among others.
    """
    count = _counter("looking", files, report)
    with_text, documents, size = [], 0, 0
    for file in files:
        visible, ends, length = False, 0, 0
        for piece in pieces(file, text_field, count):
            visible = visible or bool(piece.text.strip())
            ends += piece.ends
            length += len(piece.text.encode())
        if visible:
            with_text.append(file)
            documents, size = documents + ends, size + length
        elif file in named:
            what = "is empty" if file.stat().st_size == 0 else "has no text, only blanks"
            raise DataError(f"{file}: {what}; leave it out")
    if not with_text:
        raise DataError(f"{', '.join(map(str, sorted(named)))}: no file there has any text")
    return _Survey(tuple(with_text), documents, size)


def _counter(stage: str, files: Sequence[Path], report: Progress) -> Callable[[int], None]:
    """Adds up the bytes read of some files and reports them."""
    total, done = sum(file.stat().st_size for file in files), 0

    def count(read: int) -> None:
        nonlocal done
        done += read
        report(stage, done, total)

    return count


def _choose(survey: _Survey, fraction: float, seed: int) -> _HeldOut:
    if survey.documents >= _FEW_DOCUMENTS:
        count = min(max(1, round(fraction * survey.documents)), survey.documents - 1)
        return _HeldOut(count, survey.documents, hashlib.sha256(f"held out:{seed}".encode()).digest())
    return _HeldOut(from_byte=survey.utf8_bytes - max(1, round(fraction * survey.utf8_bytes)))


def _labelled(
    files: Sequence[Path], text_field: str, held_out: _HeldOut, on_read: Any = None
) -> Iterator[tuple[Piece, bool]]:
    """All pieces in order, each with whether it is held out; a piece that lies across the border is cut there."""
    number = position = 0
    for file in files:
        for piece in pieces(file, text_field, on_read):
            border, size = held_out.from_byte, len(piece.text.encode())
            if border is not None and position < border < position + size:
                head, tail = _cut(piece.text, border - position)
                yield Piece(head, ends=True), False
                if tail:
                    yield Piece(tail, piece.ends), True
            else:
                yield piece, held_out.has(number) or (border is not None and position >= border)
            number += piece.ends
            position += size


def _cut(text: str, byte: int) -> tuple[str, str]:
    """Cut near a byte: behind the next line break, or at the character there."""
    place = len(text.encode()[:byte].decode(errors="ignore"))
    line_end = text.find("\n", place, place + 4096) + 1
    place = line_end if 0 < line_end < len(text) else place
    return text[:place], text[place:]


def _sample(survey: _Survey, text_field: str, held_out: _HeldOut, report: Progress) -> Iterator[str]:
    """Training text for a tokenizer: all of it, or every n-th piece so that it is about 20 million characters."""
    every = -(-survey.utf8_bytes // _BPE_SAMPLE_CHARACTERS)
    count = _counter("sampling for the vocabulary", survey.files, report)
    for number, (piece, is_held_out) in enumerate(_labelled(survey.files, text_field, held_out, count)):
        if not is_held_out and number % every == 0:
            yield piece.text


def _tokenize(
    files: Sequence[Path],
    text_field: str,
    tokenizer: Tokenizer,
    splits: dict[str, SplitWriter],
    held_out: _HeldOut,
    split: str,
    report: Progress,
) -> Iterator[int]:
    """Write all files' tokens; yields after each batch how many tokens there are."""
    count = _counter("tokenizing", files, report)
    batch: list[tuple[Piece, bool]] = []
    characters = 0
    for piece, is_held_out in _labelled(files, text_field, held_out, count):
        batch.append((piece, is_held_out))
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield _write(batch, tokenizer, splits, split)
            batch, characters = [], 0
    yield _write(batch, tokenizer, splits, split)


def _write(batch: list[tuple[Piece, bool]], tokenizer: Tokenizer, splits: dict[str, SplitWriter], split: str) -> int:
    for (piece, is_held_out), ids in zip(batch, _encode(tokenizer, [p.text for p, _ in batch]), strict=True):
        if piece.ends:
            ids = np.append(ids, tokenizer.eos_id)
        splits["val" if is_held_out else split].write(ids, len(piece.text.encode()), int(piece.ends))
    return sum(writer.tokens for writer in splits.values())


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    if tokenizer.is_byte_level:  # ids are the bytes: no need to look anything up
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16) for text in texts]
    return [np.asarray(ids, dtype=np.uint32) for ids in tokenizer.encode_batch(texts)]

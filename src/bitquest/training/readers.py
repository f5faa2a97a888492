"""Reading text: .txt and .jsonl, plain or compressed, as documents in pieces of bounded size.

A .txt file is one document, handed out in pieces of about a megabyte; a line of .jsonl is one document and one piece.
Pieces of a .txt end before a line break that follows a visible character, where byte-level BPE would begin a new word
anyway: the tokens are those of the whole text. Only tokenizers that mark the start of a text notice the seam.
"""

import codecs
import difflib
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from bitquest.errors import DataError, MissingExtraError

FORMATS = (".txt", ".jsonl")
COMPRESSIONS = (".gz", ".xz", ".zst")
PIECE_CHARACTERS = 1 << 20
_READ_BYTES = 1 << 18
_LARGEST_LINE = 256 << 20

OnRead = Callable[[int], None]  # told the bytes of the file, as it lies on the disk, that have been read


class Piece(NamedTuple):
    """A stretch of a document; `ends` says whether the document ends with it."""

    text: str
    ends: bool


def kind_of(path: Path) -> str:
    """ ".txt" or ".jsonl". Raises DataError for another name."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes = suffixes[:-1]
    if not suffixes or suffixes[-1] not in FORMATS:
        known = ", ".join(FORMATS)
        raise DataError(f"{path}: unknown kind of file; known are {known}, also with {', '.join(COMPRESSIONS)} behind")
    return suffixes[-1]


def find_inputs(paths: list[Path]) -> list[Path]:
    """The files themselves and, from folders, all .txt and .jsonl files below, sorted. Raises DataError for none."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.is_file() and _is_known(p))
            if not below:
                raise DataError(f"{path}: this folder has no .txt or .jsonl files (.gz, .xz, .zst included)")
            files += below
        elif path.is_file():
            kind_of(path)
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    return files


def _is_known(path: Path) -> bool:
    try:
        return bool(kind_of(path))
    except DataError:
        return False


def pieces(path: Path, text_field: str = "text", on_read: OnRead | None = None) -> Iterator[Piece]:
    """The documents of a file as pieces. Raises DataError naming file and line or byte for what cannot be read."""
    chunks = _decompressed(path, on_read)
    if kind_of(path) == ".jsonl":
        return _json_documents(path, chunks, text_field)
    return _text_pieces(path, chunks)


# --- bytes ---------------------------------------------------------------------------------------------------------


def _decompressed(path: Path, on_read: OnRead | None) -> Iterator[bytes]:
    with path.open("rb") as raw:
        read = 0
        try:
            for chunk in _chunks(path, raw):
                if on_read is not None:
                    now = raw.tell()
                    on_read(now - read)
                    read = now
                yield chunk
        except (EOFError, zlib.error, gzip.BadGzipFile, lzma.LZMAError) as error:
            raise DataError(f"{path}: damaged or cut off: {error}") from None
        if on_read is not None:
            on_read(path.stat().st_size - read)


def _chunks(path: Path, raw: IO[bytes]) -> Iterator[bytes]:
    if path.suffix == ".zst":
        yield from _zstandard_chunks(path, raw)
        return
    opened: Any = raw
    if path.suffix == ".gz":
        opened = gzip.GzipFile(fileobj=raw)
    elif path.suffix == ".xz":
        opened = lzma.LZMAFile(raw)  # noqa: SIM115  (closing it closes nothing: `raw` is the caller's)
    while chunk := opened.read(_READ_BYTES):
        yield chunk


def _zstandard_chunks(path: Path, raw: IO[bytes]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise MissingExtraError("zstandard", "zst", f"Reading {path}") from None
    frame = zstandard.ZstdDecompressor().decompressobj()
    begun = False
    try:
        while chunk := raw.read(_READ_BYTES // 16):  # small: a chunk may expand a thousandfold
            while chunk:
                begun = True
                yield frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, begun = zstandard.ZstdDecompressor().decompressobj(), False
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: damaged or cut off: {error}") from None
    if begun:
        raise DataError(f"{path}: damaged or cut off: the last frame is incomplete")


# --- text ----------------------------------------------------------------------------------------------------------


def _characters(path: Path, chunks: Iterator[bytes]) -> Iterator[str]:
    decoder, read = codecs.getincrementaldecoder("utf-8-sig")(), 0
    for chunk in _with_end(chunks):
        pending = len(decoder.getstate()[0])
        try:
            yield decoder.decode(chunk or b"", final=chunk is None)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8 at byte {read - pending + error.start}; convert the file to UTF-8 first"
            ) from None
        read += len(chunk or b"")


def _with_end(chunks: Iterator[bytes]) -> Iterator[bytes | None]:
    yield from chunks
    yield None


# A line break behind a visible character: nothing that a word splitter joins reaches over it.
_SEAM = re.compile(r"(?<=\S)\n")


def _text_pieces(path: Path, chunks: Iterator[bytes]) -> Iterator[Piece]:
    held = ""
    for characters in _characters(path, chunks):
        held += characters
        while len(held) > 2 * PIECE_CHARACTERS:
            seam = _SEAM.search(held, PIECE_CHARACTERS)
            end = seam.start() if seam is not None else 2 * PIECE_CHARACTERS
            yield Piece(held[:end], ends=False)
            held = held[end:]
    yield Piece(held, ends=True)


def _json_documents(path: Path, chunks: Iterator[bytes], text_field: str) -> Iterator[Piece]:
    for number, line in enumerate(_lines(path, chunks), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            raise DataError(f"{path}, line {number}: not UTF-8; convert the file to UTF-8 first") from None
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise DataError(
                f"{path}, line {number}: expected an object with a {text_field!r} field, found {line[:40]!r}"
            )
        if text_field not in record:
            close = difflib.get_close_matches(text_field, list(record), 1)
            hint = f"; did you mean --text-field {close[0]}?" if close else f"; it has {', '.join(map(repr, record))}"
            raise DataError(f"{path}, line {number}: there is no field {text_field!r}{hint}")
        text = record[text_field]
        if not isinstance(text, str):
            raise DataError(f"{path}, line {number}: field {text_field!r} is {type(text).__name__}, not text")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DataError(f"{path}, line {number}: half a surrogate pair cannot be written as UTF-8") from None
        yield Piece(text, ends=True)


def _lines(path: Path, chunks: Iterator[bytes]) -> Iterator[bytes]:
    held: list[bytes] = []
    size = 0
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        held.append(first)
        size += len(first)
        if size > _LARGEST_LINE:
            raise DataError(
                f"{path}: a line is longer than {_LARGEST_LINE >> 20} MiB; is this .jsonl, one object a line?"
            )
        for part in rest:
            yield b"".join(held)
            held, size = [part], len(part)
    yield b"".join(held)

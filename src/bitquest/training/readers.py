"""Reading text: .txt and .jsonl, plain or compressed, as documents in pieces of bounded size.

A .txt file is one document and a line of .jsonl is one; long ones are handed out in pieces of at most 524,288
characters. A piece ends before a line break that follows a visible character (before a space, in text without line
breaks), where byte-level BPE would begin a new word anyway: the tokens are those of the whole text. Only tokenizers
that mark the start of a text notice the seam. Lines of .jsonl without visible text are no documents.
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
PIECE_CHARACTERS = 1 << 18
_READ_BYTES = 1 << 18
_LARGEST_LINE = 256 << 20

OnRead = Callable[[int], None]  # told the bytes of the file, as it lies on the disk, that have been read


class Piece(NamedTuple):
    """A stretch of a document; `ends` says whether the document ends with it."""

    text: str
    ends: bool


def kind_of(path: Path) -> str:
    """ ".txt" or ".jsonl". Raises DataError for another name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes = suffixes[:-1]
    if not suffixes or suffixes[-1] not in FORMATS:
        known = ", ".join(FORMATS)
        raise DataError(f"{path}: unknown kind of file; known are {known}, also with {', '.join(COMPRESSIONS)} behind")
    return suffixes[-1]


def find_inputs(paths: list[Path]) -> list[Path]:
    """The files themselves and, from folders, all .txt and .jsonl files below, sorted; each file once.

    Raises DataError for what is not there, of no known kind, or a folder without such files.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.is_file() and is_known(p))
            if not below:
                raise DataError(f"{path}: this folder has no .txt or .jsonl files (.gz, .xz, .zst included)")
            files += below
        elif path.is_file():
            kind_of(path)
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder")
    return list({file.resolve(): file for file in files}.values())


def is_known(path: Path) -> bool:
    """Whether a file's name is one of text, compressed or not."""
    try:
        return bool(kind_of(path))
    except DataError:
        return False


def pieces(
    path: Path, text_field: str = "text", on_read: OnRead | None = None, kind: str | None = None
) -> Iterator[Piece]:
    """The documents of a file as pieces. Raises DataError naming file and line or byte for what cannot be read.

    kind: one of FORMATS, whatever the file's name says.
    """
    chunks = _decompressed(path, on_read)
    if (kind or kind_of(path)) == ".jsonl":
        return _json_documents(path, chunks, text_field)
    return _text_pieces(path, chunks)


def json_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a .jsonl file with their line numbers, blank lines left out. Raises DataError naming the line."""
    for number, line in enumerate(_lines(path, _decompressed(path, None)), 1):
        if line.strip():
            where = f"{path}, line {number}"
            record = _parsed(line, where)
            if not isinstance(record, dict):
                raise DataError(f"{where}: expected an object, found {line[:40].decode(errors='replace')}")
            yield number, record


# --- bytes ---------------------------------------------------------------------------------------------------------


def _decompressed(path: Path, on_read: OnRead | None) -> Iterator[bytes]:
    try:
        raw = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    with raw:
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
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        if on_read is not None:
            on_read(path.stat().st_size - read)


def _chunks(path: Path, raw: IO[bytes]) -> Iterator[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        yield from _zstandard_chunks(path, raw)
        return
    opened: Any = raw
    if suffix == ".gz":
        opened = gzip.GzipFile(fileobj=raw)
    elif suffix == ".xz":
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
    decoder, read, begun = codecs.getincrementaldecoder("utf-8")(), 0, False
    for chunk in _with_end(chunks):
        pending = len(decoder.getstate()[0])
        try:
            characters = decoder.decode(chunk or b"", final=chunk is None)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: not UTF-8 at byte {read - pending + error.start}; convert the file to UTF-8 first"
            ) from None
        read += len(chunk or b"")
        if characters and not begun:
            characters, begun = characters.removeprefix("\N{BYTE ORDER MARK}"), True
        yield characters


def _with_end(chunks: Iterator[bytes]) -> Iterator[bytes | None]:
    yield from chunks
    yield None


# A line break or a space behind a visible character: nothing that a word splitter joins reaches over it.
_LINE_BREAK = re.compile(r"(?<=\S)\r?\n")
_SPACE = re.compile(r"(?<=\S) (?=\S)")


def _seams(text: str) -> Iterator[int]:
    """Where to cut a text so that what is left behind the last cut is at most two pieces long."""
    start = 0
    while len(text) - start > 2 * PIECE_CHARACTERS:
        first, last = start + PIECE_CHARACTERS, start + 2 * PIECE_CHARACTERS
        found = _LINE_BREAK.search(text, first, last) or _SPACE.search(text, first, last)
        start = found.start() if found is not None else last
        yield start


def _text_pieces(path: Path, chunks: Iterator[bytes]) -> Iterator[Piece]:
    held = ""
    for characters in _characters(path, chunks):
        held += characters
        start = 0
        for end in _seams(held):
            yield Piece(held[start:end], ends=False)
            start = end
        held = held[start:]
    yield Piece(held, ends=True)


def _document(text: str) -> Iterator[Piece]:
    start = 0
    for end in _seams(text):
        yield Piece(text[start:end], ends=False)
        start = end
    yield Piece(text[start:], ends=True)


def _json_documents(path: Path, chunks: Iterator[bytes], text_field: str) -> Iterator[Piece]:
    for number, line in enumerate(_lines(path, chunks), 1):
        if line.strip():
            text = _text_of(line, f"{path}, line {number}", text_field)
            if text.strip():
                yield from _document(text)


def _text_of(line: bytes, where: str, text_field: str) -> str:
    """The text of one line of .jsonl. Raises DataError naming the line, and the field that was probably meant."""
    record = _parsed(line, where)
    if not isinstance(record, dict):
        found = line[:40].decode(errors="replace")
        raise DataError(f"{where}: expected an object with a {text_field!r} field, found {found}")
    if text_field not in record:
        close = difflib.get_close_matches(text_field, list(record), 1)
        names = ", ".join(map(repr, list(record)[:10])) or "none at all"
        hint = f"did you mean --text-field {close[0]}?" if close else f"name one with --text-field; it has {names}"
        raise DataError(f"{where}: there is no field {text_field!r}; {hint}")
    text = record[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {text_field!r} is {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: half a surrogate pair cannot be written as UTF-8") from None
    return text


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.removeprefix(codecs.BOM_UTF8).decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 at byte {error.start} of it; convert the file to UTF-8 first") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON at column {error.colno}: {error.msg}; a .jsonl holds one JSON object on each line"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers and nesting beyond what Python reads
        raise DataError(f"{where}: not valid JSON: {error}") from None


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

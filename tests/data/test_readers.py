"""Files as documents: every format, every compression, every mistake a new user makes."""

import gzip
import json
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from bitquest.errors import DataError, MissingExtraError
from bitquest.models import Tokenizer
from bitquest.training import readers
from bitquest.training.readers import find_inputs, pieces

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.compress(data[: len(data) // 2]) + zstandard.compress(data[len(data) // 2 :]),
}
LINES = "\n".join(json.dumps({"id": n, "text": f"Ärtikel {n}\nwith a second line 😀"}) for n in range(50)) + "\n"


def texts(path: Path, **options: str) -> list[str]:
    documents, parts = [], []
    for piece in pieces(path, **options):
        parts.append(piece.text)
        if piece.ends:
            documents.append("".join(parts))
            parts = []
    assert not parts
    return documents


@pytest.mark.parametrize("suffix", COMPRESS)
def test_jsonl_in_every_compression(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](LINES.encode()))
    read: list[int] = []
    assert [p.text for p in pieces(path, on_read=read.append)] == [
        json.loads(line)["text"] for line in LINES.split("\n")[:-1]
    ]
    assert sum(read) == path.stat().st_size


@pytest.mark.parametrize("suffix", COMPRESS)
def test_txt_is_one_document(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(readers, "_READ_BYTES", 64)
    text = "\ufeffFirst äöü line.\n\n" + "Many words, many line breaks.\n\n\n  indented\n" * 40 + "x" * 900
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](text.encode()))
    assert texts(path) == [text[1:]]  # the byte order mark is not text
    got = list(pieces(path))
    assert len(got) > 5
    assert max(len(piece.text) for piece in got) <= 400


def test_pieces_do_not_change_the_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 60)
    text = "The people's house.\n\nIt's 1789,  and\n \n\tthe union...\nstands!\n\n\n" * 50
    path = tmp_path / "a.txt"
    path.write_text(text)
    tokenizer = Tokenizer.train_bpe([text], 320)
    parts = [piece.text for piece in pieces(path)]
    assert len(parts) > 10
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


def test_folders_are_searched_in_order(tmp_path: Path) -> None:
    for name in ("b/z.txt", "a.jsonl.gz", "b/c.txt.xz", "picture.png", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = find_inputs([tmp_path])
    assert [str(p.relative_to(tmp_path)) for p in found] == ["a.jsonl.gz", "b/c.txt.xz", "b/z.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": 1}\n', "line 1: field 'text' is int"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"txt": "b"}\n',
            "line 2: there is no field 'text'; did you mean --text-field txt",
        ),
        ("a.jsonl", b'{"zz": "a"}', "name one with --text-field; it has 'zz'"),
        ("a.jsonl", b"{}", "it has none at all"),
        ("a.jsonl", b"\n\nhello\n", "line 3: not valid JSON at column 1"),
        ("a.jsonl", b'[\n{"text": "a"}\n]', "one JSON object on each line"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "line 1: not valid JSON"),
        ("a.txt", b"\xef\xbb\xbfabc\xff", "not UTF-8 at byte 6"),
        ("a.jsonl", b"[1]\n", r"line 1: expected an object with a 'text' field, found \[1\]$"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1: not UTF-8 at byte 10 of it"),
        ("a.jsonl", b'{"text": "\\ud800"}', "line 1: half a surrogate"),
        ("a.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("a.txt", b"hello \xe4 world", "not UTF-8 at byte 6"),
        ("a.txt", b"cut \xe2\x82", "not UTF-8 at byte 4"),
        ("a.txt.gz", b"no gzip at all", "damaged or cut off"),
        ("a.txt.xz", b"no xz at all", "damaged or cut off"),
        ("a.txt.zst", b"no zstandard at all", "damaged or cut off"),
        ("a.csv", b"x", "unknown kind of file; known are .txt, .jsonl"),
        ("a", b"x", "unknown kind of file"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(pieces(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_cut_off_archives(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    data = COMPRESS[suffix](LINES.encode() * 50)
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(DataError, match="damaged or cut off"):
        list(pieces(path))


def test_position_of_bad_bytes_far_into_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_READ_BYTES", 7)
    path = tmp_path / "a.txt"
    path.write_bytes("ää".encode() * 10 + b"\xc3(")
    with pytest.raises(DataError, match="at byte 40"):
        list(pieces(path))


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_LARGEST_LINE", 1000)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * 2000}))
    with pytest.raises(DataError, match="a line is longer"):
        list(pieces(path))


def test_zstandard_is_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"x"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'bitquest\[zst\]'"):
        list(pieces(path))


@pytest.mark.parametrize("between", ["\r\n", " "])
def test_seams_without_plain_line_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, between: str) -> None:
    monkeypatch.setattr(readers, "PIECE_CHARACTERS", 60)
    text = between.join(["The people's", "house", "stands", "in", "1789", "..."] * 60)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    parts = [piece.text for piece in pieces(path)]
    assert len(parts) > 10
    assert "".join(parts) == text
    assert all(part.startswith(between) for part in parts[1:])
    tokenizer = Tokenizer.train_bpe([text], 320)
    assert [i for part in parts for i in tokenizer.encode(part)] == tokenizer.encode(text)


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")

    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    with pytest.raises(DataError, match=r"a\.txt: cannot be read: Permission denied"):
        list(pieces(path))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_names_in_capitals(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"A.JSONL{suffix.upper()}"
    path.write_bytes(COMPRESS[suffix](LINES.encode()))
    assert find_inputs([tmp_path]) == [path]
    assert len(texts(path)) == 50


def test_each_file_once(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "c.txt").symlink_to(tmp_path / "a.txt")
    assert len(find_inputs([tmp_path / "b.txt", tmp_path, tmp_path / "a.txt"])) == 2


def test_missing_inputs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        find_inputs([tmp_path / "nowhere.txt"])
    with pytest.raises(DataError, match=r"has no \.txt or \.jsonl"):
        find_inputs([tmp_path])

"""From text to tokens on the disk: what is written, what is held out, and what a broken disk leaves behind."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from bitquest.errors import DataError
from bitquest.models import Tokenizer
from bitquest.training import open_tokens, prepare
from bitquest.training import prepare as prepare_module_function
from bitquest.training.shards import SplitWriter, dtype_for, manifest_digest, read_manifest

assert prepare_module_function is prepare


def documents(path: Path, count: int = 60) -> Path:
    lines = (json.dumps({"text": f"Document {n}: " + "words and wörds, " * (n % 7 + 1)}) for n in range(count))
    path.write_text("\n".join(lines))
    return path


def all_ids(folder: Path, split: str) -> list[int]:
    tokens = open_tokens(folder, split)
    return tokens.read(0, tokens.count).tolist()


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_every_document_once_and_ended(tmp_path: Path, tokenizer: str) -> None:
    source = documents(tmp_path / "a.jsonl")
    out = prepare([source], tokenizer, tmp_path / "out", val_fraction=0.1, shard_tokens=500)
    expected = {json.loads(line)["text"] for line in source.read_text().split("\n")}
    used, found = open_tokens(out).tokenizer(), []
    for split in ("train", "val"):
        ids, eos = all_ids(out, split), used.eos_id
        assert ids[-1] == eos
        parts = " ".join(map(str, ids)).removesuffix(f" {eos}").split(f" {eos} ")
        found += [used.decode(int(i) for i in part.split()) for part in parts]
        tokens = open_tokens(out, split)
        assert tokens.utf8_bytes == sum(len(used.decode(int(i) for i in p.split()).encode()) for p in parts)
    assert sorted(found) == sorted(expected)
    manifest = read_manifest(out)
    assert sum(s["documents"] for s in manifest["splits"]["val"]) == 6
    assert len(manifest["splits"]["train"]) > 1


def test_bytes_are_the_tokenizers_bytes(tmp_path: Path) -> None:
    source = documents(tmp_path / "a.jsonl")
    prepare([source], "byte", tmp_path / "fast")
    Tokenizer.byte_level().save(tmp_path / "tokenizer.json")
    prepare([source], str(tmp_path / "tokenizer.json"), tmp_path / "file")
    assert all_ids(tmp_path / "fast", "train") == all_ids(tmp_path / "file", "train")
    texts = [json.loads(line)["text"] for line in source.read_text().split("\n")]
    slow = [i for text in texts for i in [*Tokenizer.byte_level().encode(text), 256]]
    assert sorted(slow) == sorted(all_ids(tmp_path / "fast", "train") + all_ids(tmp_path / "fast", "val"))


def test_the_end_of_one_text_is_held_out(tmp_path: Path) -> None:
    text = "".join(f"Line {n} of the text.\n" for n in range(400))
    (tmp_path / "a.txt").write_text(text)
    out = prepare([tmp_path / "a.txt"], "byte", tmp_path / "out", val_fraction=0.2)
    train, val = (bytes(all_ids(out, split)[:-1]).decode() for split in ("train", "val"))
    assert train + val == text
    assert train.endswith("\n")
    assert 0.17 < len(val) / len(text) < 0.22


def test_own_validation_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("training text")
    (tmp_path / "b.txt").write_text("held-out text")
    out = prepare([tmp_path / "a.txt"], "byte", tmp_path / "out", val_inputs=[tmp_path / "b.txt"])
    assert bytes(all_ids(out, "train")[:-1]) == b"training text"
    assert bytes(all_ids(out, "val")[:-1]) == b"held-out text"


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    source = documents(tmp_path / "a.jsonl")
    for name in ("one", "two"):
        prepare([source], "bpe:280", tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    assert dtype_for(65536) == "uint16"
    assert dtype_for(65537) == "uint32"
    writer = SplitWriter(tmp_path, "train", "uint32", 3)
    writer.write([70000, 1], 5, 0)
    writer.write(np.array([2, 80000, 4, 5, 6]), 5, 1)
    writer.close()
    assert [s["tokens"] for s in writer.shards] == [3, 3, 1]
    assert np.fromfile(tmp_path / "train-00001.bin", dtype="<u4").tolist() == [80000, 4, 5]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"", {}, "is empty"),
        (b" \n\t \n", {}, "has no text, only blanks"),
        (b"x" * 100, {"tokenizer": "bpe"}, "neither 'byte' nor 'bpe:SIZE'"),
        (b"x" * 100, {"tokenizer": "bpe:large"}, "for example bpe:4096"),
        (b"x" * 100, {"tokenizer": "bpe:10"}, "at least 257"),
        (b"x" * 100, {"val_fraction": 0.0}, "between 0 and 1"),
        (b"x", {}, "no text is left for the train split"),
    ],
)
def test_what_cannot_be_prepared(tmp_path: Path, content: bytes, options: dict, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    options = {"tokenizer": "byte", **options}
    with pytest.raises(DataError, match=message):
        prepare([tmp_path / "a.txt"], out=tmp_path / "out", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_what_stands_in_the_way(tmp_path: Path) -> None:
    source = documents(tmp_path / "a.jsonl")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="a file of this name"):
        prepare([source], "byte", tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").write_text("x")
    with pytest.raises(DataError, match="something else than prepared data"):
        prepare([source], "byte", tmp_path / "other", overwrite=True)
    assert (tmp_path / "other" / "thesis.doc").exists()
    prepare([source], "byte", tmp_path / "out")
    with pytest.raises(DataError, match="add --overwrite"):
        prepare([source], "byte", tmp_path / "out")
    prepare([source], "bpe:280", tmp_path / "out", overwrite=True)
    assert open_tokens(tmp_path / "out").vocab_size == 280


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = documents(tmp_path / "a.jsonl")
    prepare([source], "byte", tmp_path / "out")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SplitWriter, "write", full)
    with pytest.raises(DataError, match="No space left on device; nothing was kept"):
        prepare([source], "byte", tmp_path / "new")
    with pytest.raises(DataError, match="No space left"):
        prepare([source], "byte", tmp_path / "out", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]
    assert open_tokens(tmp_path / "out").count > 0


def test_an_interrupted_start_is_swept_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = documents(tmp_path / "a.jsonl")
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "train-00000.bin").write_bytes(b"half")
    prepare([source], "byte", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]


# --- opening ---


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    return prepare([documents(folder / "a.jsonl")], "byte", folder / "out")


@pytest.fixture
def prepared(pristine: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "data"
    copy.mkdir()
    for file in pristine.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def change(folder: Path, **fields: object) -> None:
    """Alter the manifest and make its digest right again."""
    manifest = json.loads((folder / "manifest.json").read_text()) | fields
    manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_every_flipped_byte_is_noticed(prepared: Path) -> None:
    for name in ("manifest.json", "train-00000.bin", "val-00000.bin", "tokenizer.json"):
        data = bytearray((prepared / name).read_bytes())
        for position in range(0, len(data), max(1, len(data) // 40)):
            flipped = bytearray(data)
            flipped[position] ^= 1
            (prepared / name).write_bytes(flipped)
            try:
                for split in ("train", "val"):
                    open_tokens(prepared, split)
            except DataError:
                continue
            # JSON has bytes that mean nothing: blanks, the name of a setting that is off anyway.
            assert name in ("manifest.json", "tokenizer.json"), position
            if name == "manifest.json":
                assert json.loads(flipped) == json.loads(data)
            assert Tokenizer.from_file(prepared).sha256 == Tokenizer.byte_level().sha256
        (prepared / name).write_bytes(data)
    open_tokens(prepared)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "version 2 of the data format; this bitquest reads version 1"),
        ({"format": "other"}, "no manifest of prepared data"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"vocab_size": -1}, "do not make sense"),
        ({"eos_id": 257}, "do not make sense"),
        ({"splits": {"train": []}}, "splits must be train and val"),
        ({"splits": {"train": [{"file": "a.bin"}], "val": []}}, "counts do not make sense"),
        (
            {"splits": {"train": [{"file": "../x.bin", "tokens": 1, "utf8_bytes": 1, "documents": 1}], "val": []}},
            "is not the name of a shard",
        ),
        (
            {"splits": {"train": [{"file": "x.bin", "tokens": 1 << 60, "utf8_bytes": 1, "documents": 1}], "val": []}},
            "counts do not make sense",
        ),
        ({"tokenizer_sha256": "0"}, "not the tokenizer"),
    ],
)
def test_manifests_that_lie(prepared: Path, fields: dict, message: str) -> None:
    change(prepared, **fields)
    with pytest.raises(DataError, match=message):
        open_tokens(prepared)


def test_missing_and_truncated(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder; make it with: bitquest data prepare"):
        open_tokens(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"has no manifest\.json"):
        open_tokens(tmp_path)
    with pytest.raises(DataError, match="no split 'test'"):
        open_tokens(prepared, "test")
    data = (prepared / "train-00000.bin").read_bytes()
    (prepared / "train-00000.bin").write_bytes(data[:-2])
    with pytest.raises(DataError, match=f"has {len(data) - 2} bytes instead of {len(data)}"):
        open_tokens(prepared)
    (prepared / "train-00000.bin").unlink()
    with pytest.raises(DataError, match="this shard is missing"):
        open_tokens(prepared)
    (prepared / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        open_tokens(prepared)


def test_ten_megabytes_of_wikipedia(shared_data: Path, tmp_path: Path) -> None:
    out = prepare([shared_data / "text" / "enwiki2015_ci_10MB.jsonl"], "byte", tmp_path / "out")
    train, val = open_tokens(out), open_tokens(out, "val")
    assert train.count + val.count == train.utf8_bytes + val.utf8_bytes + 611
    assert "article" in train.tokenizer().decode(train.read(0, 200_000).tolist())

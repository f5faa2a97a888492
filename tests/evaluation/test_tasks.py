"""Scores of multiple-choice tasks: their definitions by hand, and lm-eval's own numbers on a real model."""

import json
import math
from pathlib import Path

import pytest

from bitquest.errors import DataError
from bitquest.evaluation.sources import open_model
from bitquest.evaluation.task_files import Item, Task, read_task
from bitquest.evaluation.tasks import ItemScore, TaskScore, evaluate_task, score_table
from bitquest.models import Llama, LlamaConfig, Tokenizer
from bitquest.nn import pack_, quantize_

BYTES = Tokenizer.byte_level()
# What lm-eval 0.4.13 computes on stories15M in float32: scores of the whole files, ln p of each choice.
GOLDEN = json.loads((Path(__file__).parent / "lm_eval_scores.json").read_text(encoding="utf-8"))


def score_of(*rows):
    """A TaskScore of (log-likelihoods, choices, right one)."""
    items = tuple(
        ItemScore(Item(line, ("c",) * len(texts), tuple(f" {t}" for t in texts), tuple(map(len, texts)), gold), lls)
        for line, (lls, texts, gold) in enumerate(rows, 1)
    )
    return TaskScore(Task(Path("a.jsonl"), "generic", tuple(score.item for score in items)), items)


def test_scores_are_what_lm_eval_defines():
    score = score_of(
        ((-4.0, -5.0), ("a", "long one"), 0),  # taken 0; per character 1
        ((-4.0, -5.0), ("a", "long one"), 1),
        ((-3.0, -3.0, -9.0), ("ab", "cd", "ef"), 0),  # equal: the first counts
        ((-3.0, -3.0, -9.0), ("ab", "cd", "ef"), 1),
    )
    assert [item.taken for item in score.items] == [0, 0, 0, 0]
    assert [item.taken_norm for item in score.items] == [1, 1, 0, 0]
    assert (score.acc, score.acc_norm) == (0.5, 0.5)
    assert score.acc_stderr == pytest.approx(math.sqrt(4 * 0.25 / 3 / 4))
    assert score.chance == pytest.approx((1 / 2 + 1 / 2 + 1 / 3 + 1 / 3) / 4)
    nats, size = 4 + 5 + 3 + 3, len(" a" + " long one" + " ab" + " cd")
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / size)


def test_lengths_are_characters_and_sizes_are_bytes():
    score = score_of(((-9.0, -10.0), ("süß!", "abcde"), 0))
    assert score.items[0].taken_norm == 1  # -9 / 4 < -10 / 5; by bytes it would be 0
    assert score.bits_per_byte == pytest.approx(9 / math.log(2) / 7)


def test_one_item_has_no_standard_error():
    score = score_of(((-1.0, -2.0), ("a", "b"), 0))
    assert math.isnan(score.acc_stderr)
    fields = json.loads(json.dumps(score.to_json(), allow_nan=False))
    assert (fields["acc"], fields["acc_stderr"], fields["items"], fields["choices"]) == (1, None, 1, 2)
    [row] = score_table([score]).rows
    assert row[2] == "100.00"


def small(scheme, context=48):
    return quantize_(Llama(LlamaConfig(257, 32, 64, 1, 2, 2, context)).init_weights(2), scheme).eval()


@pytest.fixture
def questions(tmp_path):
    """Twelve questions of one to six words."""
    words = ["the", "state", "of", "a", "union", "is", "strong"]
    records = [
        {"context": " ".join(words[: 1 + n % 6]), "choices": [words[n % 7], words[(n + 2) % 7], "un"], "answer": n % 3}
        for n in range(12)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path / "q.jsonl"


@pytest.mark.parametrize("scheme", ["none", "w1a1"])
def test_batches_of_1_and_16_answer_alike(scheme, questions):
    model = pack_(small(scheme))
    alone, together = (evaluate_task(model, BYTES, read_task(questions), batch_size=n) for n in (1, 16))
    for a, b in zip(alone.items, together.items, strict=True):
        assert b.log_likelihoods == pytest.approx(a.log_likelihoods, rel=1e-5)
        assert (a.taken, a.taken_norm) == (b.taken, b.taken_norm)


def test_contexts_are_cut_and_counted_and_choices_are_not(tmp_path):
    records = [
        {"context": "abc" * 40, "choices": ["one", "two"], "answer": 0},
        {"context": "abc", "choices": ["one", "x" * 48], "answer": 0},
    ]
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps(records[0]) + "\n")
    model = small("none")
    long = evaluate_task(model, BYTES, read_task(path))
    path.write_text(json.dumps(records[0] | {"context": ("abc" * 40)[-45:]}) + "\n")
    assert long.cut == 1
    assert long.items[0].log_likelihoods == evaluate_task(model, BYTES, read_task(path)).items[0].log_likelihoods
    assert "of 1 items the context was too long" in score_table([long]).note
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(DataError, match=r"long\.jsonl, line 2, choice 1: 49 tokens are more than the 48 positions"):
        evaluate_task(model, BYTES, read_task(path))


@pytest.fixture(scope="module")
def opened(shared_data):
    return open_model(shared_data / "checkpoints" / "stories15M")


@pytest.mark.parametrize("name", sorted(set(GOLDEN["tasks"]) - {"hellaswag"}))
def test_lm_eval_has_these_numbers(name, opened, tmp_path):
    golden = GOLDEN["tasks"][name]
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in golden["records"]))
    score = evaluate_task(opened.model, opened.tokenizer, read_task(tmp_path / f"{name}.jsonl"))
    assert score.cut == (name in ("arc", "generic"))  # a context of over 256 tokens is in them
    for item, expected in zip(score.items, golden["log_likelihoods"], strict=True):
        assert item.log_likelihoods == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert score.acc == pytest.approx(golden["acc"])
    assert score.acc_stderr == pytest.approx(golden["acc_stderr"])
    if "acc_norm" in golden:
        assert score.acc_norm == pytest.approx(golden["acc_norm"])
        assert score.acc_norm_stderr == pytest.approx(golden["acc_norm_stderr"])


def test_lm_eval_has_these_numbers_on_hellaswag(shared_data, opened):
    """Items of both sources, ActivityNet (the first ones) and WikiHow."""
    golden = GOLDEN["tasks"]["hellaswag"]
    whole = read_task(shared_data / "eval" / "hellaswag_val.jsonl.xz", max(golden["lines"]))
    items = tuple(whole.items[line - 1] for line in golden["lines"])
    score = evaluate_task(opened.model, opened.tokenizer, Task(whole.path, whole.format, items))
    for item, expected in zip(score.items, golden["log_likelihoods"], strict=True):
        assert item.log_likelihoods == pytest.approx(expected, rel=1e-5)

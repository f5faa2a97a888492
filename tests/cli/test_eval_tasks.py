"""`bitquest eval --task`: the table, the JSON object, and what one gets wrong."""

import json

import pytest

from bitquest.evaluation import likelihood
from bitquest.models import Llama, LlamaConfig, save_hf


@pytest.fixture
def questions(tmp_path):
    records = [{"context": "one and", "choices": ["two", "three", "six."], "answer": n % 3} for n in range(6)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path / "sums.jsonl"


def test_figures(bitquest, run_dir, questions, tmp_path):
    bitquest("export", run_dir, "--out", tmp_path / "packed")
    result, said = bitquest("eval", tmp_path / "packed", "--task", questions, "--json")
    assert (result["bitquest"], result["command"], result["kind"]) == (1, "eval", "packed")
    [score] = result["tasks"]
    assert (score["format"], score["items"], score["choices"]) == ("generic", 6, 18)
    assert score["acc"] == score["acc_norm"] or score["acc"] == pytest.approx(1 / 3)
    assert score["chance"] == pytest.approx(1 / 3)
    assert "acc_norm" in said
    assert "sums" in said
    of_run, _ = bitquest("eval", run_dir, "--task", questions, "--task", questions, "--limit", 3, "--json")
    assert [task["items"] for task in of_run["tasks"]] == [3, 3]
    assert of_run["tasks"][0]["bits_per_byte"] == of_run["tasks"][1]["bits_per_byte"]
    alone, _ = bitquest("eval", tmp_path / "packed", "--task", questions, "--batch", 1, "--json")
    assert alone["tasks"][0]["bits_per_byte"] == pytest.approx(score["bits_per_byte"], rel=1e-6)


def test_mistakes_give_one_message(bitquest, run_dir, questions, tmp_path):
    text = run_dir.parent / "text.txt"
    (tmp_path / "bad.jsonl").write_text(questions.read_text() + '{"context": "a", "choices": ["b", "c"]}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"context": "a", "choices": ["b", "c" * 40], "answer": 0}) + "\n")
    save_hf(Llama(LlamaConfig(257, 16, 32, 1, 2, 2, 16)).init_weights(0), tmp_path / "mute")
    for words, part in [
        ((run_dir,), "either --data, a text, or --task"),
        ((run_dir, "--data", text, "--task", questions), "either --data"),
        ((run_dir, "--task", questions, "--tokens", 5), "--tokens is for --data"),
        ((run_dir, "--data", text, "--limit", 5), "--limit is for --task"),
        ((run_dir, "--task", questions, "--limit", 0), "0 items are none"),
        ((run_dir, "--task", questions, "--batch", 0), "a batch of 0"),
        ((run_dir, "--data", text, "--batch", 0), "a batch of 0"),
        ((run_dir, "--task", questions, "--context", 999), "a context of 999 tokens"),
        ((run_dir, "--task", tmp_path / "nowhere.jsonl"), "nowhere.jsonl: no such file"),
        ((run_dir, "--task", tmp_path / "bad.jsonl"), "bad.jsonl, line 7: there is no 'answer'"),
        ((run_dir, "--task", tmp_path / "long.jsonl"), "long.jsonl, line 1, choice 1: 41 tokens"),
        ((tmp_path / "mute", "--task", questions), "no tokenizer at"),
    ]:
        result, said = bitquest("eval", *words, code=1)
        assert result is None
        assert part in said, words
        assert said.strip().startswith("error: ")


def test_an_interrupted_evaluation_prints_no_scores(bitquest, run_dir, questions, monkeypatch):
    real, calls = likelihood._scored, iter(range(9))

    def interrupted(*arguments):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(likelihood, "_scored", interrupted)
    lines = questions.read_text().splitlines()
    questions.write_text("".join(line.replace("one and", f"{n} and") + "\n" for n, line in enumerate(lines)))
    result, said = bitquest("eval", run_dir, "--task", questions, "--batch", 1, "--json", code=130)
    assert result is None
    assert said.strip() == "interrupted"


def test_a_text_of_any_name(bitquest, run_dir, tmp_path):
    (tmp_path / "notes.md").write_text("# one\n\nand two")
    result, said = bitquest("eval", run_dir, "--data", tmp_path / "notes.md", "--json")
    assert result["utf8_bytes"] == 14
    assert "perplexity" in said
    assert "bits per byte" in said

"""`bitquest generate` as a user meets it."""

import io
import os
import sys

import pytest

from bitquest.inference import TextEngine
from bitquest.training.checkpoint import list_steps


@pytest.fixture(scope="module")
def packed(run_dir, tmp_path_factory):
    from bitquest.export import save
    from bitquest.training import load_run

    run = load_run(run_dir)
    return save(run.model, tmp_path_factory.mktemp("packed") / "my model", run.tokenizer)


def test_json_and_stream_tell_the_same_text(bitquest, packed, capsys, monkeypatch):
    words = ("generate", packed, "--prompt", "one ", "--max-tokens", 12, "--seed", 3)
    result, said = bitquest(*words, "--json")
    assert said == ""
    assert (result["command"], result["prompt"], result["prompt_tokens"]) == ("generate", "one ", 5)
    assert result["tokens"] == 12
    assert result["stopped"] == "the number of tokens asked for"
    assert result["tokens_per_second"] > 0
    import bitquest.cli.app as app

    monkeypatch.setattr(sys, "argv", ["bitquest", *map(str, words)])
    with pytest.raises(SystemExit):
        app.main()
    streamed = capsys.readouterr()
    assert streamed.out == f"one {result['text']}\n"
    assert "tokens/s" in streamed.err


def test_the_seed_decides(bitquest, packed):
    texts = [
        bitquest("generate", packed, "--max-tokens", 20, "--seed", seed, "--json")[0]["text"] for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_temperature_zero_needs_no_seed(bitquest, packed):
    greedy = [
        bitquest("generate", packed, "--temperature", 0, "--max-tokens", 9, "--seed", seed, "--json")[0]["text"]
        for seed in (0, 1)
    ]
    assert greedy[0] == greedy[1]
    narrow = bitquest("generate", packed, "--top-k", 1, "--max-tokens", 9, "--json")[0]["text"]
    assert narrow == greedy[0]


def test_the_context_ends_a_text(bitquest, packed):
    result, _ = bitquest("generate", packed, "--max-tokens", 10**6, "--json")
    assert result["tokens"] == 32
    assert result["stopped"] == "the context of 32 tokens"


def test_a_prompt_from_standard_input(bitquest, packed, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two and"))
    result, _ = bitquest("generate", packed, "--prompt", "-", "--max-tokens", 2, "--json")
    assert result["prompt"] == "two and"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"two \xff"), encoding="utf-8"))
    _, said = bitquest("generate", packed, "--prompt", "-", code=1)
    assert said == "error: standard input: not UTF-8 at byte 4; convert the text to UTF-8 first\n"
    monkeypatch.setattr(sys, "stdin", None)
    _, said = bitquest("generate", packed, "--prompt", "-", code=1)
    assert "standard input, which is closed" in said


def test_a_prompt_that_is_refused_is_not_echoed(bitquest, packed):
    result, said = bitquest("generate", packed, "--prompt", "one " * 10, code=1)
    assert result is None
    assert said == "error: the prompt has 41 tokens, the model 32 positions; shorten the prompt\n"
    result, said = bitquest("generate", packed, "--prompt", os.fsdecode(b"a \xff"), code=1)
    assert result is None
    assert "not Unicode at character 2" in said


def test_a_text_that_ends_at_once_still_shows_its_prompt(bitquest, packed, monkeypatch, capsys):
    import bitquest.cli.app as app

    monkeypatch.setattr(TextEngine, "write", lambda *_: iter(()))
    monkeypatch.setattr(sys, "argv", ["bitquest", "generate", str(packed), "--prompt", "one"])
    with pytest.raises(SystemExit):
        app.main()
    assert capsys.readouterr().out == "one\n"


def test_a_terminal_that_lacks_the_characters(packed, monkeypatch):
    import bitquest.cli.app as app

    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["bitquest", "generate", str(packed), "--prompt", "Übung", "--max-tokens", "1"])
    with pytest.raises(SystemExit) as caught:
        app.main()
    assert caught.value.code == 0
    assert raw.getvalue().startswith(b"?bung")


@pytest.mark.parametrize(
    ("option", "value", "part"),
    [
        ("--temperature", -1, "temperature"),
        ("--temperature", "nan", "temperature"),
        ("--top-k", -1, "top-k"),
        ("--top-p", 0, "top-p"),
        ("--top-p", 1.5, "top-p"),
        ("--seed", -1, "the seed must be"),
        ("--seed", 10**30, "the seed must be"),
        ("--backend", "gpu", "unknown backend 'gpu'"),
    ],
)
def test_options_out_of_range(bitquest, packed, option, value, part):
    _, said = bitquest("generate", packed, option, value, code=1)
    assert part in said
    assert said.count("\n") == 1


def test_models_that_are_none(bitquest, run_dir, packed, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    last = list_steps(run_dir)[-1]
    for folder, part in [
        (run_dir, f"pack it first: bitquest export {run_dir}"),
        (run_dir / "checkpoints" / f"step-{last}", "bitquest export RUN --step N"),
        (tmp_path / "nowhere", "is not a folder"),
        (tmp_path / "file", "is not a folder"),
        (tmp_path / "empty", "neither a packed model nor a Hugging Face Llama"),
    ]:
        _, said = bitquest("generate", folder, "--prompt", "one", code=1)
        assert part in said, folder
        assert str(folder) in said
        assert said.startswith("error: ")
        assert said.count("\n") == 1
    _, said = bitquest("generate", packed, "--max-tokens", 0, code=2)
    assert "--max-tokens" in said


def test_a_hugging_face_folder_writes_too(bitquest, shared_data):
    words = ("--prompt", "Once upon a", "--temperature", 0, "--max-tokens", 3, "--json")
    result, _ = bitquest("generate", shared_data / "checkpoints/stories15M", *words)
    assert result["text"].startswith(" time")

"""The example as a reader runs it, on a Llama that trains in milliseconds, and every mistake that it names."""

import importlib.util
import json
import math
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import bitquest as bq
from bitquest.models import Llama, LlamaConfig, Tokenizer, save_hf
from bitquest.training import load_run, open_tokens

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_stories15m.py"
WORDS = ["the", "of", "and", "to", "a", "in", "that", "is", "for", "it", "as", "was", "with", "be", "by", "on", "not"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, a Llama of width 32 for bytes, and `text.txt`."""
    folder = tmp_path_factory.mktemp("inputs")
    shape = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    save_hf(Llama(shape).init_weights(0), folder / "model", Tokenizer.byte_level())
    rng = random.Random(0)
    (folder / "text.txt").write_text("".join(" ".join(rng.choices(WORDS, k=9)) + ".\n" for _ in range(600)))
    return folder


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("finetune_stories15m", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def command(inputs: Path, out: Path, *more: str) -> list[str]:
    """A short run; options in `more` replace those before them."""
    paths = ["--model", str(inputs / "model"), "--data", str(inputs / "text.txt"), "--out", str(out)]
    return [*paths, "--steps", "20", "--lr", "1e-2", "--held-out", "300", "--prompt", "the", *more]


def as_a_reader(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE), *words], capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    done = as_a_reader(*command(inputs, out, "--schemes", "none, w4a4,w1a1,w1a1"))
    assert done.returncode == 0, done.stderr
    return out, done


def test_the_table_has_every_scheme_once_with_losses_that_fell(finished):
    out, done = finished
    result = json.loads((out / "results.json").read_text())
    assert [row["scheme"] for row in result["rows"]] == ["none", "w4a4", "w1a1"]
    for row in result["rows"]:
        assert row["loss_after"] < row["loss_before"] - 0.5
        assert f"{row['loss_before']:.3f}" in done.stdout
        assert f"{row['loss_after']:.3f}" in done.stdout
        assert row["sample"].startswith("the")
        assert row["sample"] in done.stdout
    sizes = [row["blocks_bytes"] for row in result["rows"]]
    assert sizes == sorted(sizes, reverse=True)
    assert result["held_out_tokens"] == 300
    assert result["command"].startswith("python ")
    assert result["hardware"]["torch"]


def test_losses_after_are_those_of_the_trained_models(finished):
    """Computed here from the run; the table's are of the packed model."""
    out, _ = finished
    tokens = open_tokens(out / "data", "val")
    stream = torch.cat([torch.tensor([tokens.eos_id]), tokens.read(0, 300)])
    for row in json.loads((out / "results.json").read_text())["rows"]:
        model, nats = load_run(out / "runs" / row["scheme"]).model, 0.0
        for start in range(0, 300, 32):
            window = stream[start : start + 33]
            with torch.no_grad():
                nats += float(cross_entropy(model(window[None, :-1])[0], window[1:], reduction="sum"))
        assert row["loss_after"] == pytest.approx(nats / 300, rel=1e-3)
        # a byte is a token here, and an end of document among the 300 has no bytes
        assert row["bits_per_byte"] == pytest.approx(nats / 300 / math.log(2), rel=1e-2)


def test_what_is_left_are_ordinary_runs_and_packed_models(finished):
    out, _ = finished
    assert sorted(entry.name for entry in out.iterdir()) == ["data", "packed", "results.json", "runs", "sources.json"]
    run = load_run(out / "runs" / "w1a1", require_finished=True)
    assert (run.step, run.config.scheme, run.config.optimizer.weight_decay) == (20, "w1a1", 0.0)
    assert isinstance(bq.load(out / "packed" / "w1a1"), Llama)


def test_a_finished_table_is_made_again_without_training(finished, example, inputs, capsys):
    out, _ = finished
    before = json.loads((out / "results.json").read_text())["rows"]
    assert example.main(command(inputs, out)) == 0
    assert "step 1/20" not in capsys.readouterr().err
    assert json.loads((out / "results.json").read_text())["rows"] == before


def test_stopped_in_between_the_same_command_goes_on_to_the_same_weights(finished, inputs, tmp_path):
    words = command(inputs, tmp_path / "out", "--schemes", "w4a4")
    process = subprocess.Popen([sys.executable, str(EXAMPLE), *words], stderr=subprocess.PIPE, text=True)
    said = []
    for line in process.stderr:
        said.append(line)
        if "step 1/20" in line:
            process.send_signal(signal.SIGINT)
    code = process.wait(timeout=240)
    process.stderr.close()
    if code == 0:
        pytest.skip("the run ended before the signal came")
    assert code == 130
    assert "the same command goes on" in said[-1]
    assert not (tmp_path / "out" / "results.json").exists()
    done = as_a_reader(*words)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stderr
    name = "packed/w4a4/model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (finished[0] / name).read_bytes()


def without(inputs: Path, folder: Path, name: str) -> str:
    shutil.copytree(inputs / "model", folder / "model")
    (folder / "model" / name).unlink()
    return str(folder / "model")


MISTAKES = {
    "unknown scheme": (["--schemes", "w4a4,w9a9"], "w9a9"),
    "no scheme": (["--schemes", " , "], "--schemes names no scheme"),
    "no model": (["--model", "/nowhere/model"], "/nowhere/model is not a folder"),
    "no data": (["--data", "/nowhere/text.txt"], "/nowhere/text.txt: no such file or folder"),
    "other kind of data": (["--data", "/etc/hostname"], "unknown kind of file; known are .txt, .jsonl"),
    "context too long": (["--context", "33"], "--context 33 is longer than the 32 positions"),
    "no context": (["--context", "0"], "data.context must be at least 1"),
    "prompt too long": (["--prompt", "x" * 32], "--prompt has 33 tokens and the model 32 positions"),
    "no steps": (["--steps", "0"], "train.steps must be at least 1"),
    "no sequences": (["--batch-size", "0"], "train.batch_size must be at least 1"),
    "no learning rate": (["--lr", "0"], "optimizer.lr must be above 0"),
    "other precision": (["--precision", "fp8"], "train.precision must be one of auto, float32, bf16"),
    "nothing to measure": (["--held-out", "0"], "0 tokens are none to evaluate"),
    "a group the width has not": (["--schemes", "none,w4a4-g128"], "width"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_before_any_training(mistake, example, inputs, tmp_path, capsys):
    words, message = MISTAKES[mistake]
    assert example.main(command(inputs, tmp_path / "out", *words)) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out" / "runs").exists()


def test_a_corrected_command_may_use_the_same_folder(example, inputs, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert example.main(command(inputs, tmp_path / "out", "--data", str(tmp_path / "empty.txt"))) == 1
    assert not (tmp_path / "out").exists()
    assert example.main(command(inputs, tmp_path / "out", "--schemes", "none", "--steps", "1")) == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [("tokenizer.json", "no tokenizer at"), ("config.json", "is missing"), ("model.safetensors", "has neither")],
)
def test_a_model_folder_that_lacks_something_is_named(name, message, example, inputs, tmp_path, capsys):
    words = command(inputs, tmp_path / "out", "--model", without(inputs, tmp_path, name))
    assert example.main(words) == 1
    assert message in capsys.readouterr().err


def test_another_text_or_other_settings_need_another_folder(finished, example, inputs, tmp_path, capsys):
    out, _ = finished
    (tmp_path / "other.txt").write_text("Something else.\n" * 200)
    assert example.main(command(inputs, out, "--data", str(tmp_path / "other.txt"))) == 1
    assert "was begun with the --model and --data in" in capsys.readouterr().err
    assert example.main(command(inputs, out, "--steps", "21")) == 1
    assert "train.steps: 20, 21" in capsys.readouterr().err


@pytest.mark.parametrize("is_file", [True, False])
def test_a_place_that_is_taken_is_left_alone(is_file, example, inputs, tmp_path, capsys):
    taken = tmp_path / "out"
    note = taken if is_file else taken / "thesis.txt"
    note.parent.mkdir(exist_ok=True)
    note.write_text("mine")
    assert example.main(command(inputs, taken)) == 1
    assert "was not made by this program; choose another --out" in capsys.readouterr().err
    assert note.read_text() == "mine"


def test_a_training_that_diverges_says_what_to_lower(example, inputs, tmp_path, capsys):
    assert example.main(command(inputs, tmp_path / "out", "--schemes", "none", "--lr", "1e30")) == 1
    assert "training diverged" in capsys.readouterr().err


def test_missing_options_are_named(example, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        example.main(["--model", str(tmp_path)])
    assert "the following arguments are required: --data, --out" in capsys.readouterr().err


@pytest.mark.slow
def test_stories15m_takes_a_few_steps(shared_data, tmp_path):
    model, text = shared_data / "checkpoints" / "stories15M", shared_data / "text" / "enwiki2015_ci_10MB.jsonl"
    if not model.is_dir() or not text.is_file():
        pytest.skip(f"{model} or {text} is not there")
    done = as_a_reader(
        *("--model", str(model), "--data", str(text), "--out", str(tmp_path / "out"), "--schemes", "none,w1a1"),
        *("--steps", "4", "--held-out", "2048"),
    )
    assert done.returncode == 0, done.stderr
    none, w1a1 = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert w1a1["loss_after"] < w1a1["loss_before"] - 1
    assert none["loss_after"] < 9  # a guess among 32,000 words costs 10.4
    assert w1a1["blocks_bytes"] < none["blocks_bytes"] / 25

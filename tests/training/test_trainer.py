"""A run from start to end: what it writes, what it measures, what it refuses."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

from bitquest.errors import CheckpointError, ConfigError, DataError
from bitquest.training import DivergenceError, load_config, load_run, open_tokens, train
from bitquest.training.checkpoint import list_steps, read_checkpoint
from bitquest.training.loggers import read_metrics
from bitquest.training.step import Stepper

TRAIN_KEYS = {
    *("kind", "step", "loss", "lr", "grad_norm", "tokens", "tokens_per_s", "masked_share", "memory_mb", "seconds"),
}


class Listener:
    def __init__(self):
        self.events = []

    def on_start(self, start):
        self.start = start
        self.events.append("start")

    def on_step(self, record):
        self.events.append(("step", record["step"]))

    def on_evaluate(self, record):
        self.events.append(("evaluate", record["step"]))

    def on_end(self, result):
        self.result = result
        self.events.append("end")


def test_what_a_run_leaves_behind(make_config, tmp_path):
    run = tmp_path / "runs" / "a"
    listener = Listener()
    config = make_config()
    result = train(config, run, display=listener)
    assert (result.step, result.finished, result.interrupted, result.resumed_from) == (12, True, False, None)
    assert {path.name for path in run.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.toml",
        "metrics.jsonl",
        "tokenizer.json",
    }
    assert load_config(run / "config.toml") == config
    assert list_steps(run) == [4, 8, 12]
    records = read_metrics(run / "metrics.jsonl")
    expected = [
        ("train", 1),
        ("train", 3),
        ("evaluate", 5),
        ("train", 6),
        ("train", 9),
        ("evaluate", 10),
        ("train", 12),
        ("evaluate", 12),
    ]
    assert [(r["kind"], r["step"]) for r in records] == expected
    assert all(set(r) == TRAIN_KEYS for r in records if r["kind"] == "train")
    assert all(set(r) == {"kind", "step", "loss", "bits_per_byte"} for r in records if r["kind"] == "evaluate")
    last = records[-2]
    assert last["tokens"] == 12 * 4 * 16
    assert last["lr"] == pytest.approx(1e-2 * 0.1)
    assert 0.2 < last["masked_share"] < 0.4
    assert last["memory_mb"] > 50
    assert (result.train_loss, result.val_loss) == (last["loss"], records[-1]["loss"])
    assert result.tokens_per_s == pytest.approx(12 * 4 * 16 / result.seconds)
    assert listener.events == ["start", *((kind.replace("train", "step"), step) for kind, step in expected), "end"]
    assert (listener.start.step, listener.start.precision, listener.result) == (0, "float32", result)


def test_it_learns(make_config, tmp_path):
    result = train(make_config(train={"steps": 80}, evaluate={"every": 0}), tmp_path / "run")
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert records[0]["loss"] == pytest.approx(math.log(257), abs=0.3)
    assert result.val_loss < 3.2
    assert [r["step"] for r in records if r["kind"] == "evaluate"] == [80]


@pytest.mark.parametrize("batches", [2, 0])
def test_the_validation_loss_is_the_models_loss_on_held_out_text(make_config, tmp_path, batches):
    config = make_config(evaluate={"batches": batches}, train={"accumulation": 2})
    result = train(config, tmp_path / "run")
    run = load_run(tmp_path / "run")
    held_out = open_tokens(config.data.path, "val")
    nats, count = 0.0, 0
    with torch.no_grad():
        for number, window in enumerate(held_out.windows(16, 2)):
            if batches and number >= batches:
                break
            logits = run.model(window[:, :-1]).double()
            nats += F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum").item()
            count += window[:, 1:].numel()
    assert result.val_loss == pytest.approx(nats / count, rel=1e-6)
    expected = nats / count * held_out.count / math.log(2) / held_out.utf8_bytes
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-6)
    assert not run.model.training


def test_the_same_seed_gives_the_same_run_and_another_does_not(make_config, tmp_path):
    def outcome(name, **changes):
        torch.manual_seed(len(name))  # whatever the caller's generator was
        train(make_config(**changes), tmp_path / name)
        return read_checkpoint(tmp_path / name)

    one, two, other = outcome("one"), outcome("other two"), outcome("three", seed=4)
    assert all(torch.equal(tensor, two.model[name]) for name, tensor in one.model.items())
    assert any(not torch.equal(tensor, other.model[name]) for name, tensor in one.model.items())


def test_the_callers_generator_and_threads_are_left_alone(make_config, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    train(make_config(train={"threads": threads + 1, "steps": 2}), tmp_path / "run")
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    assert read_checkpoint(tmp_path / "run").state["environment"]["threads"] == threads + 1


def test_a_finished_run_is_left_as_it_is(make_config, tmp_path):
    first = train(make_config(), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}
    again = train(make_config(), tmp_path / "run", display=Listener())
    assert again == dataclasses.replace(first, resumed_from=12)
    assert again.seconds > 0
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_another_configuration_in_the_same_directory_is_refused(make_config, tmp_path):
    train(make_config(), tmp_path / "run")
    with pytest.raises(ConfigError) as caught:
        train(make_config(scheme="w4a4", optimizer={"lr": 1e-3}), tmp_path / "run")
    for part in ("scheme: 'w1a1', 'w4a4'", "optimizer.lr: 0.01, 0.001", "--out", str(tmp_path / "run")):
        assert part in str(caught.value)
    assert "train.steps" not in str(caught.value)


def test_what_is_written_down_may_change_when_a_run_goes_on(make_config, tmp_path):
    stop_at_4(make_config(), tmp_path / "run")
    result = train(make_config(log={"every": 1}, checkpoint={"keep": 1}), tmp_path / "run")
    assert (result.finished, result.resumed_from) == (True, 4)
    assert list_steps(tmp_path / "run") == [12]


def stop_at_4(config, run):
    calls = []
    result = train(config, run, should_stop=lambda: calls.append(0) or len(calls) >= 4)
    assert (result.step, result.interrupted, result.finished) == (4, True, False)


def test_no_resume(make_config, tmp_path):
    stop_at_4(make_config(), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"already holds a run.*--out"):
        train(make_config(), tmp_path / "run", resume=False)
    assert train(make_config(), tmp_path / "new", resume=False).finished


def test_directories_that_are_no_runs(make_config, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes\.txt and no config\.toml"):
        train(make_config(), tmp_path)
    with pytest.raises(ConfigError, match="there is a file of this name"):
        train(make_config(), tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match="no checkpoint of step 4: there is no run yet"):
        train(make_config(), tmp_path / "new", from_step=4)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt"}


def test_one_process_at_a_time(make_config, tmp_path):
    class Second(Listener):
        def on_step(self, record):
            if record["step"] == 3:
                with pytest.raises(ConfigError, match="another process is training in this directory"):
                    train(make_config(), tmp_path / "run")
                self.events.append("refused")

    listener = Second()
    train(make_config(), tmp_path / "run", display=listener)
    assert "refused" in listener.events


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("where", ["loss", "grad_norm"])
def test_divergence_stops_the_run_and_saves_nothing(make_config, tmp_path, monkeypatch, value, where):
    real, calls = Stepper.step, []

    def diverging(self, *arguments, **options):
        result = real(self, *arguments, **options)
        calls.append(0)
        return dataclasses.replace(result, **{where: torch.tensor(float(value))}) if len(calls) == 8 else result

    monkeypatch.setattr(Stepper, "step", diverging)
    listener = Listener()
    with pytest.raises(DivergenceError) as caught:
        train(make_config(), tmp_path / "run", display=listener)
    for part in ("training diverged: at step 8", value, "last good checkpoint is of step 4", "optimizer.lr (now 0.01)"):
        assert part in str(caught.value)
    assert list_steps(tmp_path / "run") == [4]
    assert listener.result is None
    assert all(math.isfinite(r["loss"]) for r in read_metrics(tmp_path / "run" / "metrics.jsonl"))


def test_a_run_that_really_diverges(make_config, tmp_path):
    config = make_config(scheme="none", optimizer={"lr": 1e30, "clip": 0}, schedule={"warmup": 0}, train={"steps": 50})
    with pytest.raises(DivergenceError, match="there is no earlier checkpoint"):
        train(config, tmp_path / "run")
    assert list_steps(tmp_path / "run") == []


def test_a_full_disk_leaves_the_earlier_checkpoint(make_config, tmp_path, monkeypatch):
    import bitquest.training.checkpoint as module

    real = module.save_file

    def full(tensors, path):
        if "step-8" in str(path):
            raise OSError(28, "No space left on device")
        real(tensors, path)

    with monkeypatch.context() as patched:
        patched.setattr(module, "save_file", full)
        with pytest.raises(CheckpointError, match=r"No space left on device.*step 4 is untouched"):
            train(make_config(), tmp_path / "run")
    assert list_steps(tmp_path / "run") == [4]
    assert train(make_config(), tmp_path / "run").resumed_from == 4


@pytest.mark.parametrize(
    ("changes", "error", "parts"),
    [
        ({"data": {"path": "/nowhere/data"}}, DataError, ["/nowhere/data", "bitquest data prepare"]),
        ({"model": {"num_attention_heads": 3}}, ConfigError, ["num_attention_heads"]),
        ({"model": {"hidden_size": 36}, "scheme": "w4a4-g32"}, ConfigError, ["w4a4-g32", "model.hidden_size"]),
        ({"model": {"max_position_embeddings": 8}}, ConfigError, ["model.max_position_embeddings is 8"]),
        ({"data": {"context": 100000}}, DataError, ["100000"]),
    ],
    ids=["no data", "heads", "width", "positions", "context"],
)
def test_a_run_that_cannot_start_says_why_and_leaves_nothing(make_config, tmp_path, changes, error, parts):
    with pytest.raises(error) as caught:
        train(make_config(**changes), tmp_path / "run")
    for part in parts:
        assert part in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_relative_paths_are_recorded_absolute(make_config, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(data_dir.parent)
    train(make_config(data={"path": "data"}), tmp_path / "run")
    assert load_config(tmp_path / "run" / "config.toml").data.path == str(data_dir)
    monkeypatch.chdir(tmp_path)
    assert train(make_config(), tmp_path / "run").finished


def test_each_step_takes_its_own_batch_of_the_data(make_config, tmp_path, monkeypatch):
    real, seen = Stepper.step, []

    def watched(self, windows, lr, *, record):
        seen.append(windows)
        return real(self, windows, lr, record=record)

    monkeypatch.setattr(Stepper, "step", watched)
    config = make_config()
    stop_at_4(config, tmp_path / "run")
    train(config, tmp_path / "run")
    tokens = open_tokens(config.data.path, "train")
    assert len(seen) == 12
    for step, windows in enumerate(seen):
        assert torch.equal(windows, tokens.batch(3, step, 4, 16))


def test_metrics_are_plain_json(make_config, tmp_path):
    train(make_config(scheme="none"), tmp_path / "run")
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert isinstance(json.loads(line, parse_constant=lambda name: pytest.fail(name)), dict)

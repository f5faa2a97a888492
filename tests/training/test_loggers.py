"""Where metrics go: the file always, TensorBoard and W&B on request, a clear word when they are not installed."""

import sys
import types
from pathlib import Path

import pytest

from bitquest.errors import CheckpointError, MissingExtraError
from bitquest.training import train
from bitquest.training.loggers import MetricsFile, read_metrics


def record(step, kind="train"):
    return {"kind": kind, "step": step, "loss": step / 3}


def test_lines_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, 0)
    for step in range(1, 6):
        metrics.write(record(step))
        assert read_metrics(path)[-1] == record(step)  # at once, not when the file is closed
    metrics.close()
    again = MetricsFile(path, 3)
    again.write(record(4, "evaluate"))
    again.sync()
    again.close()
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.close()
    monkeypatch.setattr(metrics, "_file", full.open("w"))
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: .*No space left on device.*Make room"):
        metrics.write(record(1))
    metrics.close()


def test_a_line_cut_off_is_dropped_and_a_bad_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n{"kind": "tr')
    assert [r["step"] for r in read_metrics(path)] == [1]
    path.write_text('{"kind": "train", "step": 1}\noops\n{"kind": "train", "step": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 2: not a metrics record"):
        read_metrics(path)


def test_tensorboard_gets_the_scalars(make_config, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = make_config(log={"tensorboard": True})
    calls = []
    train(config, tmp_path / "run", should_stop=lambda: calls.append(0) or len(calls) >= 7)
    train(config, tmp_path / "run")
    events = event_accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"train/loss", "train/lr", "train/masked_share", "evaluate/bits_per_byte"} <= set(events.Tags()["scalars"])
    written = {r["step"]: r["loss"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"}
    shown = {event.step: event.value for event in events.Scalars("train/loss")}
    assert shown == pytest.approx(written)


class FakeWandb(types.ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.inits.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_wandb_goes_on_under_the_same_identifier(make_config, tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = make_config(log={"wandb": True, "wandb_project": "mine"})
    calls = []
    train(config, tmp_path / "run", should_stop=lambda: calls.append(0) or len(calls) >= 7)
    train(config, tmp_path / "run")
    first, second = fake.inits
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("mine", "run", "allow")
    assert first["config"]["scheme"] == "w1a1"
    assert fake.finished == 2
    steps = [step for step, values in fake.logged if "train/loss" in values]
    assert steps == [1, 3, 6, 9, 12]
    assert "evaluate/bits_per_byte" in fake.logged[-1][1]


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_extra_is_named_before_anything_is_written(make_config, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"log\.{package} = true needs .*bitquest\[{package}\]"):
        train(make_config(log={package: True}), tmp_path / "run")
    assert not (tmp_path / "run").exists()

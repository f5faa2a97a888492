"""`bitquest train` as a user meets it: progress, results, mistakes, and being stopped in the middle."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bitquest.training import load_config, prepare, train
from bitquest.training.checkpoint import list_steps, read_checkpoint
from bitquest.training.loggers import read_metrics

CONFIG = """
scheme = "w1a1"
seed = 1

[model]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2

[data]
path = "data"
context = 16

[train]
steps = {steps}
batch_size = 2
threads = 1

[evaluate]
every = 0
batches = 2

[checkpoint]
every = 20

[log]
every = 1
"""


def fill(folder):
    (folder / "text.txt").write_text("one and two and three are six.\n" * 300)
    prepare([folder / "text.txt"], "byte", folder / "data", val_fraction=0.2)
    (folder / "small.toml").write_text(CONFIG.format(steps=30))
    (folder / "long.toml").write_text(CONFIG.format(steps=200))


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run of long.toml that nobody interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    fill(folder)
    train(load_config(folder / "long.toml", [f"data.path={folder / 'data'}"]), folder / "run")
    return folder / "run"


def start(folder, *words):
    environment = {**os.environ, "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bitquest.cli.app", "train", *words]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def run(folder, *words):
    return finish(start(folder, *words))


def wait_for_steps(run_dir, steps, process):
    deadline = time.monotonic() + 100
    path = run_dir / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_bit_identical(one, two):
    a, b = read_checkpoint(one), read_checkpoint(two)
    for kind in ("model", "optimizer"):
        for name, tensor in getattr(a, kind).items():
            assert torch.equal(tensor, getattr(b, kind)[name]), name
    losses = [[(r["kind"], r["step"], r["loss"]) for r in read_metrics(d / "metrics.jsonl")] for d in (one, two)]
    assert losses[0] == losses[1]


def test_a_run_its_json_and_running_it_again(folder):
    code, out, err = run(folder, "small.toml", "--json", "--set", "train.steps=12", "--set", "optimizer.lr=0.01")
    assert code == 0, err
    result = json.loads(out)
    assert (result["bitquest"], result["command"], result["run"]) == (1, "train", "runs/small")
    assert (result["step"], result["steps"], result["finished"], result["interrupted"]) == (12, 12, True, False)
    assert result["val_loss"] > 0
    assert "step 12/12: loss" in err
    assert "Done: 12 steps" in err
    assert "bitquest export runs/small" in err
    assert list_steps(folder / "runs" / "small") == [12]
    # again, from the configuration that the run recorded
    code, out, err = run(folder, "runs/small/config.toml")
    assert (code, out) == (0, "")
    assert "finished already: step 12 of 12" in err


def test_stopped_three_ways_a_run_is_bit_identical_to_the_uninterrupted_one(folder, straight):
    """Ctrl-C and SIGTERM finish the step, save and say how to go on; SIGKILL loses what is after a checkpoint."""
    command = ["long.toml", "--out", "my run", "--set", "log.every=1"]
    for number, code, at in ((signal.SIGINT, 130, 30), (signal.SIGTERM, 143, 70)):
        process = start(folder, *command)
        wait_for_steps(folder / "my run", at, process)
        process.send_signal(number)
        returned, _, err = finish(process)
        assert returned == code
        step = list_steps(folder / "my run")[-1]
        assert at <= step < 200
        assert f"step {step} of 200 is saved" in err
        said = shlex.split(err[err.index("Go on with:") :].splitlines()[1])
        assert said == ["bitquest", "train", *command]
    process = start(folder, *command)
    wait_for_steps(folder / "my run", 110, process)
    process.kill()
    process.communicate()
    step = list_steps(folder / "my run")[-1]
    assert 100 <= step < 200
    assert step % 20 == 0
    returned, _, err = run(folder, *command)
    assert returned == 0, err
    assert f"going on from step {step}" in err
    assert_bit_identical(straight, folder / "my run")


def test_mistakes_give_one_message_and_leave_nothing(folder, invoke):
    (folder / "broken.toml").write_text("[train]\nsteps = = 5\n")
    (folder / "model").mkdir()
    for words, parts in [
        (["nothing.toml"], ["nothing.toml: no such configuration file"]),
        (["broken.toml"], ["broken.toml: not valid TOML", "line 2"]),
        (["small.toml", "--set", "train.stepz=5"], ["train.stepz", "did you mean 'train.steps'?"]),
        (["small.toml", "--set", "scheme=w1a99"], ["w1a99"]),
        (["small.toml", "--set", "data.path=elsewhere"], ["elsewhere", "bitquest data prepare"]),
        (["small.toml", "--set", "model.hidden_size=30", "--set", "model.num_attention_heads=4"], ["hidden_size 30"]),
        (["small.toml", "--from-step", "5"], ["no checkpoint of step 5"]),
        (["small.toml", "--out", "text.txt"], ["there is a file of this name"]),
    ]:
        message = invoke(*words)
        for part in parts:
            assert part in message, words
        assert len(message) < 700
    assert not (folder / "runs").exists()


@pytest.fixture
def invoke(folder, monkeypatch, capsys):
    """Run a command that must fail with exit code 1, in this process; gives what it wrote to stderr on one line."""
    import bitquest.cli.app as app

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["bitquest", "train", *words])
        with pytest.raises(SystemExit) as caught:
            app.main()
        assert caught.value.code == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        return captured.err

    monkeypatch.chdir(folder)
    return call


def test_refusals_of_an_existing_run(folder, invoke):
    train(load_config("small.toml", ["train.steps=5"]), "runs/small")
    assert "scheme: 'w1a1', 'w4a4'" in invoke("small.toml", "--set", "train.steps=5", "--set", "scheme=w4a4")
    assert "already holds a run" in invoke("small.toml", "--set", "train.steps=5", "--no-resume")
    assert "holds data and no config.toml" in invoke("small.toml", "--out", str(Path.cwd()))

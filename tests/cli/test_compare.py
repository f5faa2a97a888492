"""`bitquest compare` as a user meets it: tables, exit codes, mistakes, and being stopped in the middle."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from compare_cases import MODEL_AND_DATA

import bitquest.cli.app as app
from bitquest.evaluation import compare_workers
from bitquest.evaluation.compare_runs import is_held, latest_step
from bitquest.training import prepare

CONFIG = (
    MODEL_AND_DATA.format(data="data")
    + """
[train]
steps = 3
batch_size = 2
threads = 1

[evaluate]
every = 0
batches = 1

[log]
every = 1

[compare]
schemes = ["none", "w1a1"]
seeds = [0, 1]
"""
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("one and two and three are six.\n" * 300)
    prepare([tmp_path / "text.txt"], "byte", tmp_path / "data", val_fraction=0.2)
    (tmp_path / "small.toml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def invoke(folder, monkeypatch, capsys):
    """Run the command in this process: exit code, stdout, stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["bitquest", "compare", *words])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as caught:
            app.main()
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return call


def test_tables_json_and_exit_codes(folder, invoke):
    code, out, err = invoke("small.toml", "--json", "--expect", "w1a1", "--seeds", "0")
    assert code == 0, err
    result = json.loads(out)
    assert (result["bitquest"], result["command"], result["out"]) == (1, "compare", "runs/small")
    assert (result["finished"], result["passed"], len(result["runs"])) == (True, True, 2)
    for part in ("2 arms × 1 seed = 2 runs of 3 steps", "difference", "w1a1 converges", "report.html"):
        assert part in err
    # a loss is never below itself by a clear margin, whichever way round
    code, out, err = invoke("small.toml", "--expect", "none<w1a1", "--expect", "w1a1<none")
    assert (code, out) == (1, "")
    assert "Not as expected:" in err
    assert "failed" in err
    words = shlex.split((folder / "runs" / "small" / "report.html").read_text().split("<code>")[1].split("</code>")[0])
    assert words[:5] == ["bitquest", "compare", "small.toml", "--out", "runs/small"]
    code, _, err = invoke("small.toml", "--schemes", "w1a1", "--seeds", "0-2", "--out", "stability")
    assert code == 0
    assert "least" in err
    assert "greatest" in err


def test_mistakes_give_one_message_and_leave_nothing(folder, invoke):
    for words, part in [
        (["nothing.toml"], "nothing.toml: no such configuration file"),
        (["small.toml", "--schemes", "w1a1-norott"], "did you mean 'norot'?"),
        (["small.toml", "--schemes", "w1a1,w1a1"], "arm w1a1 is given twice"),
        (["small.toml", "--seeds", "x"], "'x' is no seed"),
        (["small.toml", "--expect", "none<=w4a4"], "w4a4 is not compared"),
        (["small.toml", "--set", "train.stepz=3"], "did you mean 'train.steps'?"),
        (["small.toml", "--set", "data.path=elsewhere"], "elsewhere"),
        (["small.toml", "--out", "text.txt"], "there is a file of this name"),
        (["small.toml", "--out", "."], "and no compare.toml"),
        (["small.toml", "--out", ".", "--dry-run"], "and no compare.toml"),
    ]:
        code, out, err = invoke(*words)
        assert (code, out) == (1, ""), words
        assert err.startswith("error: ")
        assert part in err, words
        assert len(err) < 700
    assert not (folder / "runs").exists()


def test_ctrl_c_saves_and_the_command_it_names_finishes(folder):
    environment = {**os.environ, "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "bitquest.cli.app"]
    words = ["compare", "small.toml", "--out", "my runs", "--expect", "w1a1", "--set", "train.steps=150"]
    process = subprocess.Popen(
        [*start, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = folder / "my runs" / "runs" / "w1a1-seed0" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 20:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "1 of 4 runs are finished" in err
    command = shlex.split(err[err.index("Go on with:") :].splitlines()[1])
    assert command == ["bitquest", *words]
    done = subprocess.run([*start, *command[1:]], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "w1a1 converges" in done.stderr
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"train"' in line]
    assert steps == list(range(1, 151))


def test_rates_and_a_dry_run(folder, invoke):
    words = ("small.toml", "--schemes", "w1a1", "--rates", "1e-2,1e-3", "--out", "swept")
    code, out, err = invoke(*words, "--dry-run", "--json")
    assert code == 0, err
    assert "3 runs in all; training time left: unknown before the first run is made." in err
    found = json.loads(out)
    assert (found["dry_run"], found["total_runs"], found["chosen_later"]) == (True, 3, 1)
    assert found["runs"][0]["status"] == "waiting"
    assert not (folder / "swept").exists()
    code, _, err = invoke(*words)
    assert code == 0, err
    assert "1 arm × 2 rates × 2 seeds = 3 runs of 3 steps" in err
    assert "w1a1, rate 0.01, seed 0: " in err
    assert "0.01*" in err
    assert "3 runs in all; training time left: 0 s." in invoke(*words, "--dry-run")[2]
    assert (folder / "swept" / "figures" / "rates.png").stat().st_size > 1000
    command = (folder / "swept" / "report.html").read_text().split("<code>")[1].split("</code>")[0]
    assert "--rates 1e-2,1e-3" in command
    code, _, err = invoke("small.toml", "--rates", "0", "--out", "x")
    assert (code, "'0' is no learning rate" in err) == (1, True)


def test_runs_that_fail_are_named_with_their_logs(folder, invoke, monkeypatch):
    fails = "import sys; sys.exit('error: out of room')"
    monkeypatch.setattr(compare_workers, "COMMAND", (sys.executable, "-c", fails))
    code, _, err = invoke("small.toml", "--seeds", "0", "--jobs", "2", "--out", "out")
    assert code == 1
    assert "Traceback" not in err
    assert "0 of 2 runs are finished; these failed:" in err
    line = next(line for line in err.splitlines() if line.startswith("  w1a1, seed 0: "))
    assert line.endswith("its process failed (exit code 1): out of room. All it said is in out/logs/w1a1-seed0.log")
    assert "The same command tries them again:\n  bitquest compare small.toml --out out --seeds 0 --jobs 2" in err


def wait_for(what, process=None):
    deadline = time.monotonic() + 200
    while not what():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_several_at_once_are_killed_and_stopped_without_losing_a_step(folder):
    environment = {**os.environ, "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1"}
    words = ["compare", "small.toml", "--out", "out", "--seeds", "0", "--jobs", "2", "--set", "train.steps=100000"]
    runs = [folder / "out" / "runs" / f"{scheme}-seed0" for scheme in ("none", "w1a1")]

    def start():
        command = [sys.executable, "-m", "bitquest.cli.app", *words]
        # a process group of its own, to which Ctrl-C is sent as a terminal does
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def steps():
        return [(latest_step(run) or {"step": 0})["step"] for run in runs]

    process = start()
    wait_for(lambda: min(steps()) > 5, process)
    process.kill()  # as kill -9 does: the runs' processes notice, save and end
    process.communicate()
    wait_for(lambda: not any(map(is_held, runs)))
    saved = steps()
    assert [os.listdir(run / "checkpoints") for run in runs] == [[f"step-{step}"] for step in saved]

    process = start()
    wait_for(lambda: all(now > before for now, before in zip(steps(), saved, strict=True)), process)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert all((folder / "out" / "logs" / f"{run.name}.log").read_text() == "" for run in runs)
    assert "0 of 2 runs are finished" in err
    assert shlex.split(err[err.index("Go on with:") :].splitlines()[1])[:5] == ["bitquest", *words[:4]]
    assert not any(map(is_held, runs))
    for run, last in zip(runs, steps(), strict=True):
        assert f"step-{last}" in os.listdir(run / "checkpoints")
        lines = (run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, last + 1))

"""What a comparison shows while it runs: time left from the schemes' own speeds, a bar or lines."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from bitquest.evaluation.compare_display import ConsoleDisplay
from bitquest.evaluation.compare_plan import Arm, Comparison, Run
from bitquest.evaluation.compare_runs import RunResult
from bitquest.training import TrainConfig

BASE = TrainConfig.from_dict({"train": {"steps": 100}})
ARMS = (Arm("none", "none", BASE), Arm("w1a1", "W1A1 [b]", BASE))
PLAN = Comparison(BASE, ARMS, (0, 1))


@pytest.fixture
def clock(monkeypatch):
    """Time that only moves when told."""
    now = [1000.0]
    monkeypatch.setattr("bitquest.evaluation.compare_display.time.monotonic", lambda: now[0])
    return now


def result(arm, loss, step, seconds, status="finished", message=None):
    run = f"runs/{arm}-seed0"
    return RunResult(arm, arm, 0, None, status, step, loss, loss and 3.2, seconds, run, message)


def show(clock, terminal):
    text = io.StringIO()
    display = ConsoleDisplay(Console(file=text, force_terminal=terminal, width=140), line_interval=10)
    display.on_start(PLAN, Path("out"), 1)
    display.on_step(Run("none", 0), 20, 2.75)
    clock[0] += 20  # 40 steps: half a second each
    display.on_step(Run("none", 0), 60, 2.5)
    display.on_result(result("none", 2.25, 100, 41.0))
    display.on_step(Run("w1a1", 0), 0, 3.0)
    clock[0] += 50  # one second each
    display.on_step(Run("w1a1", 0), 50, 2.75)
    if not terminal:  # where a run's bar goes with it
        display.on_result(result("w1a1", None, 50, 50.0, "diverged", "diverged"))
    display.on_end()
    return text.getvalue()


def test_lines_where_there_is_no_terminal(clock):
    lines = show(clock, terminal=False).splitlines()
    assert lines == [
        "out: 2 arms × 2 seeds = 4 runs of 100 steps; Ctrl-C stops, and the same command goes on",
        # 40 steps and 3 runs of 100 at half a second; then 50 and 100 at a second and 100 at a half
        "run 1 of 4: none, seed 0, loss 2.500, step 60 of 100, 2:50 left",
        "none, seed 0: 2.2500 nats per token in 41 s",
        "run 2 of 4: W1A1 [b], seed 0, loss 2.750, step 50 of 100, 3:20 left",
        "W1A1 [b], seed 0: diverged after step 50",
    ]


def test_a_bar_on_a_terminal(clock):
    text = show(clock, terminal=True)
    assert "W1A1 [b], seed 0, loss 2.750" in text
    assert "3:20 left" in text
    assert "1 of 4 runs over" in text
    assert " 50%" in text
    assert "none, seed 0: 2.2500 nats per token in 41 s" in text


def test_several_at_once_share_the_time_left(clock):
    text = io.StringIO()
    display = ConsoleDisplay(Console(file=text, force_terminal=False, width=140), line_interval=10)
    plan = Comparison(BASE, ARMS, (0, 1), rates=(1e-3, 2e-3), jobs=2)
    one, other = Run("none", 0, 1e-3), Run("w1a1", 0, 1e-3)
    display.on_start(plan, Path("out"), 2)
    for run in (one, other):
        display.on_step(run, 0, 3.0)
    clock[0] += 30
    display.on_step(one, 30, 2.5)
    display.on_step(other, 60, 2.25)  # too soon after the last line for another
    clock[0] += 10
    display.on_step(other, 80, 2.125)
    display.on_result(
        RunResult("w1a1", "w1a1", 0, 1e-3, "unstable", 100, 2.5, 3.5, 61.0, "runs/x", "it ended 0.40 nats above")
    )
    display.on_failure(one, "its process was killed by SIGKILL")
    display.on_end()
    assert text.getvalue().splitlines() == [
        "out: 2 arms × 2 rates × 2 seeds = 6 runs of 100 steps, 2 at once; Ctrl-C stops, and the same command goes on",
        # 3 · 100 - 30 and 3 · 100 steps at a second each, by two
        "0 of 6 runs over, 2 under way: none, rate 0.001, seed 0, loss 2.500, step 30 of 100, 4:45 left",
        # 270 at a second and 220 at half a second
        "0 of 6 runs over, 2 under way: W1A1 [b], rate 0.001, seed 0, loss 2.125, step 80 of 100, 3:10 left",
        "W1A1 [b], rate 0.001, seed 0: 2.5000 nats per token in 1:01, unstable: it ended 0.40 nats above",
        "none, rate 0.001, seed 0: its process was killed by SIGKILL",
    ]

"""What a comparison shows while it runs: time left from the schemes' own speeds, a bar or lines."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from bitquest.evaluation.compare_display import ConsoleDisplay
from bitquest.evaluation.compare_plan import Comparison
from bitquest.evaluation.compare_results import RunResult
from bitquest.training import TrainConfig
from bitquest.training.trainer import RunStart

PLAN = Comparison(TrainConfig.from_dict({"train": {"steps": 100}}), ("none", "w1a1"), (0, 1), {"w1a1": "W1A1 [b]"})


@pytest.fixture
def clock(monkeypatch):
    """Time that only moves when told."""
    now = [1000.0]
    monkeypatch.setattr("bitquest.evaluation.compare_display.time.monotonic", lambda: now[0])
    return now


def show(clock, terminal):
    text = io.StringIO()
    display = ConsoleDisplay(Console(file=text, force_terminal=terminal, width=140), line_interval=10)
    display.on_start(PLAN, Path("out"))
    run = display.run(0, "none", 0)
    run.on_start(RunStart(Path("out"), PLAN.base, 20, 1, "cpu", "float32"))
    clock[0] += 20  # 40 steps: half a second each
    run.on_step({"step": 60, "loss": 2.5})
    display.on_result(RunResult("none", 0, False, 100, 2.25, 3.2, 41.0, "runs/none-seed0"))
    run = display.run(1, "w1a1", 0)
    run.on_start(RunStart(Path("out"), PLAN.base, 0, 1, "cpu", "float32"))
    clock[0] += 50  # one second each
    run.on_step({"step": 50, "loss": 2.75})
    display.on_result(RunResult("w1a1", 0, True, 50, None, None, 50.0, "runs/w1a1-seed0", "diverged"))
    run.on_end(None)
    display.on_end()
    return text.getvalue()


def test_lines_where_there_is_no_terminal(clock):
    lines = show(clock, terminal=False).splitlines()
    assert lines == [
        "out: 2 schemes × 2 seeds = 4 runs of 100 steps; Ctrl-C stops, and the same command goes on",
        # 40 steps and 3 runs of 100 at half a second; then 50 and 100 at a second and 100 at a half
        "run 1 of 4: none, seed 0, loss 2.500, step 60 of 100, 2:50 left",
        "none, seed 0: 2.2500 nats per token in 41 s",
        "run 2 of 4: W1A1 [b], seed 0, loss 2.750, step 50 of 100, 3:20 left",
        "W1A1 [b], seed 0: diverged after step 50",
    ]


def test_a_bar_on_a_terminal(clock):
    text = show(clock, terminal=True)
    assert "run 2 of 4: W1A1 [b], seed 0, loss 2.750" in text
    assert "3:20 left" in text
    assert " 50%" in text
    assert "W1A1 [b], seed 0: diverged after step 50" in text

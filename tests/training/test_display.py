"""What a person sees: lines without a terminal, a panel on one."""

import io
import time

import pytest
from rich.console import Console

from bitquest.training import train
from bitquest.training.diagnostics import StepClock
from bitquest.training.display import LineDisplay, LiveDisplay, duration, make_display


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=200, color_system=None)


def test_lines_without_a_terminal(make_config, tmp_path):
    out = console(terminal=False)
    display = make_display(out)
    assert isinstance(display, LineDisplay)
    train(make_config(), tmp_path / "run", display=display)
    lines = out.file.getvalue().splitlines()
    assert "w1a1" in lines[0]
    assert "12 steps of 4 × 16 tokens, float32 on cpu" in lines[0]
    assert lines[1].startswith("step 1/12: loss ")
    for name in ("tokens/s ", "left ", "lr ", "masked ", "memory "):
        assert name in lines[1]
    assert any(line.startswith("step 5/12: validation ") and line.endswith("bits/byte") for line in lines)
    assert "\x1b" not in out.file.getvalue()
    # one line for the first step, one for the last, three evaluations: not one for every logged step
    assert len(lines) == 1 + 2 + 3


def test_a_panel_on_a_terminal(make_config, tmp_path):
    out = console(terminal=True)
    display = make_display(out)
    assert isinstance(display, LiveDisplay)
    train(make_config(), tmp_path / "run", display=display)
    text = out.file.getvalue()
    for part in ("12/12", "loss", "tokens/s", "left", "masked", "memory", "MiB", "validation "):
        assert part in text
    assert "\x1b[?25h" in text  # the cursor is shown again


def test_an_error_before_the_first_step_gives_the_terminal_back():
    LiveDisplay(console(terminal=True)).on_end(None)


def test_names_with_brackets_are_shown_as_they_are(make_config, tmp_path):
    out = console(terminal=True)
    train(make_config(), tmp_path / "[bold]run", display=make_display(out))
    assert "[bold]run" in out.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (185, "3:05"), (7385, "2:03:05"), (59.7, "1:00")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_the_clock_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = StepClock(10.0)
    now[0] += 2
    assert clock.lap() == 2
    now[0] += 1
    with clock.paused():
        now[0] += 50
        assert clock.seconds == 13
    now[0] += 4
    assert clock.lap() == 5
    assert clock.seconds == 17

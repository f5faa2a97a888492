"""Comparing speeds: turns, warm-up, ratios, and the refusal to time what computes something else."""

import json

import pytest
import torch

from bitquest.benchmarks.hardware import describe
from bitquest.benchmarks.results import check_place, write_result
from bitquest.benchmarks.timing import Ratio, Timing, alternate, ratios
from bitquest.benchmarks.train_step import StepShape, check_against_definition, compare_train_step
from bitquest.errors import ConfigError
from bitquest.models import Llama
from bitquest.nn import QuantizedLinear, Scheme, quantize_

SMALL = StepShape(width=64, layers=1, batch=1, context=8)


class Clock:
    """Time that passes only when somebody works."""

    def __init__(self):
        self.now, self.turns = 0.0, []

    def __call__(self):
        return self.now

    def work(self, name, seconds):
        def turn():
            self.turns.append(name)
            self.now += seconds[min(self.turns.count(name), len(seconds)) - 1]

        return turn


def test_turns_are_taken_and_warm_up_is_not_measured():
    clock, ticks = Clock(), []
    slow, fast = clock.work("slow", [9, 2, 4, 6]), clock.work("fast", [9, 1, 1, 3])
    timings = alternate({"slow": slow, "fast": fast}, 3, warmup=1, progress=lambda: ticks.append(1), clock=clock)
    assert timings == {"slow": Timing("slow", (2, 4, 6)), "fast": Timing("fast", (1, 1, 3))}
    assert clock.turns == ["slow", "fast", "fast", "slow"] * 2
    assert len(ticks) == 8
    assert (timings["slow"].median, timings["slow"].minimum) == (4, 2)
    assert ratios(timings, "fast") == {"slow": Ratio(4, 2), "fast": Ratio(1, 1)}


@pytest.mark.parametrize(("candidates", "repetitions"), [({}, 1), ({"a": lambda: None}, 0)])
def test_nothing_to_compare(candidates, repetitions):
    with pytest.raises(ValueError, match="at least one"):
        alternate(candidates, repetitions)


def test_a_training_step_of_each_scheme():
    found = compare_train_step(["none", "w4a4"], SMALL, repetitions=2)
    assert found.baseline == "none"
    assert all(len(timing.seconds) == 2 for timing in found.timings.values())
    assert found.to_json()["shape"] == {"width": 64, "layers": 1, "batch": 1, "context": 8}


def test_targets_are_for_the_size_they_were_set_at():
    timings = {name: Timing(name, (1.0,)) for name in ("none", "w4a4", "w1a1", "w2a2")}
    rows = type(compare_train_step(["none"], SMALL, 1))(StepShape(), timings).to_json()["schemes"]
    assert {name: row["target"] for name, row in rows.items()} == {
        "none": None,
        "w4a4": 1.35,
        "w1a1": 1.5,
        "w2a2": None,
    }


def test_a_layer_that_computes_something_else_is_not_timed(monkeypatch):
    model = quantize_(Llama(SMALL.model()).init_weights(0), Scheme.parse("w4a4"))
    check_against_definition(model)
    forward = QuantizedLinear.forward
    monkeypatch.setattr(QuantizedLinear, "forward", lambda self, x: forward(self, x) * 1.01)
    with pytest.raises(RuntimeError, match=r"q_proj disagrees with the definition"):
        compare_train_step(["w4a4"], SMALL, 1)
    monkeypatch.setattr(QuantizedLinear, "forward", lambda self, x: forward(self, x) * (1 + 2e-7))
    exact = quantize_(Llama(SMALL.model()).init_weights(0), Scheme.parse("w4a4"), backend="torch")
    with pytest.raises(RuntimeError, match=r"q_proj disagrees with the definition"):
        check_against_definition(exact)


def test_a_step_that_diverges_has_no_speed(monkeypatch):
    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda logits, _: logits.sum() * float("nan"))
    with pytest.raises(RuntimeError, match="the loss of none is nan"):
        compare_train_step(["none"], SMALL, 1)


def test_widths_are_whole_heads():
    assert SMALL.model().num_attention_heads == 1
    with pytest.raises(ConfigError, match="multiple of 64"):
        StepShape(width=96).model()


def test_a_result_says_what_it_was_measured_on(tmp_path):
    path = tmp_path / "deep" / "r.json"
    check_place(path)
    write_result(path, "bitquest bench x", {"seconds": 1.5})
    written = json.loads(path.read_text())
    assert (written["command"], written["seconds"]) == ("bitquest bench x", 1.5)
    assert written["hardware"] == describe()
    assert written["hardware"]["torch"] == torch.__version__
    assert written["hardware"]["cores"] >= 1


def test_a_result_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "r.json").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*r\.json'"):
        write_result(tmp_path / "r.json", "x", {})
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]
    assert (tmp_path / "r.json").read_text() == "old"

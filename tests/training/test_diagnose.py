"""Looks in a run leave training as it was bit for bit, and their series continues over a stop."""

import dataclasses
import json
import time

import pytest
import torch

from bitquest.nn import Scheme
from bitquest.numerics import Learned, PerRow, PerTensor, Quantizer, StraightThrough
from bitquest.numerics.packing import unpack
from bitquest.ops.engine import bits_to_mask
from bitquest.training import load_run, open_tokens, train
from bitquest.training.build import new_model
from bitquest.training.checkpoint import list_steps, read_checkpoint
from bitquest.training.diagnose import Codes, Diagnosis, plain, ranked, summary, turned
from bitquest.training.diagnostics import StepClock
from bitquest.training.loggers import read_metrics

LEARNED = str(
    Scheme(
        weight=Quantizer(granularity=PerRow(), scale=Learned(), estimator=StraightThrough()),
        activation=Quantizer(granularity=PerTensor(), scale=Learned(), estimator=StraightThrough()),
    )
)
MEASURED = {"seconds", "tokens_per_s", "memory_mb"}
CASES = {
    "none": {"scheme": "none"},
    "w1a1": {"scheme": "w1a1"},
    "torch": {"scheme": "w4a4-norot", "train": {"backend": "torch"}},
    "weights-only": {"scheme": "w2a16-h8", "model": {"tie_word_embeddings": True}},
    "sparse": {"scheme": "w4a4-2:4", "train": {"activation_checkpointing": True, "accumulation": 2}},
    "learned": {"scheme": LEARNED},
    "bf16": {"scheme": "w2a2", "train": {"precision": "bf16"}},
}


@pytest.fixture
def short(make_config):
    """short(scheme=…, …): a run of one block and six steps."""

    def make(**changes):
        model = {"num_hidden_layers": 1, **changes.pop("model", {})}
        steps = {"steps": 6, **changes.pop("train", {})}
        every = {"checkpoint": {"every": 2}, "evaluate": {"every": 4, "batches": 1}} | changes
        return make_config(model=model, train=steps, **every)

    return make


def records(run, kind=None):
    """The records of a run without what a clock or the system measured."""
    found = [{k: v for k, v in r.items() if k not in MEASURED} for r in read_metrics(run / "metrics.jsonl")]
    return [r for r in found if kind is None or r["kind"] == kind]


def stop_after(step, config, run):
    calls, start = [], max(list_steps(run), default=0)
    train(config, run, should_stop=lambda: calls.append(0) or start + len(calls) >= step)


@pytest.mark.parametrize("case", CASES)
def test_looks_change_nothing_of_training(short, tmp_path, case):
    train(short(**CASES[case]), tmp_path / "without")
    train(short(**CASES[case], diagnose={"every": 4, "sequences": 2}), tmp_path / "with")
    others = [r for r in records(tmp_path / "with") if r["kind"] != "diagnose"]
    assert others == records(tmp_path / "without")
    one, two = (read_checkpoint(tmp_path / name) for name in ("without", "with"))
    for kind in ("model", "optimizer"):
        for name, tensor in getattr(one, kind).items():
            assert torch.equal(tensor, getattr(two, kind)[name]), name
    assert [r["step"] for r in records(tmp_path / "with", "diagnose")] == [0, 4, 6]


@pytest.mark.parametrize("case", ["sparse", "learned"])
def test_a_stopped_run_continues_its_series(short, tmp_path, case):
    config = short(**CASES[case], diagnose={"every": 1})
    train(config, tmp_path / "straight")
    stop_after(5, config, tmp_path / "stopped")
    train(config, tmp_path / "stopped", from_step=4)  # the look after step 5 is taken again
    assert records(tmp_path / "stopped") == records(tmp_path / "straight")
    last = records(tmp_path / "stopped", "diagnose")[-1]
    assert (last["first"], last["previous"], last["step"]) == (0, 5, 6)
    one, two = (read_checkpoint(tmp_path / name).optimizer for name in ("straight", "stopped"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_that_ends_before_its_first_checkpoint_begins_anew(short, tmp_path):
    config = short(diagnose={"every": 3})
    train(config, tmp_path / "straight")

    class Interrupted(Exception):
        pass

    def fail():
        raise Interrupted

    with pytest.raises(Interrupted):
        train(config, tmp_path / "again", should_stop=fail)
    assert [r["step"] for r in read_metrics(tmp_path / "again" / "metrics.jsonl")] == [0]
    train(config, tmp_path / "again")
    assert records(tmp_path / "again") == records(tmp_path / "straight")


def test_looks_may_be_switched_on_and_off_when_a_run_goes_on(short, tmp_path):
    off, on = short(), short(diagnose={"every": 1})
    stop_after(1, off, tmp_path)
    stop_after(3, on, tmp_path)
    looks = records(tmp_path, "diagnose")
    assert [(r["step"], r["first"], r["previous"]) for r in looks] == [(2, 2, None), (3, 2, 2)]
    assert looks[0]["flipped"] is None
    assert looks[0]["drift_weights"] == 0
    stop_after(4, off, tmp_path)
    assert not any(name.startswith("diagnose.") for name in read_checkpoint(tmp_path).optimizer)
    train(on, tmp_path)
    looks = records(tmp_path, "diagnose")[2:]
    assert [(r["step"], r["first"], r["previous"]) for r in looks] == [(5, 5, None), (6, 5, 5)]


def test_other_tokens_than_before_are_not_compared(short, tmp_path):
    few, more = short(diagnose={"every": 2, "sequences": 1}), short(diagnose={"every": 2, "sequences": 3})
    stop_after(2, few, tmp_path)
    train(more, tmp_path)
    first, second = records(tmp_path, "diagnose")[2:4]
    assert first["persistent_inputs"] is None
    assert first["drift_inputs"] == 0
    assert first["flipped"] is not None
    assert second["persistent_inputs"] is not None


def test_the_series_is_that_of_the_checkpoints(short, tmp_path):
    """Flips, returns, persistence and drift, anew from the weights of every step, compared code by code."""
    config = short(
        scheme="w2a2", optimizer={"lr": 0.05}, diagnose={"every": 1}, checkpoint={"every": 1, "keep": 9},
        schedule={"warmup": 0.0},
    )  # fmt: skip
    train(config, tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    looks = [r["weights"][name] for r in records(tmp_path, "diagnose")]
    models = [new_model(config, open_tokens(config.data.path)), *(load_run(tmp_path, n).model for n in range(1, 7))]
    codes, masks, steps = [], [], []
    for model in models:
        layer = model.get_submodule(name)
        encoded = layer.encode_weight()
        rotated = layer.rotation.apply(layer.weight.detach()).double()
        # trust on 2 bits, written out: |x_h| ≤ s + Δ/2 with s = 1.5Δ
        masks.append((rotated.abs() > 2 * encoded.step.double()).flatten().tolist())
        codes.append(encoded.codes.flatten().tolist())
        steps.append(encoded.step.double())
    last_move = [0] * len(codes[0])
    for number in range(1, 7):
        flips = returns = 0
        for i, (old, new) in enumerate(zip(codes[number - 1], codes[number], strict=True)):
            if new != old:
                flips += 1
                returns += (new > old and last_move[i] < 0) or (new < old and last_move[i] > 0)
                last_move[i] = 1 if new > old else -1
        look, before = looks[number], [i for i, masked in enumerate(masks[number - 1]) if masked]
        expected = {
            "flipped": flips / len(last_move),
            "returned": returns / len(last_move),
            "masked": sum(masks[number]) / len(last_move),
            "persistent": sum(masks[number][i] for i in before) / len(before),
            "drift": float((steps[number] / steps[0]).log2().mean()),
            "spread": float((steps[number] / steps[0]).log2().std(correction=0)),
        }
        assert {key: look[key] for key in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert looks[-1]["returned"] > 0


def test_turned_counts_flips_and_returns():
    """By hand: up, up again, back down, still, dropped by sparsity, picked up."""
    before = torch.tensor([[-1, 0, 1, 1, 0, 0]], dtype=torch.int8)
    after = torch.tensor([[0, 1, 0, 1, 0, -2]], dtype=torch.int8)
    kept_before = torch.tensor([[True, True, True, True, True, False]])
    kept_after = torch.tensor([[True, True, True, True, False, True]])
    direction = torch.tensor([[0, 1, 1, -1, 1, 1]], dtype=torch.int8)
    flipped, returned, new = turned(Codes(ranked(before, kept_before), direction), ranked(after, kept_after))
    assert (flipped, returned) == (5 / 6, 3 / 6)
    assert new.tolist() == [[1, 1, -1, -1, -1, -1]]
    assert turned(Codes(ranked(after, None), new), ranked(after, None))[:2] == (0.0, 0.0)


def test_ranks_of_8_bits_do_not_wrap_around():
    codes = torch.tensor([[-128, 127]], dtype=torch.int8)
    assert ranked(codes, None).tolist() == [[-255, 255]]
    flipped, _, direction = turned(
        Codes(ranked(codes, None), torch.zeros_like(codes)), ranked(codes.flip(-1).contiguous(), None)
    )
    assert (flipped, direction.tolist()) == (1.0, [[1, -1]])


def test_the_checkpoint_keeps_codes_and_masks_packed(short, tmp_path):
    train(short(scheme="w2a2-2:4", diagnose={"every": 6}), tmp_path)
    kept = {n: t for n, t in read_checkpoint(tmp_path).optimizer.items() if n.startswith("diagnose.")}
    layer = load_run(tmp_path).model.get_submodule("model.layers.0.mlp.down_proj")
    prefix = "diagnose.weights.model.layers.0.mlp.down_proj"
    encoded, (rows, width) = layer.encode_weight(), layer.weight.shape
    assert torch.equal(unpack(kept[f"{prefix}.codes"], 2, width), encoded.codes)
    assert torch.equal(bits_to_mask(kept[f"{prefix}.kept"], width), encoded.kept)
    sizes = {name.rpartition(".")[2]: tensor.numel() for name, tensor in kept.items() if name.startswith(prefix)}
    bits = rows * width // 8
    assert sizes == {"codes": 2 * bits, "up": bits, "down": bits, "kept": bits, "mask": bits, "log_step": rows}


def test_a_record_is_json_with_numbers_or_null(short, tmp_path):
    train(short(diagnose={"every": 6}), tmp_path)
    record = records(tmp_path, "diagnose")[-1]
    json.dumps(record, allow_nan=False)
    assert plain({"a": [float("nan"), 0.123456789, {"b": float("inf")}], "c": True}) == {
        "a": [None, 0.123457, {"b": None}],
        "c": True,
    }
    assert set(summary(record)) <= set(record)
    assert sorted(record["inputs"]) == sorted(
        f"model.layers.0.{name}" for name in
        ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    )  # fmt: skip


def test_a_look_is_outside_the_timed_steps(short, tmp_path, monkeypatch):
    seconds = []

    def slow(self, step):
        time.sleep(0.02)
        seconds.append(step)

    monkeypatch.setattr(Diagnosis, "look", slow)
    config, clock = short(diagnose={"every": 2}), StepClock()
    model, tokens = new_model(config, open_tokens(config.data.path)), open_tokens(config.data.path, "val")
    diagnosis = Diagnosis(config, model, tokens, "float32", None)
    for step in range(7):
        before, began = clock.seconds, time.perf_counter()
        diagnosis.look_if_due(step, clock)
        spent, timed = time.perf_counter() - began, clock.seconds - before
        assert timed < spent - 0.015 or step % 2
    assert seconds == [0, 2, 4, 6]


def test_means_are_over_elements():
    weights = {"a": {"masked": 0.1, "elements": 300}, "b": {"masked": 0.5, "elements": 100}, "c": {"alignment": 1.0}}
    record = {"blocks": [{"output": 0.25, "weights": 0.5}, {"output": 0.75, "weights": None}], "weights": weights}
    made = summary({**record, "inputs": {}})
    assert made["masked_weights"] == pytest.approx(0.2)
    assert made["masked_inputs"] is None
    assert (made["alignment_top"], made["alignment_bottom"], made["alignment_weights"]) == (0.75, 0.25, 0.5)


def test_a_display_is_told_if_it_listens(short, tmp_path):
    class Deaf:
        on_start = on_step = on_evaluate = on_end = staticmethod(lambda _: None)

    class Listening(Deaf):
        def __init__(self):
            self.heard = []

        def on_diagnose(self, record):
            self.heard.append(record["step"])

    listening, config = Listening(), short(diagnose={"every": 3})
    train(config, tmp_path / "one", display=listening)
    train(dataclasses.replace(config, seed=4), tmp_path / "two", display=Deaf())
    assert listening.heard == [0, 3, 6]

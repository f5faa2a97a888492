"""A run that was stopped and goes on is bit for bit the run that was not."""

import json
import shutil

import pytest
import torch

from bitquest.errors import CheckpointError, ConfigError
from bitquest.nn import Scheme
from bitquest.numerics import Learned, PerRow, PerTensor, Quantizer, StraightThrough
from bitquest.training import prepare, train
from bitquest.training.checkpoint import list_steps, read_checkpoint
from bitquest.training.loggers import read_metrics

LEARNED = str(
    Scheme(
        weight=Quantizer(granularity=PerRow(), scale=Learned(), estimator=StraightThrough()),
        activation=Quantizer(granularity=PerTensor(), scale=Learned(), estimator=StraightThrough()),
    )
)
TIMES = {"seconds", "tokens_per_s", "memory_mb"}


def stop_after(step, config, run):
    calls = []
    start = max(list_steps(run), default=0)
    result = train(config, run, should_stop=lambda: calls.append(0) or start + len(calls) >= step)
    assert (result.step, result.interrupted) == (step, True)


def assert_same_run(one, two):
    """Equal weights, optimizer, generators and losses at the last step."""
    a, b = read_checkpoint(one), read_checkpoint(two)
    assert a.step == b.step
    for kind in ("model", "optimizer"):
        tensors, others = getattr(a, kind), getattr(b, kind)
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[name]), name
    records = [
        [{key: value for key, value in r.items() if key not in TIMES} for r in read_metrics(run / "metrics.jsonl")]
        for run in (one, two)
    ]
    assert records[0] == records[1]
    for key in ("train_loss", "val_loss", "bits_per_byte", "tokens"):
        assert a.state[key] == b.state[key]


@pytest.mark.parametrize(
    "changes",
    [
        {"scheme": "none"},
        {"scheme": "w1a1"},
        {"scheme": "w1a1-h8", "model": {"tie_word_embeddings": True}},
        {"scheme": "w4a4-2:4", "schedule": {"kind": "wsd"}},
        {"scheme": LEARNED},
        {"scheme": "w1a1", "train": {"accumulation": 2, "activation_checkpointing": True}},
        {"scheme": "w2a2", "train": {"precision": "bf16"}},
        {"recipe": {"optimizer": "muon", "row_gain": True, "average_from": 0.4, "matrix_lr": 2.0}},
        {"recipe": {"optimizer": "soap", "every_eigenbasis": 2, "row_norm": True, "decay_until": 0.5}},
        {"scheme": "w2a2", "recipe": {"cage": 10.0, "cage_from": 0.2, "freeze": 0.01, "freeze_from": 0.1}},
        {"recipe": {"activation_bits": [[0, 8], [0.4, 1]], "weight_clip": [[0, 2], [1, 1]], "average_decay": 0.9}},
        {"scheme": "none", "recipe": {"row_gain": True, "average_from": 0.2, "average_decay": 0.9}},
    ],
    ids=[
        *("none", "w1a1", "tied", "sparse-wsd", "learned", "accumulated", "bf16"),
        *("muon-gain-mean", "soap-rows", "cage-freeze", "widths-clip", "none-gain-exponential"),
    ],
)
def test_stopped_twice_is_bit_identical_to_never(make_config, tmp_path, changes):
    config = make_config(**changes)
    train(config, tmp_path / "straight")
    stop_after(3, config, tmp_path / "stopped")
    torch.rand(7)
    stop_after(7, config, tmp_path / "stopped")
    assert train(config, tmp_path / "stopped").finished
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_the_random_generator_goes_on_too(make_config, tmp_path):
    """Nothing in the trainer draws from it, but a model with dropout would."""
    config, drawn = make_config(), {"straight": [], "stopped": []}

    def draw(name, stop):
        drawn[name].append(torch.rand(1).item())
        return len(drawn[name]) == stop

    train(config, tmp_path / "straight", should_stop=lambda: draw("straight", None))
    train(config, tmp_path / "stopped", should_stop=lambda: draw("stopped", 6))
    train(config, tmp_path / "stopped", should_stop=lambda: draw("stopped", None))
    assert drawn["straight"] == drawn["stopped"]
    assert len(set(drawn["straight"])) == 12
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")


def test_a_different_run_would_be_noticed(make_config, tmp_path):
    train(make_config(), tmp_path / "one")
    train(make_config(optimizer={"lr": 1.0000001e-2}), tmp_path / "two")
    with pytest.raises(AssertionError):
        assert_same_run(tmp_path / "one", tmp_path / "two")


def test_killed_between_checkpoints_the_lost_steps_are_taken_again(make_config, tmp_path):
    config, run = make_config(log={"every": 1}), tmp_path / "run"
    train(config, tmp_path / "straight")

    class Killed(Exception):
        pass

    def kill():
        if len((run / "metrics.jsonl").read_text().splitlines()) >= 7:
            raise Killed
        return False

    with pytest.raises(Killed):
        train(config, run, should_stop=kill)
    assert list_steps(run) == [4]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # the line that was being written
    shutil.copytree(run / "checkpoints" / "step-4", run / "checkpoints" / ".step-8.tmp")
    assert train(config, run).resumed_from == 4
    assert_same_run(tmp_path / "straight", run)
    assert not list((run / "checkpoints").glob(".*"))


def test_killed_before_the_first_checkpoint(make_config, tmp_path):
    config, run = make_config(), tmp_path / "run"
    train(config, tmp_path / "straight")

    def kill():
        raise RuntimeError

    with pytest.raises(RuntimeError):
        train(config, run, should_stop=kill)
    assert list_steps(run) == []
    assert train(config, run).resumed_from is None
    assert_same_run(tmp_path / "straight", run)


def test_a_damaged_newest_checkpoint_is_never_passed_over_silently(make_config, tmp_path):
    config, run = make_config(), tmp_path / "run"
    train(config, tmp_path / "straight")
    stop_after(9, config, run)
    path = run / "checkpoints" / "step-9" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3] + b"xyz")
    with pytest.raises(CheckpointError, match=r"step 9 cannot be used: .*step-9/model\.safetensors.*--from-step 8"):
        train(config, run)
    assert list_steps(run) == [4, 8, 9]
    assert train(config, run, from_step=8).resumed_from == 8
    assert list_steps(run) == [4, 8, 12]
    assert_same_run(tmp_path / "straight", run)


def test_going_back_removes_what_came_later(make_config, tmp_path):
    config, run = make_config(), tmp_path / "run"
    train(config, run)
    calls = []
    train(config, run, from_step=4, should_stop=lambda: calls.append(0) or True)
    assert list_steps(run) == [4, 5]
    assert max(record["step"] for record in read_metrics(run / "metrics.jsonl")) <= 5
    with pytest.raises(CheckpointError, match="no checkpoint of step 8; there are 4, 5"):
        train(config, run, from_step=8)


def test_other_data_under_the_same_path_is_refused_and_moved_data_is_not(make_config, write_text, tmp_path):
    prepare([write_text(tmp_path / "text.txt", 300)], "byte", tmp_path / "data", val_fraction=0.1)
    config, run = make_config(data={"path": str(tmp_path / "data")}), tmp_path / "run"
    stop_after(3, config, run)
    (tmp_path / "data").rename(tmp_path / "moved")
    stop_after(5, make_config(data={"path": str(tmp_path / "moved")}), run)
    prepare([write_text(tmp_path / "text.txt", 301)], "byte", tmp_path / "data", val_fraction=0.1)
    with pytest.raises(ConfigError, match=r"data\.path = .* is not the data .* up to step 5"):
        train(config, run)


def test_a_changed_machine_is_told(make_config, tmp_path):
    config, run = make_config(train={"steps": 4}), tmp_path / "run"
    stop_after(3, config, run)
    notices = []

    class Listener:
        def on_start(self, start):
            notices.extend(start.notices)

        def on_step(self, record): ...
        def on_evaluate(self, record): ...
        def on_end(self, result): ...

    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        train(config, run, display=Listener())
    finally:
        torch.set_num_threads(threads)
    assert notices == [
        f"threads was {threads} and is {threads + 1}: the run goes on, but not bit for bit as it would have"
    ]


def test_a_state_that_was_tampered_with_consistently_is_still_checked(make_config, tmp_path):
    """Checksums fit, contents do not: still one clear error."""
    from bitquest.files import sha256

    config, run = make_config(), tmp_path / "run"
    stop_after(3, config, run)
    folder = run / "checkpoints" / "step-3"

    def rewrite(change):
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(change(state)))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["state.json"] = {
            "bytes": (folder / "state.json").stat().st_size,
            "sha256": sha256(folder / "state.json"),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return state

    original = rewrite(lambda state: {k: v for k, v in state.items() if k != "model"})
    with pytest.raises(CheckpointError, match="no object 'model'"):
        train(config, run)
    rewrite(lambda _: original | {"model": original["model"] | {"hidden_size": 64}})
    with pytest.raises(CheckpointError, match=r"step-3: .* is torch.float32"):
        train(config, run)
    rewrite(lambda _: original | {"config": {"train": {"steps": "x"}}})
    with pytest.raises(CheckpointError, match=r"configuration in state\.json is wrong"):
        train(config, run)

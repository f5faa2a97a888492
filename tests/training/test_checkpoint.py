"""Checkpoints on the disk: whole or refused by name, whatever happens while or after they are written."""

import errno
import json
import resource
import shutil

import pytest
import torch

from bitquest.errors import CheckpointError
from bitquest.training import checkpoint as module
from bitquest.training.checkpoint import (
    Checkpoint,
    forget_after,
    list_steps,
    load_named,
    named_tensors,
    problem,
    read_checkpoint,
    remove_leftovers,
    save_checkpoint,
)

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def make(step, size=64):
    generator = torch.Generator().manual_seed(step)
    weights = {"w": torch.randn(size, size, generator=generator), "b": torch.randn(size, generator=generator)}
    return Checkpoint(
        step, weights, {"w.exp_avg": torch.ones(size), "rng.cpu": torch.get_rng_state()}, {"tokens": step * 10}
    )


def save(run, *steps, keep=5):
    for step in steps:
        save_checkpoint(run, make(step), keep)


def folder(run, step):
    return run / "checkpoints" / f"step-{step}"


def test_what_is_saved_comes_back(tmp_path):
    save(tmp_path, 1, 7)
    assert list_steps(tmp_path) == [1, 7]
    newest, first = read_checkpoint(tmp_path), read_checkpoint(tmp_path, 1, optimizer=False)
    assert newest.step == 7
    assert newest.state["tokens"] == 70
    for name, tensor in make(7).model.items():
        assert torch.equal(newest.model[name], tensor)
    assert newest.optimizer["rng.cpu"].dtype == torch.uint8
    assert (first.step, first.optimizer) == (1, {})
    assert sorted(path.name for path in folder(tmp_path, 7).iterdir()) == sorted(FILES)


def test_the_last_are_kept_in_the_order_of_steps(tmp_path):
    save(tmp_path, 9, 10, 100, keep=2)
    assert list_steps(tmp_path) == [10, 100]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-10", "step-100"]


def test_a_step_saved_again_replaces_the_old(tmp_path):
    save(tmp_path, 5)
    save_checkpoint(tmp_path, Checkpoint(5, {"w": torch.zeros(2)}, {"x": torch.zeros(1)}, {}), 2)
    assert set(read_checkpoint(tmp_path, 5).model) == {"w"}
    assert list_steps(tmp_path) == [5]


def test_leftovers_of_a_killed_save_are_no_checkpoints_and_are_removed(tmp_path):
    save(tmp_path, 4)
    for name in (".step-8.tmp", ".step-2.removed"):
        shutil.copytree(folder(tmp_path, 4), tmp_path / "checkpoints" / name)
    assert list_steps(tmp_path) == [4]
    remove_leftovers(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-4"]
    remove_leftovers(tmp_path / "nowhere")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["remove", "truncate", "flip", "empty", "folder"])
def test_damage_is_named_and_an_intact_one_offered(tmp_path, name, damage):
    save(tmp_path, 10, 20, 30)
    path = folder(tmp_path, 30) / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "folder":
        path.mkdir()
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path)
    message = str(caught.value)
    assert "the checkpoint of step 30 cannot be used" in message
    assert str(path) in message
    assert "That of step 20 is intact" in message
    assert "--from-step 20" in message
    assert read_checkpoint(tmp_path, 20).step == 20


def test_only_damaged_ones(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        (folder(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="No other checkpoint of this run is intact"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["[]", '"x"', "{", '{"format": "bitquest-checkpoint"}', '{"format": 1, "version": 1, "files": 3, "step": 1}'],
)
def test_manifests_of_any_shape_give_a_reason(tmp_path, text):
    save(tmp_path, 1)
    (folder(tmp_path, 1) / "manifest.json").write_text(text)
    assert "manifest.json" in problem(tmp_path, 1)


def test_a_manifest_of_another_version_or_step(tmp_path):
    save(tmp_path, 1, 2)
    path = folder(tmp_path, 1) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(CheckpointError, match="version 2, this bitquest reads 1; it comes from a later one") as caught:
        read_checkpoint(tmp_path, 1)
    assert "train again" not in str(caught.value)
    folder(tmp_path, 2).rename(folder(tmp_path, 3))
    assert "does not describe the checkpoint of step 3" in problem(tmp_path, 3)


def test_steps_that_are_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        read_checkpoint(tmp_path)
    save(tmp_path, 5, 6)
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; there are 5, 6"):
        read_checkpoint(tmp_path, 7)


@pytest.mark.parametrize("function", ["save_file", "write_json", "sync"])
def test_a_full_disk_is_reported_and_harms_nothing(tmp_path, monkeypatch, function):
    save(tmp_path, 1, 2)
    real, calls = getattr(module, function), []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(module, function, full)
    with pytest.raises(CheckpointError, match=r"step-3: .*No space left on device.*step 2 is untouched.*Make room"):
        save(tmp_path, 3, keep=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-1", "step-2"]
    assert read_checkpoint(tmp_path).step == 2


def test_a_file_system_that_really_refuses(tmp_path):
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the weights have 16 KiB, the generator 5 KiB
    try:
        with pytest.raises(CheckpointError, match=r"step-2: the checkpoint could not be written.*step 1 is untouched"):
            save_checkpoint(tmp_path, make(2, size=128), 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    assert read_checkpoint(tmp_path).step == 1


def test_the_manifest_is_written_last_and_the_name_given_at_the_end(tmp_path, monkeypatch):
    seen = []
    real = module.write_json

    def watched(path, value):
        seen.append((path.name, sorted(entry.name for entry in path.parent.iterdir()), list_steps(tmp_path)))
        real(path, value)

    monkeypatch.setattr(module, "write_json", watched)
    save(tmp_path, 1)
    assert seen[-1] == ("manifest.json", sorted(FILES[:3]), [])


def test_forgetting_later_ones(tmp_path):
    save(tmp_path, 1, 2, 3, 4)
    forget_after(tmp_path, 2)
    assert list_steps(tmp_path) == [1, 2]


def tied():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def test_tied_weights_are_saved_once_and_loaded_into_both():
    one, two = tied(), tied()
    saved = named_tensors(one.state_dict())
    assert set(saved) == {"0.weight", "2.weight", "2.bias"}
    version = two[0].weight._version
    load_named(two.state_dict(), saved, "here")
    assert two[0].weight is two[1].weight
    assert torch.equal(two[1].weight, one[0].weight)
    assert two[0].weight._version > version


def test_tensors_that_do_not_fit_are_refused_before_any_is_copied():
    saved, model = named_tensors(tied().state_dict()), tied()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"here does not fit .*2\.bias is missing"):
        load_named(model.state_dict(), {k: v for k, v in saved.items() if k != "2.bias"}, "here")
    with pytest.raises(CheckpointError, match=r"9\.weight is not part of the model"):
        load_named(model.state_dict(), saved | {"9.weight": torch.zeros(1)}, "here")
    with pytest.raises(CheckpointError, match=r"here: 2\.bias is torch.float32 \(3,\), the model has"):
        load_named(model.state_dict(), saved | {"2.bias": torch.zeros(3)}, "here")
    with pytest.raises(CheckpointError, match=r"2\.bias is torch.float64"):
        load_named(model.state_dict(), saved | {"2.bias": saved["2.bias"].double()}, "here")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

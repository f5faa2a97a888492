"""Checkpoints on the disk: folders `step-N` of safetensors and JSON that are whole, or refused by name.

    checkpoints/step-200/model.safetensors       weights, under the model's own names
                         optimizer.safetensors   AdamW's moments, `<parameter>.<moment>`, and the generators' states
                         state.json              step, configuration, the model's shape, what identifies the data
                         manifest.json           written last: bytes and SHA-256 of the three above

A folder is written under another name and renamed when complete, so `step-N` is never half a checkpoint; a file that
changed afterwards no longer fits the manifest. Nothing here is pickled.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitquest.errors import CheckpointError
from bitquest.files import remove_folder, sha256, sync, write_json

FORMAT = "bitquest-checkpoint"
VERSION = 1
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
_FILES = (MODEL, OPTIMIZER, STATE)
_UPDATE = "; it comes from a later one: update with `pip install --upgrade bitquest`"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, on the CPU."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def list_steps(run_dir: Path) -> list[int]:
    """Steps that have a checkpoint folder, ascending; whether they are intact is `problem`'s to say."""
    folder = checkpoints_folder(run_dir)
    if not folder.is_dir():
        return []
    names = (entry.name.removeprefix("step-") for entry in folder.iterdir() if entry.name.startswith("step-"))
    return sorted(int(name) for name in names if name.isdecimal())


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed save or removal left behind."""
    folder = checkpoints_folder(run_dir)
    for entry in folder.glob(".step-*") if folder.is_dir() else ():
        shutil.rmtree(entry)


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `step-N`, then remove all but the newest `keep`.

    Raises CheckpointError if it cannot be written (disk full, no permission); the earlier ones are then untouched.
    """
    folder = checkpoints_folder(run_dir) / f"step-{checkpoint.step}"
    aside = folder.with_name(f".{folder.name}.tmp")
    try:
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir(parents=True)
        _write(aside, MODEL, lambda path: save_file(checkpoint.model, path))
        _write(aside, OPTIMIZER, lambda path: save_file(checkpoint.optimizer, path))
        write_json(aside / STATE, {"step": checkpoint.step, **checkpoint.state})
        files = {name: {"bytes": (aside / name).stat().st_size, "sha256": sha256(aside / name)} for name in _FILES}
        write_json(aside / MANIFEST, {"format": FORMAT, "version": VERSION, "step": checkpoint.step, "files": files})
        sync(aside)
        if folder.exists():
            remove_folder(folder)
        os.replace(aside, folder)
        sync(folder.parent)
        sync(run_dir)  # the first checkpoint makes the folder of all
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            shutil.rmtree(aside)
        raise CheckpointError(_cannot_save(run_dir, folder, error)) from error
    for step in list_steps(run_dir)[:-keep]:
        remove_folder(folder.with_name(f"step-{step}"))
    return folder


def _write(folder: Path, name: str, write: Callable[[Path], None]) -> None:
    write(folder / name)
    sync(folder / name)


def _cannot_save(run_dir: Path, folder: Path, error: Exception) -> str:
    steps = list_steps(run_dir)
    earlier = f"The checkpoint of step {steps[-1]} is untouched" if steps else "There is no earlier checkpoint"
    return (
        f"{folder}: the checkpoint could not be written: {error}. {earlier}. "
        "Make room (or lower checkpoint.keep), then run the same command again"
    )


def problem(run_dir: Path, step: int) -> str | None:
    """What is wrong with the checkpoint of a step, as `FILE: reason`; None if every file fits the manifest."""
    folder = checkpoints_folder(run_dir) / f"step-{step}"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["version"], manifest["files"]
        if manifest["format"] != FORMAT or manifest["step"] != step or set(files) != set(_FILES):
            return f"{folder / MANIFEST}: does not describe the checkpoint of step {step}"
        if version != VERSION:
            later = _UPDATE if isinstance(version, int) and version > VERSION else ""
            return f"{folder / MANIFEST}: version {version}, this bitquest reads {VERSION}{later}"
        for name, entry in files.items():
            if (size := (folder / name).stat().st_size) != entry["bytes"]:
                return f"{folder / name}: {size} bytes instead of {entry['bytes']}"
            if sha256(folder / name) != entry["sha256"]:
                return f"{folder / name}: its contents changed since it was written (SHA-256 differs)"
    except FileNotFoundError as error:
        return f"{error.filename}: missing"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / MANIFEST}: not a manifest"
    return None


def read_checkpoint(run_dir: Path, step: int | None = None, *, optimizer: bool = True) -> Checkpoint:
    """The checkpoint of a step, or the newest, after its checksums were verified. optimizer=False leaves that part out.

    Raises CheckpointError: none there, that step not there, or not usable (naming the file and the newest intact one).
    """
    steps = list_steps(run_dir)
    if not steps:
        raise CheckpointError(f"{run_dir}: no checkpoint yet")
    if step is not None and step not in steps:
        raise CheckpointError(f"{run_dir}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    step = steps[-1] if step is None else step
    if (wrong := problem(run_dir, step)) is not None:
        if wrong.endswith(_UPDATE):  # nothing is broken
            raise CheckpointError(wrong)
        intact = next((other for other in reversed(steps) if other != step and problem(run_dir, other) is None), None)
        raise CheckpointError(f"the checkpoint of step {step} cannot be used: {wrong}. {_way_out(intact)}")
    folder = checkpoints_folder(run_dir) / f"step-{step}"
    return Checkpoint(
        step,
        load_file(folder / MODEL),
        load_file(folder / OPTIMIZER) if optimizer else {},
        json.loads((folder / STATE).read_text(encoding="utf-8")),
    )


def _way_out(intact: int | None) -> str:
    if intact is None:
        return "No other checkpoint of this run is intact: remove the run and train again"
    return f"That of step {intact} is intact: go back to it with --from-step {intact} (training) or --step {intact}"


def forget_after(run_dir: Path, step: int) -> None:
    """Remove the checkpoints after a step, newest first, so that an interruption leaves a line without gaps."""
    for later in reversed(list_steps(run_dir)):
        if later > step:
            remove_folder(checkpoints_folder(run_dir) / f"step-{later}")


def named_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors for safetensors; of names that share a storage (tied weights) the first stands for all."""
    kept: dict[str, Tensor] = {}
    seen: set[tuple[int, int]] = set()
    for name, tensor in tensors.items():
        identity = (tensor.data_ptr(), tensor.numel())
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        kept[name] = tensor.detach().cpu().contiguous()
    return kept


def load_named(target: Mapping[str, Tensor], saved: Mapping[str, Tensor], where: str) -> None:
    """Copy saved tensors into those of the same names, in place; shared ones once, as `named_tensors` saved them.

    Raises CheckpointError naming a tensor that is missing, unexpected, or of another shape or type.
    """
    wanted = {name: tensor for name, tensor in target.items() if name in saved}
    covered = {tensor.data_ptr() for tensor in wanted.values()}
    missing = [name for name, tensor in target.items() if name not in saved and tensor.data_ptr() not in covered]
    unexpected = [name for name in saved if name not in target]
    if missing or unexpected:
        what = f"{missing[0]} is missing" if missing else f"{unexpected[0]} is not part of the model"
        raise CheckpointError(f"{where} does not fit the model of its configuration: {what}")
    for name, tensor in wanted.items():
        if tensor.shape != saved[name].shape or tensor.dtype != saved[name].dtype:
            raise CheckpointError(
                f"{where}: {name} is {saved[name].dtype} {tuple(saved[name].shape)}, "
                f"the model has {tensor.dtype} {tuple(tensor.shape)}"
            )
    for name, tensor in wanted.items():
        tensor.detach().copy_(saved[name])

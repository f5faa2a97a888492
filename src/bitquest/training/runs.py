"""Run directories: what is in one, who may write to it, whether a run can go on in it, and loading a trained model."""

import dataclasses
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitquest.errors import CheckpointError, ConfigError
from bitquest.files import sync, write_text_atomic
from bitquest.models import Llama, Tokenizer
from bitquest.training.build import checkpoint_config, restored_model
from bitquest.training.checkpoint import checkpoints_folder, list_steps, read_checkpoint
from bitquest.training.config import TrainConfig, differing_keys, load_config

CONFIG, TOKENIZER, METRICS = "config.toml", "tokenizer.json", "metrics.jsonl"

# Sections that decide what is written down, not what is learned: they may change when a run goes on.
_FREE_SECTIONS = ("checkpoint", "log", "diagnose")


@dataclass(frozen=True)
class LoadedRun:
    """A trained model in eval mode on the CPU, its layers quantized as trained, and where it comes from."""

    model: Llama
    config: TrainConfig
    tokenizer: Tokenizer
    step: int
    finished: bool

    @property
    def metadata(self) -> dict[str, Any]:
        """What a packed model notes of the run it came from; `verify` looks for the step."""
        return {"scheme": self.config.scheme, "step": self.step, "finished": self.finished}


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory."""
    return (folder / CONFIG).is_file()


def load_run(run_dir: str | Path, step: int | None = None, *, require_finished: bool = False) -> LoadedRun:
    """The model of a run's newest checkpoint, or of `step`, checksums verified.

    Raises CheckpointError: not a run directory (a packed model is pointed to its own commands), no checkpoint yet, no
    such step, a damaged file, and, with require_finished and no `step`, a run that has steps left.
    """
    run_dir = Path(run_dir)
    if not is_run(run_dir):
        raise CheckpointError(_not_a_run(run_dir))
    if not list_steps(run_dir):
        raise CheckpointError(
            f"{run_dir}: no checkpoint yet. Train on with: bitquest train {run_dir / CONFIG} --out {run_dir}"
        )
    checkpoint = read_checkpoint(run_dir, step, optimizer=False)
    where = str(checkpoints_folder(run_dir) / f"step-{checkpoint.step}")
    config = checkpoint_config(checkpoint, where)
    finished = checkpoint.step >= config.train.steps
    if require_finished and step is None and not finished:
        raise CheckpointError(
            f"{run_dir}: the run is at step {checkpoint.step} of {config.train.steps}. Finish it with "
            f"`bitquest train {run_dir / CONFIG} --out {run_dir}`, or take it as it is with --step {checkpoint.step}"
        )
    model = restored_model(config, checkpoint, where).eval()
    return LoadedRun(model, config, Tokenizer.from_file(run_dir / TOKENIZER), checkpoint.step, finished)


def _not_a_run(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such run directory"
    if not folder.is_dir():
        return f"{folder}: this is a file; a run is the directory that `bitquest train` wrote"
    if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
        return (
            f"{folder}: this is a packed model or a Hugging Face checkpoint, not a run directory. "
            "A packed model is used by `bitquest generate` and `bitquest eval`"
        )
    if folder.name.startswith("step-") and is_run(folder.parent.parent):
        step = folder.name.removeprefix("step-")
        return f"{folder}: this is one checkpoint. Name the run, {folder.parent.parent}, and add --step {step}"
    return f"{folder}: not a run directory: it has no {CONFIG}"


def check_same(run_dir: Path, config: TrainConfig) -> None:
    """Raise ConfigError, naming the keys, if the run in a directory was started with another configuration.

    data.path may differ, for data may move: whether it is the same data is checked against the checkpoint.
    """
    before = load_config(run_dir / CONFIG)
    same = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, path=before.data.path),
        **{name: getattr(before, name) for name in _FREE_SECTIONS},
    )
    if different := differing_keys(before, same):
        raise ConfigError(
            f"{run_dir} holds a run with another configuration (there, asked for now): {'; '.join(different)}. "
            "Choose another directory with --out, or the same configuration to go on"
        )


def start_run(run_dir: Path, config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Write the tokenizer and, last, the configuration, which makes the directory a run."""
    tokenizer.save(run_dir / TOKENIZER)
    write_text_atomic(run_dir / CONFIG, config.to_toml())
    sync(run_dir.absolute().parent)


def check_free(folder: Path, marker: str = CONFIG, what: str = "not a run directory", early: str = TOKENIZER) -> None:
    """Raise ConfigError if something else stands where a directory should be begun that `marker` will mark as one.

    early: what is written before the marker, and may be there of a start that was cut off.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: there is a file of this name; choose another directory with --out")
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in names if not name.startswith(".") and name != early]
    if foreign:
        raise ConfigError(f"{folder}: holds {foreign[0]} and no {marker}, so it is {what}; choose another with --out")


LOCK = ".lock"


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Hold a run directory (made if need be) for one process. Raises ConfigError if another one trains in it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{run_dir}: another process is training in this directory; wait for it, or choose another with --out"
            ) from None
        yield

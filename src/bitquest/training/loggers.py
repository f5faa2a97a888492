"""Where metrics go: metrics.jsonl always, TensorBoard and Weights & Biases if the configuration asks for them."""

import importlib
import json
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from bitquest.errors import CheckpointError, MissingExtraError
from bitquest.files import write_text_atomic
from bitquest.training.config import LogSection, TrainConfig

Record = dict[str, Any]


class MetricsFile:
    """metrics.jsonl: one JSON object a line, appended and handed to the system at once.

    A continued run has each step once: lines after `after_step`, and a line cut off in writing, are dropped on opening.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        if path.exists():
            records = read_metrics(path) if after_step else []  # from step 0 on everything is written anew
            kept = [json.dumps(record) + "\n" for record in records if record["step"] <= after_step]
            write_text_atomic(path, "".join(kept))
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Raises CheckpointError if the line cannot be written (disk full)."""
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self._path}: the metrics could not be written: {error.strerror}. The checkpoints are untouched. "
                "Make room, then run the same command again"
            ) from error

    def sync(self) -> None:
        """Wait until the lines are on the disk, so that a checkpoint never outlives its metrics."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        with suppress(OSError):  # every line was flushed; what could not be was reported then
            self._file.close()


def read_metrics(path: Path) -> list[Record]:
    """Records of a metrics.jsonl; a last line that was cut off is left out. CheckpointError for any other bad line."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            records.append({**record, "step": int(record["step"])})
        except (ValueError, KeyError, TypeError):
            if number == len(lines) and not line.endswith("\n"):
                break
            raise CheckpointError(f"{path}, line {number}: not a metrics record. Remove the line") from None
    return records


class TensorBoardLogger:
    """Scalars `train/loss`, `evaluate/loss`, … in run_dir/tensorboard."""

    def __init__(self, run_dir: Path, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=after_step + 1)

    def write(self, record: Record) -> None:
        for name, value in _scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """The same scalars at Weights & Biases; a continued run goes on under the identifier kept in run_dir/wandb.id."""

    def __init__(self, run_dir: Path, config: TrainConfig) -> None:
        import wandb

        identifier = run_dir / "wandb.id"
        if not identifier.exists():
            write_text_atomic(identifier, uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=config.log.wandb_project,
            name=run_dir.name,
            id=identifier.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(run_dir),
            config=config.to_dict(),
        )

    def write(self, record: Record) -> None:
        self._run.log(_scalars(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _scalars(record: Record) -> dict[str, float]:
    """A record's numbers; what it says of single blocks and layers is in metrics.jsonl alone."""
    return {
        f"{record['kind']}/{name}": value
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float)
    }


def require_loggers(section: LogSection) -> None:
    """Raise MissingExtraError for a logger that is asked for and not installed, before anything is written."""
    for wanted, package in ((section.tensorboard, "tensorboard"), (section.wandb, "wandb")):
        if wanted:
            try:
                importlib.import_module(package)
            except ImportError:
                raise MissingExtraError(package, package, f"log.{package} = true") from None


class Loggers:
    """All loggers of one run."""

    def __init__(self, run_dir: Path, config: TrainConfig, after_step: int) -> None:
        self.metrics = MetricsFile(run_dir / "metrics.jsonl", after_step)
        self._others: list[TensorBoardLogger | WandbLogger] = []
        if config.log.tensorboard:
            self._others.append(TensorBoardLogger(run_dir, after_step))
        if config.log.wandb:
            self._others.append(WandbLogger(run_dir, config))

    def write(self, record: Record) -> None:
        for logger in (self.metrics, *self._others):
            logger.write(record)

    def close(self) -> None:
        for logger in (self.metrics, *self._others):
            logger.close()

"""What reports and comparisons know of a run: numbers read from its directory, and what is measured afterwards."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bitquest.errors import CheckpointError


@dataclass(frozen=True)
class CurvePoint:
    """Loss in nats per token after so many steps."""

    step: int
    loss: float


@dataclass(frozen=True)
class RunSummary:
    """One training run as a report shows it. Runs of the same name are seeds of one thing and are drawn together.

    steps of total_steps are done. Losses in nats per token, on the validation split but for `train_curve`.
    packed_bytes are the entries of `bitquest.export.packed_sizes`: total_bytes, linear_bytes, embedding_bytes,
    head_bytes (a tied head has none of its own). tokens_per_s is the speed of generating, train_tokens_per_s that of
    training. verified is what `bitquest verify` said; None everywhere means not measured.
    looks are the records of kind `diagnose`, oldest first. sample is a text the model wrote after `prompt`. config is
    the nested configuration, as `TrainConfig.to_dict`.
    """

    name: str
    scheme: str
    seed: int = 0
    steps: int = 0
    total_steps: int = 0
    train_curve: tuple[CurvePoint, ...] = ()
    validation_curve: tuple[CurvePoint, ...] = ()
    val_loss: float | None = None
    bits_per_byte: float | None = None
    packed_bytes: Mapping[str, int] | None = None
    tokens_per_s: float | None = None
    train_tokens_per_s: float | None = None
    seconds: float | None = None
    verified: bool | None = None
    diverged: bool = False
    prompt: str = ""
    sample: str | None = None
    looks: tuple[Mapping[str, Any], ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.total_steps > 0 and self.steps >= self.total_steps

    @property
    def packed_mb(self) -> float | None:
        """Packed size in megabytes (10⁶ bytes), embedding and head included."""
        return None if self.packed_bytes is None else self.packed_bytes["total_bytes"] / 1e6


def read_run(run_dir: str | Path, *, name: str | None = None, **measured: Any) -> RunSummary:
    """The summary of a run directory, finished or not; `name` is its scheme unless given.

    measured: fields that training does not know (packed_bytes, tokens_per_s, verified, prompt, sample, diverged).

    Raises CheckpointError for a folder that is no run and for metrics that are none (file and line named), ConfigError
    for a configuration that is none.
    """
    from bitquest.training.config import load_config
    from bitquest.training.loggers import read_metrics

    run_dir = Path(run_dir)
    if not (run_dir / "config.toml").is_file():
        raise CheckpointError(f"{run_dir}: not a run directory: it has no config.toml")
    config = load_config(run_dir / "config.toml")
    path = run_dir / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
    curves: dict[str, list[CurvePoint]] = {"train": [], "evaluate": []}
    for line, record in enumerate(records, 1):
        kind = record.get("kind")
        if kind not in curves:  # others may write down more than a report of losses needs
            continue
        curves[kind].append(CurvePoint(record["step"], _number(record, "loss", path, line)))
        if len(curves[kind]) > 1 and curves[kind][-2].step >= record["step"]:
            raise CheckpointError(f"{path}, line {line}: step {record['step']} comes after a later step")
        for key in ("bits_per_byte",) if kind == "evaluate" else ("tokens_per_s", "seconds"):
            _number(record, key, path, line)
    trained, evaluated, looks = (
        [record for record in records if record.get("kind") == kind] for kind in ("train", "evaluate", "diagnose")
    )
    seconds = trained[-1]["seconds"] if trained else None
    fields: dict[str, Any] = {
        "steps": trained[-1]["step"] if trained else 0,
        "total_steps": config.train.steps,
        "train_curve": tuple(curves["train"]),
        "validation_curve": tuple(curves["evaluate"]),
        "val_loss": evaluated[-1]["loss"] if evaluated else None,
        "bits_per_byte": evaluated[-1]["bits_per_byte"] if evaluated else None,
        "train_tokens_per_s": trained[-1].get("tokens", 0) / seconds if seconds else None,
        "seconds": seconds,
        "looks": tuple(looks),
        "config": config.to_dict(),
    }
    return RunSummary(name=name or config.scheme, scheme=config.scheme, seed=config.seed, **(fields | measured))


def _number(record: Mapping[str, Any], key: str, path: Path, line: int) -> float:
    value = record.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise CheckpointError(f"{path}, line {line}: {key} is {value!r}, not a number")
    return float(value)


def grouped(runs: tuple[RunSummary, ...] | list[RunSummary]) -> dict[str, list[RunSummary]]:
    """Runs by name, in the order the names first appear."""
    groups: dict[str, list[RunSummary]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    return groups


def mean(values: list[float]) -> float | None:
    """Arithmetic mean, None of nothing."""
    return sum(values) / len(values) if values else None

"""The runs a scaling law is fitted to: rows of a CSV, run directories, comparisons.

N counts parameters without token table and head, D training tokens; losses are in nats per token, and comparable only
among runs of one tokenizer and one held-out text.
"""

import csv
import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitquest.errors import ConfigError, DataError
from bitquest.nn import Scheme

UNQUANTIZED = "bf16"  # what laws call the format of the scheme `none`

_NAMES = {
    "parameters": ("non_embedding_parameters", "parameters"),
    "tokens": ("tokens",),
    "loss": ("loss", "val_loss", "c4_val_loss"),
}
_GRIDS = {"": "", "int": "", "none": "", "fp4_e2m1": "-fp4", "fp4": "-fp4"}
_SPARSITIES = {"": "", "dense": "", "2:4": "-2:4", "4:8_pairs": "-4:8", "4:8": "-4:8"}
_ROTATIONS = {"": "", "hadamard128": "", "none": "-norot"}


@dataclass(frozen=True)
class ScalingRun:
    """One finished run. rate: its learning rate, None where not known; source: where it was read."""

    parameters: int
    tokens: int
    format: str
    loss: float
    source: str
    rate: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class ScalingRuns:
    """Runs, and what was noticed in reading them (what was left out, and why)."""

    runs: tuple[ScalingRun, ...]
    notes: tuple[str, ...] = ()

    @property
    def formats(self) -> tuple[str, ...]:
        """Formats in the order in which they first appear."""
        return tuple(dict.fromkeys(run.format for run in self.runs))


def read_runs(paths: Sequence[str | Path]) -> ScalingRuns:
    """The runs of CSV files, run directories and comparisons (all their runs).

    Runs that diverged, are unstable or have steps left are left out with a note. Of a cell (format, N, D) that was
    trained at several learning rates only one rate's runs stay: the rate with the most runs, of these with the lowest
    mean loss. Runs that are given twice (a file and its copy, a comparison and one of its runs) count once, and a note
    says so. Raises DataError naming file and line, or folder.
    """
    inputs: list[list[ScalingRun]] = []
    notes: list[str] = []
    folders: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            folders += _run_folders(path)
        elif path.exists():
            inputs.append(read_csv(path))
        else:
            raise DataError(f"{path}: no such file or folder; name a CSV of runs, run directories or comparisons")
    places = {folder.resolve(): folder for folder in reversed(folders)}
    if folders:
        trained, notes = _read_folders([folder for folder in dict.fromkeys(folders) if folder in places.values()])
        inputs += [[run] for run in trained]
    found, twice = _each_once(inputs)
    twice += len(folders) - len(places)
    if twice:
        notes.append(f"{twice} run{'s are' if twice > 1 else ' is'} given more than once; each counts once")
    kept, dropped = _best_rates(found)
    if dropped:
        notes.append(f"{dropped} runs at learning rates other than their cell's best one were left out")
    return ScalingRuns(tuple(kept), tuple(notes))


def _each_once(inputs: Sequence[Sequence[ScalingRun]]) -> tuple[list[ScalingRun], int]:
    """The runs of all inputs without those that an earlier input has, and how many these are.

    Within one input equal rows stay: a file may round the losses of two seeds to the same digits.
    """
    found: list[ScalingRun] = []
    known: set[ScalingRun] = set()
    for runs in inputs:
        bare = {run: replace(run, source="") for run in runs}
        found += [run for run in runs if bare[run] not in known]
        known |= set(bare.values())
    return found, sum(map(len, inputs)) - len(found)


# --- CSV -----------------------------------------------------------------------------------------------------------


def read_csv(path: Path) -> list[ScalingRun]:
    """Runs of a CSV with a head: non_embedding_parameters, tokens, a loss, and the format.

    The loss is `loss`, `val_loss` or `c4_val_loss`; the format is a column `scheme`, or weight_bits and activation_bits
    beside the optional format, rotation and sparsity. Other columns are not looked at.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            if not columns:
                raise DataError(f"{path}: the file is empty; a CSV of runs has a head and a line per run")
            if columns[0].startswith("{") and "bitquest-scaling-law" in f"{columns}{file.read(200)}":
                raise DataError(f"{path}: this is a scaling law, not a CSV of runs; `scaling plot --law` takes it")
            picked = {what: _column(path, columns, what) for what in _NAMES}
            if "scheme" not in columns and not {"weight_bits", "activation_bits"} <= set(columns):
                raise DataError(
                    f"{path}: no column says the format; there must be `scheme`, or `weight_bits` and `activation_bits`"
                )
            return [_row(f"{path}, line {reader.line_num}", row, picked) for row in reader]
    except UnicodeDecodeError:
        raise DataError(f"{path}: not a text file; a CSV of runs, a run directory or a comparison is needed") from None
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV: {error}") from None


def _column(path: Path, columns: Sequence[str], what: str) -> str:
    for name in _NAMES[what]:
        if name in columns:
            return name
    raise DataError(f"{path}: the column {' or '.join(_NAMES[what])} is missing; there are {', '.join(columns)}")


def _row(where: str, row: Mapping[str, str | None], columns: Mapping[str, str]) -> ScalingRun:
    for name, text in row.items():
        if text is None and name in (*columns.values(), "scheme", "weight_bits", "activation_bits"):
            raise DataError(f"{where}: the line ends before {name}; complete it, or remove the line")
    numbers = {what: _positive(where, name, row[name]) for what, name in columns.items()}
    rate = row.get("learning_rate")
    return ScalingRun(
        parameters=round(numbers["parameters"]),
        tokens=round(numbers["tokens"]),
        format=_format_of_row(where, row),
        loss=numbers["loss"],
        source=where,
        rate=_positive(where, "learning_rate", rate) if rate else None,
    )


def _positive(where: str, column: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise DataError(f"{where}: {column} is {text!r}, not a positive number; correct it, or remove the line")
    return value


def _format_of_row(where: str, row: Mapping[str, str | None]) -> str:
    def cell(name: str, known: Mapping[str, str]) -> str:
        text = (row.get(name) or "").strip().lower()
        if text not in known:
            raise DataError(f"{where}: {name} is {text!r}; it is one of {', '.join(filter(None, known))}")
        return known[text]

    if row.get("scheme"):
        name = str(row["scheme"])
    else:
        weight, activation = (str(row.get(f"{which}_bits")) for which in ("weight", "activation"))
        if weight == activation == "16":
            return UNQUANTIZED
        name = f"w{weight}a{activation}" + cell("format", _GRIDS) + cell("sparsity", _SPARSITIES)
        name += cell("rotation", _ROTATIONS)
    try:
        return format_name(name)
    except ConfigError as error:
        raise DataError(f"{where}: {error}") from None


def format_name(scheme: str) -> str:
    """What a law calls a scheme: its canonical name, `bf16` for an unquantized one. Raises ConfigError."""
    name = str(Scheme.parse("none" if scheme.strip().lower() == UNQUANTIZED else scheme))
    return UNQUANTIZED if name == "none" else name


# --- run directories -----------------------------------------------------------------------------------------------


def _run_folders(folder: Path) -> list[Path]:
    """The folder itself if it is a run, else the runs of a comparison in it, or runs that lie directly in it."""
    from bitquest.training.runs import is_run

    if is_run(folder):
        return [folder]
    inside = folder / "runs" if (folder / "runs").is_dir() else folder
    runs = sorted(child for child in inside.iterdir() if child.is_dir() and is_run(child))
    if not runs:
        raise DataError(
            f"{folder}: neither a run directory nor a comparison: no config.toml in it, in its folders or in runs/"
        )
    return runs


def _read_folders(folders: Sequence[Path]) -> tuple[list[ScalingRun], list[str]]:
    runs, left_out = [], []
    tokenizers: dict[str, Path] = {}
    texts: dict[str, Path] = {}
    for folder in dict.fromkeys(folders):
        run, text = _read_folder(folder)
        if isinstance(run, str):
            left_out.append(f"{folder}: {run}")
            continue
        runs.append(run)
        texts.setdefault(text, folder)
        tokenizer = folder / "tokenizer.json"
        digest = hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.is_file() else ""
        tokenizers.setdefault(digest, folder)
    if len(tokenizers) > 1:
        one, other = list(tokenizers.values())[:2]
        raise DataError(
            f"{one} and {other} have different tokenizers: their losses per token do not compare. Fit them apart"
        )
    notes = [f"left out: {reason}" for reason in left_out]
    if len(texts) > 1:
        notes.append(
            f"the runs name different data ({', '.join(texts)}): their losses compare only on one held-out text"
        )
    return runs, notes


def _recipe_label(given: Mapping[str, Any]) -> str:
    """What differs from the paper's recipe, in a word for each key; "" for nothing."""
    named = [] if given["name"] == "quest" else [str(given["name"])]
    keys = [f"{key}={value}".replace(" ", "") for key, value in given.items() if key != "name"]
    return ",".join(named + keys)


def _read_folder(folder: Path) -> tuple[ScalingRun | str, str]:
    """A run and the data it names; or why it does not count."""
    from bitquest.evaluation.compare_runs import ended_above
    from bitquest.evaluation.runs import read_run
    from bitquest.training.config import load_config

    if (folder / "diverged.json").is_file():
        return "diverged", ""
    config, summary = load_config(folder / "config.toml"), read_run(folder)
    if not summary.finished or summary.val_loss is None or summary.validation_curve[-1].step != summary.steps:
        return f"step {summary.steps} of {summary.total_steps}, or no validation loss at its end", ""
    rise = ended_above([point.loss for point in summary.train_curve])
    if rise is not None:
        return f"unstable: the training loss ended {rise:.2f} nats above its own best", ""
    if config.model.init_from is not None:
        return "started from a checkpoint; the law is of training from scratch", ""
    shape = config.model.llama_config(1, config.data.context)
    recipe = _recipe_label(config.recipe.given())
    name = format_name(config.scheme)
    return ScalingRun(
        parameters=shape.non_embedding_parameters,
        tokens=config.train.steps * config.train.batch_size * config.data.context,
        format=f"{name}@{recipe}" if recipe else name,
        loss=summary.val_loss,
        source=str(folder),
        rate=config.optimizer.lr,
        seed=config.seed,
    ), config.data.path


def _best_rates(runs: Sequence[ScalingRun]) -> tuple[list[ScalingRun], int]:
    """Runs at their cell's best rate, and how many were dropped. Rows without a seed are one run each, and all stay."""
    cells: dict[tuple[str, int, int], dict[float | None, list[float]]] = {}
    for run in runs:
        if run.seed is not None:
            cells.setdefault(_cell(run), {}).setdefault(run.rate, []).append(run.loss)
    best = {}
    for cell, rates in cells.items():  # a comparison goes on with the best rate: that one has the most seeds
        best[cell] = min(rates, key=lambda rate: (-len(rates[rate]), statistics.fmean(rates[rate])))
    kept = [run for run in runs if run.seed is None or run.rate == best[_cell(run)]]
    return kept, len(runs) - len(kept)


def _cell(run: ScalingRun) -> tuple[str, int, int]:
    return run.format, run.parameters, run.tokens


def pooled(runs: Sequence[ScalingRun]) -> list[ScalingRun]:
    """One run per format, N and D: its loss is the mean over seeds. For charts."""
    groups: dict[tuple[str, int, int], list[ScalingRun]] = {}
    for run in runs:
        groups.setdefault(_cell(run), []).append(run)
    return [replace(group[0], loss=statistics.fmean(r.loss for r in group), seed=None) for group in groups.values()]

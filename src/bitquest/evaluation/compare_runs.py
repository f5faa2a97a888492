"""One run of a comparison: making it, and telling from its directory alone what has become of it.

    finished   its last checkpoint is of the last step
    unstable   finished, but the training loss ended far above its own best (`ended_above`)
    diverged   diverged.json is there: the loss or the gradient became infinite or NaN
    running    another process holds the directory's lock, which the system releases however that process ends
    waiting    none of these: not begun, or stopped between two checkpoints, from which it goes on

Nothing else is remembered, so a status survives whatever kills the processes.
"""

import fcntl
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bitquest.evaluation.compare_plan import Comparison, Run
from bitquest.files import write_text_atomic
from bitquest.training import DivergenceError, train
from bitquest.training.checkpoint import STATE, checkpoints_folder, list_steps
from bitquest.training.config import TrainConfig
from bitquest.training.loggers import Record, read_metrics
from bitquest.training.runs import LOCK, METRICS, check_same, is_run
from bitquest.training.trainer import Display

DIVERGED = "diverged.json"
Status = Literal["finished", "unstable", "diverged"]

# When a finished run counts as unstable; see `ended_above`.
_FEWEST_LOSSES, _LEAST_RISE, _SHARE_LOST = 20, 0.1, 0.1


@dataclass(frozen=True)
class RunResult:
    """What became of one run: losses in nats per token and bits per UTF-8 byte (None if it diverged).

    rate: the learning rate where rates were swept. seconds of training steps. run: its folder below the comparison's.
    message: why it counts as diverged or unstable.
    """

    arm: str
    scheme: str
    seed: int
    rate: float | None
    status: Status
    step: int
    val_loss: float | None
    bits_per_byte: float | None
    seconds: float
    run: str
    message: str | None = None

    @property
    def diverged(self) -> bool:
        """Whether it has no loss to speak of."""
        return self.status == "diverged"

    @property
    def key(self) -> Run:
        """Which run of the plan it is."""
        return Run(self.arm, self.seed, self.rate)


def make_run(
    config: TrainConfig,
    run_dir: Path,
    display: Display | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> None:
    """Train, or go on; a divergence is written down beside the run. Raises what `train` raises besides that."""
    try:
        train(config, run_dir, display=display, should_stop=should_stop)
    except DivergenceError as error:
        write_text_atomic(run_dir / DIVERGED, json.dumps({"message": str(error)}) + "\n")


def read_result(plan: Comparison, out: Path, run: Run) -> RunResult | None:
    """What a run came to; None while it is not over. Whether it is the plan's run is `check_run`'s to say."""
    folder, config = plan.folder(run), plan.config(run)
    path = out / folder
    if not is_run(path):
        return None
    losses = [record for record in _records(path) if record["kind"] == "train"]
    fields: dict[str, Any] = {
        "arm": run.arm, "scheme": config.scheme, "seed": run.seed, "rate": run.rate, "run": folder,
    }  # fmt: skip
    if (path / DIVERGED).is_file():
        message = json.loads((path / DIVERGED).read_text(encoding="utf-8"))["message"]
        return RunResult(
            **fields, status="diverged", step=losses[-1]["step"] if losses else 0, val_loss=None, bits_per_byte=None,
            seconds=losses[-1]["seconds"] if losses else 0.0, message=message,
        )  # fmt: skip
    steps = list_steps(path)
    if not steps or steps[-1] < config.train.steps:
        return None
    state = json.loads((checkpoints_folder(path) / f"step-{steps[-1]}" / STATE).read_text(encoding="utf-8"))
    rise = ended_above([record["loss"] for record in losses])
    return RunResult(
        **fields, status="finished" if rise is None else "unstable", step=steps[-1], val_loss=state["val_loss"],
        bits_per_byte=state["bits_per_byte"], seconds=state["seconds"],
        message=None if rise is None else f"the training loss ended {rise:.2f} nats above its own best",
    )  # fmt: skip


def check_run(plan: Comparison, out: Path, run: Run) -> None:
    """Raise ConfigError, naming the keys, if a run's directory holds a run of another configuration."""
    if is_run(out / plan.folder(run)):
        check_same(out / plan.folder(run), plan.config(run))


def _records(run_dir: Path) -> list[Record]:
    return read_metrics(run_dir / METRICS) if (run_dir / METRICS).is_file() else []


def ended_above(losses: Sequence[float]) -> float | None:
    """How far the training loss ended above its own best, in nats, if that is far; None if it is not.

    losses: as logged, in order. Of windows as long as a tenth of them, the last one's mean is compared with the best:
    the lowest mean, or the first loss if that is lower. Far is more than 0.1 nats and more than a tenth of all that was
    learned, from the first loss to the best. Fewer than 20 losses tell nothing.
    """
    if len(losses) < _FEWEST_LOSSES:
        return None
    width = len(losses) // 10
    means = [sum(losses[i : i + width]) / width for i in range(len(losses) - width + 1)]
    best = min(losses[0], *means)
    rise, learned = means[-1] - best, losses[0] - best
    return rise if rise > max(_LEAST_RISE, _SHARE_LOST * learned) else None


def is_held(run_dir: Path) -> bool:
    """Whether a process, be it one that was left over, trains in a run's directory."""
    if not (run_dir / LOCK).is_file():
        return False
    with (run_dir / LOCK).open("r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def latest_step(run_dir: Path) -> Record | None:
    """The last complete training record that a run has logged, without reading the whole file."""
    try:
        with (run_dir / METRICS).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 16384))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the first line of the piece may be cut
        if isinstance(record, dict) and record.get("kind") == "train":
            return record
    return None

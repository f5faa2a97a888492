"""Does training on integers learn what fake quantization learns? Loss curves of both from one seed, on real text.

The reference trains with the torch backend from several seeds; their spread is what chance does. The fused path trains
from the first of these seeds, on the same batches. It passes if the mean of its last losses is no further from the
reference of its own seed than the references are from each other. Whether it lies between their least and greatest mean
is told as well, but decides nothing: where the seed's own reference is one of these two, as it is two times in three, a
fused path that is right lies beyond it every other time.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitquest.errors import ConfigError
from bitquest.models import Llama, LlamaConfig
from bitquest.models.fuse import fuse_
from bitquest.nn import Scheme, quantize_
from bitquest.training.config import OptimizerSection, ScheduleSection, TrainSection
from bitquest.training.data import Tokens, open_tokens
from bitquest.training.optim import make_optimizer
from bitquest.training.schedule import learning_rate_share
from bitquest.training.step import Stepper, choose_device

OnRun = Callable[[str, float], None]  # a run's name and its mean of last losses

REFERENCE = "torch"


@dataclass(frozen=True)
class CurveSettings:
    """What is trained: a preset at a scheme, for so many steps of batch × context tokens. last: losses averaged."""

    preset: str = "10M"
    scheme: str = "w4a4"
    steps: int = 200
    batch: int = 32
    context: int = 512
    learning_rate: float = 2e-3
    seeds: int = 3
    last: int = 50
    device: str = "auto"
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.last > self.steps:
            raise ConfigError(f"the mean of {self.last} losses needs as many steps, not {self.steps}")
        if self.seeds < 2:
            raise ConfigError(f"a spread takes two or more reference seeds, not {self.seeds}")


def compare_curves(
    data: Path, settings: CurveSettings, backend: str = "auto", budget: float = 0.0, on_run: OnRun | None = None
) -> dict[str, Any]:
    """Train the fused path and the references on prepared tokens in the folder `data`; plain JSON values.

    budget: seconds, 0 for no limit; a run that would begin after it is left out, and then there is no verdict.
    """
    tokens, began = open_tokens(data), time.monotonic()
    curves: dict[str, list[float]] = {}
    runs = [("fused", backend, 0), *((f"reference, seed {s}", REFERENCE, s) for s in range(settings.seeds))]
    skipped = []
    for name, chosen, seed in runs:
        if budget and time.monotonic() - began > budget:
            skipped.append(name)
            continue
        curves[name] = losses(tokens, settings, chosen, seed)
        if on_run is not None:
            on_run(name, statistics.fmean(curves[name][-settings.last :]))
    return {"settings": vars(settings), "backend": backend, "skipped": skipped} | verdict(curves, settings)


def losses(tokens: Tokens, settings: CurveSettings, backend: str, seed: int) -> list[float]:
    """The loss before each step, in nats per token."""
    device = choose_device(settings.device)
    config = LlamaConfig.preset(settings.preset, vocab_size=tokens.vocab_size, max_position_embeddings=settings.context)
    model = Llama(config).init_weights(seed).to(device)
    quantize_(model, Scheme.parse(settings.scheme), backend=backend)
    if backend != REFERENCE:
        fuse_(model)
    optimizer = make_optimizer(model, OptimizerSection(lr=settings.learning_rate))
    section = TrainSection(steps=settings.steps, batch_size=settings.batch, precision=settings.precision)
    stepper = Stepper(model.train(), optimizer, section, 1.0, device)
    schedule, found = ScheduleSection(), []
    for step in range(settings.steps):
        windows = tokens.batch(seed, step, settings.batch, settings.context).to(device)
        share = learning_rate_share(schedule, step + 1, settings.steps)
        found.append(stepper.step(windows, settings.learning_rate * share).loss)
    return [float(loss) for loss in torch.stack(found).cpu()]


def verdict(curves: dict[str, Sequence[float]] | dict[str, list[float]], settings: CurveSettings) -> dict[str, Any]:
    """Means of the last losses, the references' spread, whether the fused path is within it (None: runs missing)."""
    means = {name: statistics.fmean(curve[-settings.last :]) for name, curve in curves.items()}
    references = [mean for name, mean in means.items() if name != "fused"]
    whole = "fused" in means and len(references) == settings.seeds
    fields: dict[str, Any] = {"means_of_last": means, "within_spread": None}
    if whole:
        low, high = min(references), max(references)
        fields |= {
            "reference_spread": [low, high],
            "fused_minus_reference": means["fused"] - means["reference, seed 0"],
            "within_spread": abs(means["fused"] - means["reference, seed 0"]) <= high - low,
            "between_references": low <= means["fused"] <= high,
        }
    return fields | {"curves": {name: [round(loss, 5) for loss in curve] for name, curve in curves.items()}}

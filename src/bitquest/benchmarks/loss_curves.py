"""Does training on integers learn what fake quantization learns? Loss curves of both, on real text.

Low-bit training is chaotic: a code that rounding flips in the first step changes every later one, and two runs of one
seed whose starting weights differ by a millionth end as far apart as two seeds do. One run of each path therefore says
nothing about a difference smaller than that. So both paths train from the first seed several times, each time from
weights nudged by a relative 1e-6, and what is told is the difference of their means with its interval (Welch); the
paths disagree if that interval lies on one side of zero. References from other seeds show what chance does besides.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitquest.errors import ConfigError
from bitquest.evaluation.student import difference_interval
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
NUDGE = 1e-6  # relative: about what float32 rounds
CONFIDENCE = 0.99  # one comparison in a hundred of equal paths says that they disagree


@dataclass(frozen=True)
class CurveSettings:
    """What is trained: a preset at a scheme, for so many steps of batch × context tokens.

    seeds: references of different seeds. repeats: runs of each path from the first seed, all but one nudged.
    last: losses averaged.
    """

    preset: str = "10M"
    scheme: str = "w4a4"
    steps: int = 200
    batch: int = 32
    context: int = 512
    learning_rate: float = 2e-3
    seeds: int = 3
    repeats: int = 4
    last: int = 50
    device: str = "auto"
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.last > self.steps:
            raise ConfigError(f"the mean of {self.last} losses needs as many steps, not {self.steps}")
        if self.seeds < 1:
            raise ConfigError(f"the reference takes a seed, not {self.seeds}")
        if self.repeats < 2:
            raise ConfigError(f"an interval takes two or more repeats of each path, not {self.repeats}")


def compare_curves(
    data: Path, settings: CurveSettings, backend: str = "auto", budget: float = 0.0, on_run: OnRun | None = None
) -> dict[str, Any]:
    """Train the fused path and the references on prepared tokens in the folder `data`; plain JSON values.

    budget: seconds, 0 for no limit; a run that would begin after it is left out, and then there is no verdict.
    """
    tokens, began = open_tokens(data), time.monotonic()
    curves: dict[str, list[float]] = {}
    skipped = []
    for name, chosen, seed, nudge in _runs(settings, backend):
        if budget and time.monotonic() - began > budget:
            skipped.append(name)
            continue
        curves[name] = losses(tokens, settings, chosen, seed, nudge)
        if on_run is not None:
            on_run(name, statistics.fmean(curves[name][-settings.last :]))
    return {"settings": vars(settings), "backend": backend, "skipped": skipped} | verdict(curves, settings)


def _runs(settings: CurveSettings, backend: str) -> list[tuple[str, str, int, int]]:
    """Name, backend, seed and nudge of every run, so ordered that a run left out costs least."""
    runs = [
        (f"{path}{f', nudge {nudge}' if nudge else ''}", chosen, 0, nudge)
        for nudge in range(settings.repeats)
        for path, chosen in (("fused", backend), ("reference", REFERENCE))
    ]
    return runs + [(f"reference, seed {seed}", REFERENCE, seed, 0) for seed in range(1, settings.seeds)]


def losses(tokens: Tokens, settings: CurveSettings, backend: str, seed: int, nudge: int = 0) -> list[float]:
    """The loss before each step, in nats per token. nudge: which small change of the starting weights, 0 for none."""
    device = choose_device(settings.device)
    config = LlamaConfig.preset(settings.preset, vocab_size=tokens.vocab_size, max_position_embeddings=settings.context)
    model = Llama(config).init_weights(seed)
    if nudge:
        _nudge(model, nudge)
    model = model.to(device)
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


@torch.no_grad()
def _nudge(model: torch.nn.Module, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        parameter.mul_(1 + NUDGE * torch.randn(parameter.shape, generator=generator))


def verdict(curves: Mapping[str, Sequence[float]], settings: CurveSettings) -> dict[str, Any]:
    """Means of the last losses, and whether the paths' means agree (None: too few runs to say).

    difference and interval: fused less reference over the repeats of the first seed, at CONFIDENCE.
    """
    means = {name: statistics.fmean(curve[-settings.last :]) for name, curve in curves.items()}
    fused = [mean for name, mean in means.items() if name.startswith("fused")]
    references = [mean for name, mean in means.items() if name.startswith("reference")]
    repeated = [mean for name, mean in means.items() if name.startswith("reference") and "seed" not in name]
    fields: dict[str, Any] = {"means_of_last": means, "agree": None}
    if min(len(fused), len(repeated)) >= 2:
        found = difference_interval(fused, repeated, CONFIDENCE)
        fields |= {
            "difference": found.estimate,
            "interval": [found.low, found.high],
            "confidence": CONFIDENCE,
            "agree": found.holds_zero,
            "fused_range": [min(fused), max(fused)],
            "reference_range": [min(references), max(references)],
        }
    return fields | {"curves": {name: [round(loss, 5) for loss in curve] for name, curve in curves.items()}}

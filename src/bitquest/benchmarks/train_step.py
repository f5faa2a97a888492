"""What quantization costs a training step: the same model at several schemes, side by side in one run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bitquest.benchmarks.gpu_check import LAYER_ERROR, relative_error
from bitquest.benchmarks.gpu_context import training_backend
from bitquest.benchmarks.timing import Timing, alternate, ratios
from bitquest.errors import ConfigError
from bitquest.models import Llama, LlamaConfig
from bitquest.models.config import swiglu_size
from bitquest.nn import QuantizedLinear, Scheme, quantize_
from bitquest.numerics import fake_quantize
from bitquest.ops.backend import Backend
from bitquest.training.config import OptimizerSection
from bitquest.training.optim import make_optimizer

_CHECKED_ROWS = 256  # one flipped code of so many rows is far below what is allowed

VOCABULARY = 257  # bytes and the end of a document

# What the project asks of itself, as multiples of the unquantized step (width 256, 4 blocks, 16×256 bytes, 2 cores).
TARGETS = {"w4a4": 1.35, "w1a1": 1.5}


@dataclass(frozen=True)
class StepShape:
    """Sizes of the measured training step; heads have 64 dimensions."""

    width: int = 256
    layers: int = 4
    batch: int = 16
    context: int = 256

    def model(self) -> LlamaConfig:
        heads = self.width // 64
        if self.width % 64 or heads < 1:
            raise ConfigError(f"--width must be a multiple of 64 (heads have 64 dimensions), not {self.width}")
        return LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.width,
            intermediate_size=swiglu_size(self.width),
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=self.context,
        )


@dataclass(frozen=True)
class StepComparison:
    """Timings of each scheme; ratios are against the first one."""

    shape: StepShape
    timings: dict[str, Timing]

    @property
    def baseline(self) -> str:
        return next(iter(self.timings))

    def to_json(self) -> dict[str, Any]:
        against = ratios(self.timings, self.baseline)
        rows = {}
        for name, timing in self.timings.items():
            rows[name] = {
                "median_seconds": timing.median,
                "minimum_seconds": timing.minimum,
                "repetitions": len(timing.seconds),
                "ratio_of_medians": against[name].median,
                "ratio_of_minima": against[name].minimum,
                "target": TARGETS.get(name) if self.shape == StepShape() and self.baseline == "none" else None,
            }
        return {"shape": vars(self.shape), "baseline": self.baseline, "schemes": rows}


def _training_step(model: nn.Module, shape: StepShape) -> Callable[[], float]:
    """One whole step in float32: forward, loss, backward, gradient clipping, AdamW."""
    optimizer = make_optimizer(model, OptimizerSection())
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, VOCABULARY, (shape.batch, shape.context + 1), generator=generator)

    def step() -> float:
        logits = model(ids_BT[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids_BT[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return step


def check_against_definition(model: nn.Module) -> None:
    """Refuse to time a layer that does not compute what numerics defines. Raises RuntimeError naming the layer.

    The torch backend computes it bit for bit; one that multiplies integers, but for rounding and a flipped code or two.
    """
    for fqn, layer in model.named_modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        x = torch.randn(_CHECKED_ROWS, layer.in_features, generator=torch.Generator().manual_seed(1))
        operands = []
        for tensor, quantizer in ((x, layer.activation_quantizer.spec), (layer.weight, layer.weight_quantizer.spec)):
            if quantizer is None:
                operands.append(layer.rotation.apply(tensor))
            else:
                operands.append(fake_quantize(tensor, quantizer, layer.rotation))
        expected = F.linear(operands[0], operands[1], layer.bias)
        exact = training_backend(layer) == Backend.TORCH
        allowed = 0.0 if exact else LAYER_ERROR
        if not relative_error(layer(x), expected) <= allowed:
            raise RuntimeError(f"{fqn} disagrees with the definition of its scheme: no timing of it means anything")


def compare_train_step(
    schemes: list[str],
    shape: StepShape | None = None,
    repetitions: int = 10,
    progress: Callable[[], None] | None = None,
) -> StepComparison:
    """Time a training step of each scheme, taking turns; the first scheme is the baseline.

    Raises RuntimeError, instead of reporting, if a layer disagrees with the definition or a loss is not finite.
    """
    shape = shape or StepShape()
    losses: dict[str, float] = {}
    candidates: dict[str, Callable[[], object]] = {}
    for name in schemes:
        model = quantize_(Llama(shape.model()).init_weights(0), Scheme.parse(name))
        check_against_definition(model)
        candidates[name] = _remember(losses, name, _training_step(model, shape))
    timings = alternate(candidates, repetitions, progress=progress)
    bad = [name for name, loss in losses.items() if not torch.tensor(loss).isfinite()]
    if bad:
        raise RuntimeError(f"the loss of {bad[0]} is {losses[bad[0]]}: a step that diverges has no speed")
    return StepComparison(shape, timings)


def _remember(losses: dict[str, float], name: str, step: Callable[[], float]) -> Callable[[], object]:
    def run() -> None:
        losses[name] = step()

    return run

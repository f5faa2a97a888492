"""The parts of a recipe at work: hooks around each step, what checkpoints keep of them, and the model they publish.

A run trains a model, and publishes one: what is evaluated, saved as model.safetensors and exported. Without a recipe
both are the same weights. With averaging the published weights are the averaged ones, and learned row gains are folded
into them, so that a published model is always made of plain quantized layers and packs as ever. What training goes on
with is then in optimizer.safetensors, under `recipe.weight.<name>`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bitquest.errors import CheckpointError
from bitquest.training.config import TrainConfig
from bitquest.training.optim import make_optimizer
from bitquest.training.recipe_average import Average
from bitquest.training.recipe_cage import Cage
from bitquest.training.recipe_freeze import Freeze
from bitquest.training.recipe_gain import RowGain, is_gain
from bitquest.training.recipe_part import Part
from bitquest.training.recipe_rows import RowNorm, fill_residual_norms_, scale_residual_init_
from bitquest.training.recipe_widths import QuantizerSchedule

_WEIGHT = "recipe.weight."


class Recipe:
    """A run's optimizer and the parts of its recipe. Made from a model on its device, before the first step.

    is_new: the model's weights are new, and the recipe may set how they begin.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, is_new: bool = True) -> None:
        section, self.model, self.steps = config.recipe, model, config.train.steps
        if is_new and section.residual_init != 1.0:
            scale_residual_init_(model, section.residual_init)
        if is_new and section.residual_norm_init != 1.0:
            fill_residual_norms_(model, section.residual_norm_init)
        gain = RowGain(model) if section.row_gain else None  # its parameters are the optimizer's too
        self.optimizer = make_optimizer(model, config.optimizer, section)
        self.decay_until = section.decay_until
        parts: list[Part | None] = [
            QuantizerSchedule(model, config) if section.changes_quantizers else None,
            Cage(model, self.optimizer, section, self.steps) if section.cage else None,
            Freeze(model, section, self.steps) if section.freeze else None,
            RowNorm(model) if section.row_norm else None,
            Average(model, section, self.steps) if section.average_from < 1 else None,
            gain,
        ]
        self.parts = [part for part in parts if part is not None]

    def before_step(self, step: int) -> None:
        """To call before step 1 … steps is computed."""
        if step > self.decay_until * self.steps:
            for group in self.optimizer.param_groups:
                group["weight_decay"] = 0.0
        for part in self.parts:
            part.before_step(step)

    def before_update(self, step: int, lr: float) -> None:
        """To call when the gradients of a step are there and the weights are still what they were computed at."""
        for part in self.parts:
            part.before_update(step, lr)

    def after_step(self, step: int) -> None:
        """To call after the optimizer's step."""
        for part in self.parts:
            part.after_step(step)

    @contextmanager
    def published(self) -> Iterator[dict[str, Tensor]]:
        """The model as it is evaluated and saved: its state under the names of a plain model; undone at the end."""
        undo: list[Callable[[], None]] = []
        try:
            for part in self.parts:
                undo.append(part.publish())
            yield {name: tensor for name, tensor in self.model.state_dict().items() if not is_gain(name)}
        finally:
            for put_back in reversed(undo):
                put_back()

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the published model and the optimizer's state."""
        tensors = {name: tensor for part in self.parts for name, tensor in part.tensors().items()}
        if any(part.publishes for part in self.parts):
            tensors |= {_WEIGHT + name: p.detach().clone() for name, p in self.model.named_parameters()}
        return tensors

    def load(self, saved: Mapping[str, Tensor], where: str) -> None:
        """Go on from `tensors()`. Raises CheckpointError naming what is missing."""
        try:
            for part in self.parts:
                part.load(saved)
            if any(part.publishes for part in self.parts):
                with torch.no_grad():
                    for name, parameter in self.model.named_parameters():
                        parameter.copy_(saved[_WEIGHT + name])
        except KeyError as error:
            raise CheckpointError(f"{where}: {error.args[0]} is missing") from None

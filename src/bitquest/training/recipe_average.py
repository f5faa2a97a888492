"""Averaged weights: the published model is the mean of the weights of the last steps, quantized anew.

Weights that hover around a threshold change their code with almost every step; their mean says on which side they
live. Averaging along one run: Izmailov et al., arXiv 1803.05407 (mean); Polyak and Juditsky 1992 (exponential).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bitquest.training.recipe_config import RecipeSection
from bitquest.training.recipe_part import Part

_NAME = "recipe.average."


class Average(Part):
    """The mean over the steps after `average_from`, or an exponential average that begins there."""

    publishes = True

    def __init__(self, model: nn.Module, section: RecipeSection, steps: int) -> None:
        self.model, self.decay = model, section.average_decay
        self.first = min(steps, int(section.average_from * steps) + 1)
        self.average: dict[str, Tensor] = {}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if step < self.first:
            return
        count = step - self.first + 1
        share = 1 / count if not self.decay else (1 - self.decay) / (1 - self.decay**count)
        for name, parameter in self.model.named_parameters():
            if count == 1:
                self.average[name] = parameter.detach().clone()
            else:
                self.average[name].lerp_(parameter, share)

    @torch.no_grad()
    def publish(self) -> Callable[[], None]:
        parameters = dict(self.model.named_parameters())
        before = {name: parameters[name].detach().clone() for name in self.average}
        for name, tensor in self.average.items():
            parameters[name].copy_(tensor)

        @torch.no_grad()
        def put_back() -> None:
            for name, tensor in before.items():
                parameters[name].copy_(tensor)

        return put_back

    def tensors(self) -> dict[str, Tensor]:
        return {_NAME + name: tensor for name, tensor in self.average.items()}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        if any(name.startswith(_NAME) for name in saved):
            self.average = {
                name: saved[_NAME + name].clone().to(parameter.device)
                for name, parameter in self.model.named_parameters()
            }

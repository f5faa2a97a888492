"""Freezing weights whose code oscillates. Nagel et al., arXiv 2203.11086, Algorithm 1, in rotated space.

A code oscillates in a step when it changes in the direction opposite to its last change. Its rate is followed by
f ← m·o + (1 − m)·f, and the code itself by an average of the same kind. A weight with f above the threshold is fixed
for the rest of the run at the level its averaged code is nearest to. The paper's dampening, the other remedy, pulls a
weight towards its level as CAGE does (recipe_cage.py).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bitquest.nn import QuantizedLinear
from bitquest.training.recipe_config import RecipeSection
from bitquest.training.recipe_part import Part, block_layers

_NAME = "recipe.freeze."
_STATE = ("codes", "direction", "rate", "mean", "frozen", "value")


class _Tracked:
    """One weight (N, K): its codes (int8), their last direction (int8), rate, mean code, and what is frozen where."""

    def __init__(self, layer: QuantizedLinear) -> None:
        self.layer = layer
        codes = self._encoded()[0]
        self.state = {
            "codes": codes,
            "direction": torch.zeros_like(codes),
            "rate": torch.zeros(codes.shape, device=codes.device),
            "mean": codes.float(),
            "frozen": torch.zeros(codes.shape, dtype=torch.bool, device=codes.device),
            "value": torch.zeros(codes.shape, device=codes.device),  # in rotated space, where frozen
        }

    def _encoded(self) -> tuple[Tensor, Tensor]:
        encoded = self.layer.encode_weight()
        assert encoded is not None
        return encoded.codes, encoded.step

    def follow(self, momentum: float, threshold: float) -> None:
        """Take note of a step, freeze what oscillates too often, and hold what is frozen."""
        state = self.state
        codes, step = self._encoded()
        change = (codes.to(torch.int16) - state["codes"]).sign().to(torch.int8)
        oscillates = change * state["direction"] < 0
        state["direction"] = torch.where(change != 0, change, state["direction"])
        state["rate"].lerp_(oscillates.float(), momentum)
        state["mean"].lerp_(codes.float(), momentum)
        fresh = (state["rate"] > threshold) & ~state["frozen"]
        spec = self.layer.weight_quantizer.spec
        assert spec is not None
        groups = step.repeat_interleave(codes.shape[1] // step.shape[1], 1) if step.shape[1] > 1 else step
        level = spec.grid.decode(state["mean"].round().to(torch.int8)) * groups
        state["value"] = torch.where(fresh, level, state["value"])
        state["frozen"] |= fresh
        if bool(state["frozen"].any()):
            rotated = self.layer.rotation.apply(self.layer.weight)
            held = torch.where(state["frozen"], state["value"], rotated)
            self.layer.weight.copy_(self.layer.rotation.inverse(held))
        state["codes"] = torch.where(state["frozen"], state["mean"].round().to(torch.int8), codes)


class Freeze(Part):
    """Follows and freezes the codes of every dense quantized weight, from a share of the run on."""

    def __init__(self, model: nn.Module, section: RecipeSection, steps: int) -> None:
        self.layers = {n: x for n, x in block_layers(model).items() if x.weight_quantizer.spec is not None}
        self.momentum, self.threshold = section.freeze_momentum, section.freeze
        self.first = int(section.freeze_from * steps) + 1
        self.tracked: dict[str, _Tracked] = {}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if step < self.first:
            return
        if not self.tracked:
            self.tracked = {name: _Tracked(layer) for name, layer in self.layers.items()}
        for tracked in self.tracked.values():
            tracked.follow(self.momentum, self.threshold)

    def tensors(self) -> dict[str, Tensor]:
        return {f"{_NAME}{name}.{key}": t.state[key] for name, t in self.tracked.items() for key in _STATE}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        if not any(name.startswith(_NAME) for name in saved):
            return
        for name, layer in self.layers.items():
            tracked = self.tracked[name] = _Tracked(layer)
            device = layer.weight.device
            tracked.state = {key: saved[f"{_NAME}{name}.{key}"].clone().to(device) for key in _STATE}

"""CAGE: pull the weights towards what they are rounded to, late in the run. Tabesh et al., arXiv 2510.18784.

With e = w − Q(w), the weight's quantization error in its own space, the decoupled form adds to AdamW's update

    w ← w − η·u − η·λ_t·e,        λ_t = 0 up to a share s of the run, then λ·(t/T − s)/(1 − s),

as decoupled weight decay adds −η·λ·w. The authors take λ = 10 and s = 0.8. Here the layer rounds in rotated space, so
e = (wH − Q(wH))Hᵀ. The pull is applied at the weights that the gradient was computed at, before the optimizer's step.
"""

import torch
from torch import Tensor, nn

from bitquest.nn import QuantizedLinear
from bitquest.training.optim import AnyOptimizer
from bitquest.training.recipe_config import RecipeSection
from bitquest.training.recipe_part import Part, block_layers


def cage_strength(section: RecipeSection, step: int, steps: int) -> float:
    """λ_t at a step."""
    progress = step / steps
    return section.cage * max(0.0, (progress - section.cage_from) / (1 - section.cage_from))


@torch.no_grad()
def quantization_error(layer: QuantizedLinear) -> Tensor:
    """w − Q(w) of a layer's weight (N, K), in the space of w, float32."""
    return layer.weight.float() - layer.rotation.inverse(layer.quantized_weight())


class Cage(Part):
    """Pulls the weight of every layer whose weight is quantized, at the learning rate of its group."""

    def __init__(self, model: nn.Module, optimizer: AnyOptimizer, section: RecipeSection, steps: int) -> None:
        self.layers = [layer for layer in block_layers(model).values() if layer.weight_quantizer.spec is not None]
        self.section, self.steps = section, steps
        self._scale = {id(p): g.get("lr_scale", 1.0) for g in optimizer.param_groups for p in g["params"]}

    @torch.no_grad()
    def before_update(self, step: int, lr: float) -> None:
        strength = cage_strength(self.section, step, self.steps)
        if strength:
            for layer in self.layers:
                scale = self._scale[id(layer.weight)]
                layer.weight.add_(quantization_error(layer).to(layer.weight.dtype), alpha=-lr * scale * strength)

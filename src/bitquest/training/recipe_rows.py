"""How large weights are: rows kept at the norm they began with, and small beginnings where a block joins the stream."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bitquest.nn import QuantizedLinear
from bitquest.nn.convert import is_head
from bitquest.training.recipe_part import Part

_NAME = "recipe.row_norm."


@torch.no_grad()
def scale_residual_init_(model: nn.Module, factor: float) -> None:
    """Multiply the weights of o_proj and down_proj, the layers whose output is added to the stream, in place."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in ("o_proj", "down_proj"):
            layer.weight.mul_(factor)
            if isinstance(layer, QuantizedLinear) and layer.weight_quantizer.step is not None:
                layer.weight_quantizer.step.mul_(factor)


@torch.no_grad()
def fill_residual_norms_(model: nn.Module, value: float) -> None:
    """Set the weights of the norms before o_proj and down_proj, in place: how strongly a block begins to speak.

    With a weight of 1 a norm makes a block's first outputs as large as its inputs, far larger than embeddings of
    σ = 0.02. Small factors on residual branches that training raises: LayerScale, Touvron et al., arXiv 2103.17239.
    """
    for name, norm in model.named_modules():
        if name.rpartition(".")[2] in ("o_norm", "down_norm"):
            norm.get_parameter("weight").fill_(value)


class RowNorm(Part):
    """Rescales every row of the blocks' matrices, after each step, to its norm at the start.

    Codes do not depend on a row's norm. What the norm does is set how far a step of the optimizer moves the direction:
    rows that grow turn ever more slowly. Held norms leave that to the learning rate's schedule alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.weights = {
            name: layer.weight
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and not is_head(name)
        }
        self.norms = {name: w.detach().norm(dim=1, keepdim=True) for name, w in self.weights.items()}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for name, w in self.weights.items():
            w.mul_(self.norms[name] / w.norm(dim=1, keepdim=True).clamp_min(1e-12))

    def tensors(self) -> dict[str, Tensor]:
        return {_NAME + name: norms for name, norms in self.norms.items()}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        self.norms = {name: saved[_NAME + name].clone().to(w.device) for name, w in self.weights.items()}

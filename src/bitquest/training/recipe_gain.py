"""A learned gain per output row: y = g ⊙ (Q(xH) Q(WH)ᵀ + b), which packs as ever because g·Q(W) = Q(g·W) row by row.

A row's step is α·rms(w), and rms is a constant to autograd: nothing but the drift of single weights moves the scale of
a row, and the gradients of those beyond the clip ratio are masked. A gain has the exact gradient of that scale. It is
a parameter of the layer while training; the published weight is g ⊙ W.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitquest.errors import ConfigError
from bitquest.nn import QuantizedLinear
from bitquest.nn.convert import is_head
from bitquest.numerics.scaling import PerTensor, PowerOfTwo, TwoLevel
from bitquest.training.recipe_part import Part

GAIN = "row_gain"


def is_gain(name: str) -> bool:
    """Whether a parameter of this name is a gain."""
    return name.rpartition(".")[2] == GAIN


def _times_gain(layer: nn.Module, _: Any, output: Tensor) -> Tensor:
    gain: Tensor = layer.get_parameter(GAIN)
    return output * gain.to(output.dtype)


class RowGain(Part):
    """Gains, all 1 at first, on every linear layer but the head. Raises ConfigError for scales that no gain folds into.

    A per-tensor, learned or rounded weight step (MXFP4's, NVFP4's) does not follow a factor on one row.
    """

    publishes = True

    def __init__(self, model: nn.Module) -> None:
        self.layers = [
            layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and not is_head(name)
        ]
        for layer in self.layers:
            spec = layer.weight_quantizer.spec if isinstance(layer, QuantizedLinear) else None
            rounded = spec is not None and isinstance(spec.scale, PowerOfTwo | TwoLevel)
            if spec is not None and (spec.is_learned or rounded or isinstance(spec.granularity, PerTensor)):
                raise ConfigError(
                    "recipe.row_gain needs weight steps that are computed row by row; this scheme's are learned, "
                    "rounded themselves, or one for the whole matrix: set recipe.row_gain to false"
                )
            layer.register_parameter(GAIN, nn.Parameter(torch.ones(layer.out_features, device=layer.weight.device)))
            layer.register_forward_hook(_times_gain)

    @torch.no_grad()
    def publish(self) -> Callable[[], None]:
        before = []
        for layer in self.layers:
            gain = layer.get_parameter(GAIN)
            folded = [p for p in (layer.weight, layer.bias) if p is not None]
            before.append((gain, gain.clone(), [(p, p.clone()) for p in folded]))
            for parameter in folded:
                parameter.mul_(gain.view(-1, *[1] * (parameter.dim() - 1)))
            gain.fill_(1.0)

        @torch.no_grad()
        def put_back() -> None:
            for gain, value, folded in before:
                gain.copy_(value)
                for parameter, tensor in folded:
                    parameter.copy_(tensor)

        return put_back

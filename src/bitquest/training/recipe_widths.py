"""Quantizers that change during the run: widths by steps, and the clip ratio of the gradient's mask by lines.

Widths that fall to the scheme's, such as activations of 8, then 4, then 1 bit while the weights have theirs from the
start: arXiv 2509.22935 and the staged training before it. The model that is saved has the scheme's quantizers.
"""

import dataclasses
from collections.abc import Callable
from itertools import pairwise

from torch import nn

from bitquest.nn.scheme import default_estimator
from bitquest.numerics.estimators import Clip
from bitquest.numerics.grids import UniformGrid
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import Rotation
from bitquest.training.config import TrainConfig
from bitquest.training.recipe_part import Part, block_layers
from bitquest.training.settings import Points


def width_at(points: Points, share: float) -> int | None:
    """The width in force at a share of the run, that of the last point not after it; None without points."""
    widths = [bits for start, bits in points if start <= share]
    return int(widths[-1]) if widths else None


def ratio_at(points: Points, share: float) -> float | None:
    """The ratio at a share of the run, on lines between the points, to two decimals; None without points."""
    if not points:
        return None
    for (x0, y0), (x1, y1) in pairwise(points):
        if share <= x1:
            return round(y0 + (y1 - y0) * (share - x0) / (x1 - x0), 2)
    return round(points[-1][1], 2)


def changed(spec: Quantizer, bits: int | None, ratio: float | None, rotation: Rotation) -> Quantizer | None:
    """A quantizer with a greater width (16: none) and another clip ratio; None leaves that as it is.

    An estimator that is the usual one of its width becomes the usual one of the other width.
    """
    if bits == 16:
        return None
    if bits is not None and bits > spec.bits:
        grid = UniformGrid(bits)
        usual = spec.estimator == default_estimator(spec.grid, rotation)
        estimator = default_estimator(grid, rotation) if usual else spec.estimator
        spec = dataclasses.replace(spec, grid=grid, estimator=estimator)
    return spec if ratio is None else dataclasses.replace(spec, estimator=Clip(ratio))


class QuantizerSchedule(Part):
    """Gives the layers of the blocks the quantizers of each step."""

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.section, self.steps = config.recipe, config.train.steps
        self.layers = [
            (layer, layer.weight_quantizer.spec, layer.activation_quantizer.spec)
            for layer in block_layers(model).values()
        ]
        self._now: tuple[int | None, int | None, float | None, float | None] | None = None

    def before_step(self, step: int) -> None:
        section, share = self.section, (step - 1) / self.steps
        now = (
            width_at(section.weight_bits, share),
            width_at(section.activation_bits, share),
            ratio_at(section.weight_clip, share),
            ratio_at(section.activation_clip, share),
        )
        if now != self._now:
            self._now = now
            self._apply(*now)

    def publish(self) -> Callable[[], None]:
        """Evaluate and save with the scheme's quantizers, whatever the step trains with."""
        now = self._now
        if now is None:
            return lambda: None
        self._apply(None, None, None, None)
        return lambda: self._apply(*now)

    def _apply(self, w_bits: int | None, a_bits: int | None, w_ratio: float | None, a_ratio: float | None) -> None:
        for layer, weight, activation in self.layers:
            layer.requantize(
                weight=weight and changed(weight, w_bits, w_ratio, layer.rotation),
                activation=activation and changed(activation, a_bits, a_ratio, layer.rotation),
            )

"""What a part of a recipe may do, and the layers it acts on."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from bitquest.nn import QuantizedLinear
from bitquest.nn.convert import is_head


class Part:
    """Hooks around a step, all of them empty here; steps count from 1.

    A part's state is a function of the step and of what `tensors` gives, so that a run goes on bit by bit.
    publishes: whether the published model differs from the one in training (recipe.py).
    """

    publishes = False

    def before_step(self, step: int) -> None:
        """Before the forward passes of a step."""

    def before_update(self, step: int, lr: float) -> None:
        """With the gradients computed and clipped, before the optimizer moves the weights."""

    def after_step(self, step: int) -> None:
        """After the optimizer moved the weights."""

    def publish(self) -> Callable[[], None]:
        """Turn the model into the one that is evaluated and saved; the result undoes that."""
        return lambda: None

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by full name."""
        return {}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave. Raises KeyError for what is missing."""


def block_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantized linear layers but the head, by name."""
    return {
        name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear) and not is_head(name)
    }

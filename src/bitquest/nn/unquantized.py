"""The unquantized twin of a model in training: the same float parameters, multiplied as they are."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from bitquest.errors import ConfigError
from bitquest.nn.embedding import PackedEmbedding, QuantizedEmbedding
from bitquest.nn.linear import QuantizedLinear
from bitquest.nn.packed_linear import PackedLinear


@contextmanager
def unquantized(model: nn.Module) -> Iterator[None]:
    """Run every QuantizedLinear and QuantizedEmbedding of a model without quantization inside: y = x Wᵀ + b.

    Neither operand is rounded or rotated, on whichever backend the layer trains; gradients are those of the plain
    layer. The parameters are the model's own and nothing is copied, so a change of a weight shows in both. Layers that
    were switched off before stay so afterwards. A model without quantized layers is its own twin.

    Raises ConfigError for a packed layer, which has no float weight. Not for several threads on one model.
    """
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            raise ConfigError(
                f"{name or 'the module'} is packed: it holds codes and no float weight that could run unquantized. "
                "Take the run it was packed from (bitquest.training.load_run)"
            )
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear | QuantizedEmbedding)]
    before = [layer.quantizes for layer in layers]
    try:
        for layer in layers:
            layer.quantizes = False
        yield
    finally:
        for layer, quantized in zip(layers, before, strict=True):
            layer.quantizes = quantized

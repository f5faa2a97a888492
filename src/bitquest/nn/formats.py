"""Number formats that a scheme names: a grid, and where a standard fixes them, its blocks and their scales.

How gradients pass is no part of a format; the scheme adds it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from bitquest.numerics.grids import FP4, FP8, TERNARY, lloyd_max_grid
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.scaling import AbsMax, PerGroup, PerRow, PowerOfTwo, TwoLevel


@dataclass(frozen=True)
class Format:
    """The quantizer of a weight and of an activation, from the bits of the scheme's width.

    in_blocks: the block and its scale belong to the format, so that neither a group size nor a method that learns or
    computes another scale can be named beside it.
    """

    weight: Callable[[int], Quantizer]
    activation: Callable[[int], Quantizer]
    in_blocks: bool = False


def _both(make: Callable[[int], Quantizer], in_blocks: bool = False) -> Format:
    return Format(make, make, in_blocks)


# NVFP4's float32 scale covers a tensor. An activation's covers one token: over the tensor a token would see later ones.
_NVFP4_WEIGHT = Quantizer(FP4, PerGroup(16), TwoLevel("tensor"))
_NVFP4_ACTIVATION = Quantizer(FP4, PerGroup(16), TwoLevel("row"))

FORMATS: dict[str, Format] = {
    "fp4": _both(lambda _: Quantizer(FP4)),
    "ternary": _both(lambda _: Quantizer(TERNARY)),
    "fp8": _both(lambda _: Quantizer(FP8, PerRow(), AbsMax())),
    "mxfp4": _both(lambda _: Quantizer(FP4, PerGroup(32), PowerOfTwo()), in_blocks=True),
    "nvfp4": Format(lambda _: _NVFP4_WEIGHT, lambda _: _NVFP4_ACTIVATION, in_blocks=True),
    "lloyd": _both(lambda bits: Quantizer(lloyd_max_grid(bits))),
}

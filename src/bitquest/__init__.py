"""BitQuEST: train Llama-type language models with 1- to 8-bit weights and activations, and run exactly those bits.

The public names, loaded when first used, so that `bitquest --help` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bitquest.export import load as load
    from bitquest.export import save as save
    from bitquest.nn import Scheme as Scheme
    from bitquest.nn import pack_ as pack_
    from bitquest.nn import quantize_ as quantize_
    from bitquest.numerics import FP4 as FP4
    from bitquest.numerics import TERNARY as TERNARY
    from bitquest.numerics import AbsMax as AbsMax
    from bitquest.numerics import AbsMean as AbsMean
    from bitquest.numerics import BlockHadamard as BlockHadamard
    from bitquest.numerics import Clip as Clip
    from bitquest.numerics import CodebookGrid as CodebookGrid
    from bitquest.numerics import Dense as Dense
    from bitquest.numerics import GaussianMSE as GaussianMSE
    from bitquest.numerics import Learned as Learned
    from bitquest.numerics import NofM as NofM
    from bitquest.numerics import NoRotation as NoRotation
    from bitquest.numerics import PerGroup as PerGroup
    from bitquest.numerics import PerRow as PerRow
    from bitquest.numerics import PerTensor as PerTensor
    from bitquest.numerics import Quantizer as Quantizer
    from bitquest.numerics import StraightThrough as StraightThrough
    from bitquest.numerics import Trust as Trust
    from bitquest.numerics import UniformGrid as UniformGrid
    from bitquest.numerics import dequantize as dequantize
    from bitquest.numerics import pack as pack
    from bitquest.numerics import quantize as quantize
    from bitquest.numerics import unpack as unpack
    from bitquest.ops import fake_quantize as fake_quantize

__version__ = "0.1.0"

_ROOMS = {
    "bitquest.numerics": (
        *("UniformGrid", "CodebookGrid", "TERNARY", "FP4", "PerTensor", "PerRow", "PerGroup"),
        *("GaussianMSE", "AbsMax", "AbsMean", "Learned", "NoRotation", "BlockHadamard"),
        *("StraightThrough", "Clip", "Trust", "Dense", "NofM", "Quantizer"),
        *("quantize", "dequantize", "pack", "unpack"),
    ),
    "bitquest.ops": ("fake_quantize",),
    "bitquest.nn": ("Scheme", "quantize_", "pack_"),
    "bitquest.export": ("save", "load"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = ["__version__", *sorted(_ROOM_OF)]


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'bitquest' has no attribute {name!r}")
    value = getattr(importlib.import_module(_ROOM_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOM_OF})

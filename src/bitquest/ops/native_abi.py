"""The C interface of the native engine, csrc/include/bitquest.h, as ctypes sees it: structures, and how it is found."""

import ctypes
import os
import warnings
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

from bitquest.ops.native_sources import source_hash

ABI_VERSION = 2
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
SCALE_GAUSSIAN, SCALE_ABSMAX, SCALE_ABSMEAN, SCALE_GIVEN = 0, 1, 2, 3
MASK_RANGE, MASK_DISTANCE = 0, 1
PROLOGUE_RMSNORM, PROLOGUE_SWIGLU = 1, 2
UNSUPPORTED = 2  # an error code: the caller takes another way
FLOAT_INPUT = 16  # bq_weight.x_bits of a weight that multiplies floats


class CQuantizer(Structure):
    _fields_ = [
        ("bits", c_int32),
        ("levels", c_int32),
        ("level", c_void_p),
        ("middle", c_void_p),
        ("integer", c_void_p),
        ("block", c_int32),
        ("scale", c_int32),
        ("group", c_int64),
        ("multiplier", c_float),
        ("epsilon", c_float),
        ("max_level", c_float),
        ("mask", c_int32),
        ("mask_low", c_float),
        ("mask_high", c_float),
    ]


class CPrologue(Structure):
    _fields_ = [
        ("kind", c_int32),
        ("epsilon", c_float),
        ("weight", c_void_p),
        ("up", c_void_p),
        ("up_stride", c_int64),
    ]


class CRows(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("x_dtype", c_int32),
        ("threads", c_int32),
        ("rows", c_int64),
        ("width", c_int64),
        ("prologue", c_void_p),
        ("given_step", c_void_p),
        ("given_stride", c_int64),
        ("factors", c_void_p),
        ("packed", c_void_p),
        ("mask", c_void_p),
        ("sums", c_void_p),
        ("step", c_void_p),
    ]


class CForm(Structure):
    _fields_ = [("unit", c_float), ("factor", c_int32), ("offset", c_int32)]


class CWeight(Structure):
    _fields_ = [
        ("channels", c_int64),
        ("width", c_int64),
        ("groups", c_int64),
        ("bits", c_int32),
        ("x_bits", c_int32),
        ("x_uniform", c_int32),
        ("sparse", c_int32),
        ("form", CForm),
        ("packed", c_void_p),
        ("factors", c_void_p),
        ("integer", c_void_p),
        ("kept", c_void_p),
        ("step", c_void_p),
    ]


class CActivation(Structure):
    _fields_ = [
        ("rows", c_int64),
        ("width", c_int64),
        ("factors", c_void_p),
        ("packed", c_void_p),
        ("sums", c_void_p),
        ("values", c_void_p),
        ("values_stride", c_int64),
        ("step", c_void_p),
        ("groups", c_int64),
        ("form", CForm),
    ]


class COutput(Structure):
    _fields_ = [
        ("out", c_void_p),
        ("channels", c_int64),
        ("stride", c_int64),
        ("dtype", c_int32),
        ("threads", c_int32),
        ("bias", c_void_p),
    ]


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "bq_version": (c_int32, []),
    "bq_source_hash": (c_char_p, []),
    "bq_isa": (c_char_p, []),
    "bq_isa_available": (c_char_p, []),
    "bq_message": (c_char_p, [c_int32]),
    "bq_set_threads": (c_int32, [c_int32]),
    "bq_quantize_rows": (c_int32, [POINTER(CQuantizer), POINTER(CRows)]),
    "bq_rotate_rows": (
        c_int32,
        [c_void_p, c_int64, c_int32, c_int64, c_int64, c_int32, POINTER(CPrologue), c_void_p, c_int32, c_int32],
    ),
    "bq_mask_rotate": (
        c_int32,
        [c_void_p, c_int64, c_int32, c_void_p, c_int64, c_int64, c_int32, c_void_p, c_int32, c_int32],
    ),
    "bq_dequantize_rows": (
        c_int32,
        [c_void_p, c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int32, c_int32],
    ),
    "bq_weight_bytes": (c_int32, [POINTER(CWeight), POINTER(c_int64)]),
    "bq_prepare_weight": (c_int32, [POINTER(CWeight), c_void_p, c_int32]),
    "bq_linear": (c_int32, [c_void_p, c_int64, POINTER(CActivation), POINTER(COutput)]),
    "bq_quantized_linear": (
        c_int32,
        [
            *(POINTER(CQuantizer), POINTER(CRows), POINTER(CForm), c_int32),
            *(POINTER(c_void_p), POINTER(c_int64), POINTER(COutput)),
        ],
    ),
    "bq_product": (c_int32, [c_void_p, c_int64, POINTER(CActivation), c_void_p, c_int64, c_int32]),
}

LIBRARY = Path(__file__).parent / "libbitquest.so.1"
CHECKOUT = Path(__file__).parents[3]  # of an editable installation; elsewhere it has no csrc/


@cache
def stale_of(library: ctypes.CDLL) -> str | None:
    """What is wrong if a library was not compiled from the sources beside the package; None: nothing is.

    An installed package has no sources beside it, and nothing to compare.
    """
    sources = source_hash(CHECKOUT)
    if sources is None or library.bq_source_hash().decode() == sources:
        return None
    return f"the compiled engine is not of the sources in {CHECKOUT / 'csrc'}: run make native"


@cache
def open_library() -> tuple[ctypes.CDLL | None, str]:
    """The library, and "" or why it is not there. Asked once per process, which then warns of a stale one."""
    found, reason = _load()
    if found is not None and (wrong := stale_of(found)) is not None:
        warnings.warn(wrong, RuntimeWarning, stacklevel=2)
    return found, reason


def _load() -> tuple[ctypes.CDLL | None, str]:
    if not LIBRARY.exists():
        return None, (
            "the compiled engine is not there: it is built when BitQuEST is installed, where a C++17 compiler is found "
            "(Debian: apt-get install g++; then install BitQuEST again)"
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as failure:
        return None, f"{LIBRARY} cannot be loaded ({failure}); install BitQuEST again on this machine"
    if library.bq_version() != ABI_VERSION:
        return None, (
            f"{LIBRARY} speaks version {library.bq_version()} of its interface, this package version {ABI_VERSION}; "
            "install BitQuEST again"
        )
    if not library.bq_isa():
        forced, present = os.environ.get("BITQUEST_ISA"), library.bq_isa_available().decode().replace(" ", ", ")
        return (
            None,
            f"BITQUEST_ISA={forced} asks for an instruction set that is not available here; there are: {present}",
        )
    return library, ""

"""Run as a program: every function of the native engine on arrays that touch a forbidden page, on either side.

A read or write outside an array ends the process with a segmentation fault; the last line printed says where.
"""

import ctypes
import itertools
import math
import mmap
import sys
from typing import Any

import torch
from torch import Tensor

from bitquest.numerics.grids import FP4, TERNARY, Grid, UniformGrid
from bitquest.numerics.integers import integer_form
from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.scaling import PerGroup, PerRow
from bitquest.ops import native, native_linear
from bitquest.ops.rows import QuantizedRows, RMSNorm, SwiGLU

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
READ_WRITE, NOTHING = 3, 0
MAP_PRIVATE_ANONYMOUS = 0x22

at_end = True
_mapped: list[tuple[int, int]] = []


def empty(*shape: Any, dtype: torch.dtype) -> Tensor:
    """torch.empty between two forbidden pages, touching the upper one (or the lower one)."""
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    wanted = math.prod(sizes) * dtype.itemsize
    if wanted == 0:
        return torch.zeros(sizes, dtype=dtype)
    inner = -(-wanted // PAGE) * PAGE
    base = _libc.mmap(None, inner + 2 * PAGE, READ_WRITE, MAP_PRIVATE_ANONYMOUS, -1, 0)
    assert base not in (None, ctypes.c_void_p(-1).value), "no memory to map"
    _mapped.append((base, inner + 2 * PAGE))
    for page in (base, base + PAGE + inner):
        assert _libc.mprotect(page, PAGE, NOTHING) == 0
    start = base + PAGE + (inner - wanted if at_end else 0)
    memory = (ctypes.c_uint8 * wanted).from_address(start)
    ctypes.memset(start, 0xA5, wanted)  # what is not written is garbage
    return torch.frombuffer(memory, dtype=dtype).reshape(sizes)


def guarded(x: Tensor) -> Tensor:
    return empty(x.shape, dtype=x.dtype).copy_(x)


class _Torch:
    """torch, but that `empty` is guarded."""

    def __getattr__(self, name: str) -> Any:
        return empty if name == "empty" else getattr(torch, name)


def release() -> None:
    while _mapped:
        _libc.munmap(*_mapped.pop())


WANT = frozenset({"factors", "packed", "mask", "sums"})


def rows_once(grid: Grid, width: int, block: int, dtype: torch.dtype) -> None:
    size = next((s for s in (32, 64) if width % s == 0), None)
    for granularity in [PerRow()] + ([PerGroup(size)] if size else []):
        quantizer = Quantizer(grid, granularity=granularity)
        x = guarded(torch.randn(3, width).to(dtype))
        made = native.quantize_rows(x, quantizer, block, WANT)
        assert made.packed is not None
        native.quantize_rows(x, quantizer, block, WANT, guarded(made.step))
        native.dequantize_rows(made.packed, made.step, grid, width, dtype)
        native.mask_rotate(x, made.mask, block)
        native.rotate(x, block, RMSNorm(guarded(torch.ones(width)), 1e-5))
        native.rotate(x, block, SwiGLU(guarded(x)))
    release()


def products_once(grid: Grid, x_grid: Grid | None, tokens: int, channels: int, width: int, groups: int) -> None:
    form, x_form = integer_form(grid), None if x_grid is None else integer_form(x_grid)
    assert form is not None
    granularity = PerRow() if groups == 1 else PerGroup(width // groups)
    w = native.quantize_rows(guarded(torch.randn(channels, width)), Quantizer(grid, granularity=granularity), 1, WANT)
    x: QuantizedRows | Tensor = guarded(torch.randn(tokens, width))
    if x_grid is not None:
        assert isinstance(x, Tensor)
        x = native.quantize_rows(x, Quantizer(x_grid, granularity=granularity), 1, WANT)
    prepared = native_linear.prepare(w.step, form, x_form, width, packed=w.packed)
    bias = guarded(torch.randn(channels))
    for dtype in (torch.float32, torch.bfloat16):
        native_linear.linear(prepared, x, channels, width, x_form, bias, dtype)
    activation = None if x_grid is None else Quantizer(x_grid, granularity=granularity)
    native_linear.quantized_linear(guarded(torch.randn(tokens, width)), activation, 1, [prepared], [channels], [bias])
    if isinstance(x, QuantizedRows):
        assert x_form is not None
        native_linear.linear(prepared, x._replace(packed=None, sums=None), channels, width, x_form)
        native_linear.product(prepared, x, channels, width, x_form, groups)
    release()


def main() -> None:
    global at_end
    native.torch = native_linear.torch = _Torch()  # type: ignore[assignment]
    torch.set_num_threads(2)
    for at_end in (True, False):
        for grid, width in itertools.product((*map(UniformGrid, range(1, 9)), TERNARY, FP4), (1, 7, 64, 96, 130, 200)):
            for block in {1, math.gcd(width, 128)}:
                print("rows", at_end, grid, width, block, flush=True)
                rows_once(grid, width, block, torch.float32 if width % 3 else torch.bfloat16)
        pairs: list[tuple[Grid, Grid | None]] = [(UniformGrid(b), UniformGrid(b)) for b in range(1, 9)]
        pairs += [(UniformGrid(1), UniformGrid(2)), (UniformGrid(1), UniformGrid(4)), (UniformGrid(2), UniformGrid(4))]
        pairs += [(UniformGrid(b), UniformGrid(8)) for b in (1, 2, 3, 4)] + [(TERNARY, UniformGrid(8)), (FP4, FP4)]
        pairs += [(UniformGrid(b), None) for b in range(1, 9)]
        shapes = ((1, 1, 1, 1), (1, 33, 70, 1), (3, 5, 129, 1), (7, 17, 192, 1), (1, 20, 192, 3), (5, 18, 64, 2))
        for (grid, x_grid), shape in itertools.product(pairs, shapes):
            print("products", at_end, grid, x_grid, shape, flush=True)
            products_once(grid, x_grid, *shape)
    print("done", native.isa())


if __name__ == "__main__":
    sys.exit(main())

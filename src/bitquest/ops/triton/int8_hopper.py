# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The s8 product of int8_kernels.rows_kernel for sm_90, its loop scheduled by hand in Gluon.

Triton's own pipeline waits for an integer wgmma before it goes on (it lets only float32 accumulators run on). Here the
wgmma of one tile of K runs while that of the next is issued: at most one is outstanding, and the buffer of the one
before it, which has ended, is filled again by TMA. Otherwise the same tiles, the same epilogue, the same numbers.

It cannot run under the interpreter and has not run on a GPU yet: what is proven is what it compiles to. So tuning takes
it up only where the environment says BITQUEST_GLUON=1. Gluon is experimental in Triton 3.6.0.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from bitquest.ops.triton import int8_kernels

_tile_origin = gluon.jit(int8_kernels._tile_origin.fn)
_corrected = gluon.jit(int8_kernels._corrected.fn)


@gluon.jit
def _fetch(x, w, t0, n0, tile, x_tiles, w_tiles, ready, wanted, STAGES: gl.constexpr, BLOCK_K: gl.constexpr):
    """Start the copies of one tile of K into its slot, which nothing reads any more, if it is wanted."""
    slot = tile % STAGES
    mbarrier.expect(ready.index(slot), x.block_type.nbytes + w.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(x, [t0, tile * BLOCK_K], ready.index(slot), x_tiles.index(slot), pred=wanted)
    tma.async_copy_global_to_shared(w, [n0, tile * BLOCK_K], ready.index(slot), w_tiles.index(slot), pred=wanted)


@gluon.jit
def _along(values, first, count, BLOCK: gl.constexpr, layout: gl.constexpr):
    """A block of a vector, each element read by one thread and handed to those that want it; zeros past the end."""
    once: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    at = first + gl.arange(0, BLOCK, layout=once)
    return gl.convert_layout(gl.load(values + at, mask=at < count, other=0), layout)


@gluon.jit
def rows_kernel(x, w, out, x_step, w_step, x_sums, w_sums, bias, T, N, constant,
                K: gl.constexpr, UNIT: gl.constexpr, FACTOR: gl.constexpr, X_TERM: gl.constexpr, W_TERM: gl.constexpr,
                WIDE: gl.constexpr, SCALED: gl.constexpr, HAS_BIAS: gl.constexpr, STORE_DESCRIPTOR: gl.constexpr,
                BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr,
                STAGES: gl.constexpr):  # fmt: skip
    """x, w: descriptors of int8 (BLOCK_T, BLOCK_K) and (BLOCK_N, BLOCK_K) tiles; the rest as in int8_kernels."""
    t0, n0 = _tile_origin(T, N, BLOCK_T, BLOCK_N, GROUP)
    TILES: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    # 128 columns an instruction: Triton 3.6.0 knows no s8 wgmma of 256.
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[gl.num_warps(), 1], instr_shape=[16, min(BLOCK_N, 128), 32]
    )
    x_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_T, BLOCK_K], x.layout)
    w_tiles = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, BLOCK_K], w.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    for i in gl.static_range(STAGES - 1):
        _fetch(x, w, t0, n0, i, x_tiles, w_tiles, ready, i < TILES, STAGES, BLOCK_K)
    dot = gl.zeros((BLOCK_T, BLOCK_N), gl.int32, layout)
    for tile in range(TILES):
        slot = tile % STAGES
        mbarrier.wait(ready.index(slot), tile // STAGES & 1)
        dot = warpgroup_mma(x_tiles.index(slot), w_tiles.index(slot).permute((1, 0)), dot, is_async=True)
        dot = warpgroup_mma_wait(1, deps=[dot])  # the product of the tile before has ended: its slot is free
        ahead = tile + (STAGES - 1)
        _fetch(x, w, t0, n0, ahead, x_tiles, w_tiles, ready, ahead < TILES, STAGES, BLOCK_K)
    dot = warpgroup_mma_wait(0, deps=[dot])
    for i in gl.static_range(STAGES):
        mbarrier.invalidate(ready.index(i))

    value = dot
    if SCALED:
        x_sum = _along(x_sums, t0, T, BLOCK_T, gl.SliceLayout(1, layout)) if X_TERM else 0
        w_sum = _along(w_sums, n0, N, BLOCK_N, gl.SliceLayout(0, layout)) if W_TERM else 0
        value = _corrected(dot, x_sum, w_sum, constant, FACTOR, X_TERM, W_TERM, WIDE)
        value *= (_along(x_step, t0, T, BLOCK_T, gl.SliceLayout(1, layout)) * UNIT)[:, None]
        value *= _along(w_step, n0, N, BLOCK_N, gl.SliceLayout(0, layout))[None, :]
    if HAS_BIAS:
        value = value + _along(bias, n0, N, BLOCK_N, gl.SliceLayout(0, layout)).to(gl.float32)[None, :]
    if STORE_DESCRIPTOR:
        staging = gl.allocate_shared_memory(out.dtype, out.block_type.shape, out.layout)
        staging.store(value.to(out.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [t0, n0], staging)
        tma.store_wait(0)
    else:
        rt = t0 + gl.arange(0, BLOCK_T, layout=gl.SliceLayout(1, layout))
        rn = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
        inside = (rt < T)[:, None] & (rn < N)[None, :]
        gl.store(out + rt.to(gl.int64)[:, None] * N + rn[None, :], value.to(out.dtype.element_ty), mask=inside)


def descriptor(a: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    """A TMA descriptor with the shared-memory layout that wgmma reads."""
    layout = gl.NVMMASharedLayout.get_default_for(block, getattr(gl, str(a.dtype).removeprefix("torch.")))
    return TensorDescriptor(a, shape, strides, block, layout)

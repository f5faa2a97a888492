"""Codes as the file keeps them: b bits each, and under N:M sparsity only those that are kept, beside a bit mask.

N rows, K codes of a row, n of every m elements (or pairs) kept.
"""

import torch
from torch import Tensor

from bitquest.errors import FormatError
from bitquest.export.format import LayerSpec
from bitquest.numerics.grids import CodebookGrid
from bitquest.numerics.packing import pack, unpack
from bitquest.numerics.sparsity import NofM


def codes_to_bytes(codes_NK: Tensor, kept_NK: Tensor | None, spec: LayerSpec) -> dict[str, Tensor]:
    """`codes`, and under sparsity `kept`, as uint8 tensors of the shapes the specification gives."""
    assert spec.weight is not None
    if kept_NK is None:
        return {"codes": pack(codes_NK, spec.weight.bits)}
    pattern = spec.weight.sparsity
    assert isinstance(pattern, NofM)
    rows = codes_NK.shape[0]
    units = kept_NK[:, ::2] if pattern.pair else kept_NK
    return {
        "codes": pack(codes_NK[kept_NK].reshape(rows, -1), spec.weight.bits),
        "kept": pack(units.to(torch.int8) - 1, 1),  # 1-bit codes are −1 and 0, stored as 0 and 1
    }


def packed_from_bytes(tensors: dict[str, Tensor], spec: LayerSpec, where: str) -> tuple[Tensor, Tensor | None]:
    """Codes as layers hold them, uint8 (N, ⌈K·bits/8⌉) with dropped ones as 0, and the kept mask bool (N, K) or None.

    Raises FormatError for set spare bits, a mask that is not n of every m, and codes beyond the codebook.
    """
    assert spec.weight is not None
    k, bits, pattern = spec.in_features, spec.weight.bits, spec.weight.sparsity
    try:
        if not isinstance(pattern, NofM):
            _check_dense(tensors["codes"], spec, where)
            return tensors["codes"], None
        repeat = 2 if pattern.pair else 1
        units = unpack(tensors["kept"], 1, k // repeat) == 0
        if not bool((units.unflatten(-1, (-1, pattern.m)).sum(-1) == pattern.n).all()):
            raise FormatError(f"the mask does not keep {pattern.n} of every {pattern.m}")
        kept = units.repeat_interleave(repeat, -1)
        stored = unpack(tensors["codes"], bits, k // pattern.m * pattern.n)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None
    _check_codebook(stored, spec, where)
    codes = torch.zeros(kept.shape, dtype=torch.int8)
    codes[kept] = stored.flatten()
    return pack(codes, bits), kept


def _check_dense(packed: Tensor, spec: LayerSpec, where: str) -> None:
    """Look at the spare bits, and at every code only where not all of them mean something."""
    assert spec.weight is not None
    bits, k = spec.weight.bits, spec.in_features
    if isinstance(spec.weight.grid, CodebookGrid):
        _check_codebook(unpack(packed, bits, k), spec, where)
    elif spare := packed.shape[-1] * 8 - k * bits:
        last = (k - 1) // 8 * 8  # codes share bytes in eights: the last eight hold all the spare bits
        unpack(packed[:, last * bits // 8 :], bits, k - last)
        assert spare < 8


def _check_codebook(codes: Tensor, spec: LayerSpec, where: str) -> None:
    assert spec.weight is not None
    grid = spec.weight.grid
    if isinstance(grid, CodebookGrid) and int(codes.max()) + 2 ** (grid.bits - 1) >= len(grid.levels):
        raise FormatError(f"{where}: a code lies outside the {len(grid.levels)} levels of codebook {grid.name!r}")

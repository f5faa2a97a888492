import operator

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquest.numerics import BlockHadamard, NoRotation
from bitquest.numerics.rotations import _products_are_exact, hadamard


@pytest.mark.parametrize("n", [2, 4, 32, 64, 128, 256])
def test_orthonormal_symmetric_sylvester(n: int) -> None:
    h = hadamard(n, torch.device("cpu")).double()
    assert torch.allclose(h @ h.T, torch.eye(n, dtype=torch.float64), atol=1e-6)
    assert torch.equal(h, h.T)
    assert torch.allclose(h, reference.dense_rotation(BlockHadamard(n), n), atol=1e-7)


@pytest.mark.parametrize(("width", "block"), [(288, 32), (576, 64), (256, 128), (640, 128), (1664, 128), (6, 2)])
def test_resolves_to_the_largest_block(width: int, block: int) -> None:
    assert BlockHadamard().resolve(width) == BlockHadamard(block)
    assert BlockHadamard().resolve(7) == NoRotation()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 4), st.integers(0, 2**31))
def test_inverse_undoes_and_norm_is_kept(width: int, rows: int, seed: int) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    y = BlockHadamard().apply(x)
    assert torch.allclose(y, (x.double() @ reference.dense_rotation(BlockHadamard(), width)).float(), atol=1e-5)
    assert torch.allclose(BlockHadamard().inverse(y), x, atol=1e-5)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


def test_reduced_matmul_precision_does_not_reach_the_rotation() -> None:
    x = torch.randn(5, 256)
    exact = BlockHadamard().apply(x)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.allclose(BlockHadamard().apply(x), exact, atol=2e-6)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("where", ["mkldnn.matmul", "cuda.matmul"])
def test_precision_set_per_backend_does_not_reach_the_rotation(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After which torch's global getter raises."""
    x = torch.randn(5, 256)
    exact = BlockHadamard().apply(x)
    backend = operator.attrgetter(where)(torch.backends)
    before = backend.fp32_precision
    backend.fp32_precision = "tf32"
    try:
        assert torch.allclose(BlockHadamard().apply(x), exact, atol=2e-6)
        assert _products_are_exact("cpu") == (where == "cuda.matmul")
        if where == "mkldnn.matmul":  # additions only
            monkeypatch.setattr("bitquest.numerics.rotations.hadamard", None)
            assert torch.allclose(BlockHadamard().apply(x), exact, atol=2e-6)
        assert not _products_are_exact("mps")
    finally:
        backend.fp32_precision = before


def test_a_matrix_first_made_for_inference_serves_training() -> None:
    hadamard.cache_clear()
    with torch.inference_mode():
        BlockHadamard().apply(torch.randn(2, 64))
    x = torch.randn(2, 64, requires_grad=True)
    BlockHadamard().apply(x).sum().backward()
    assert x.grad is not None


def test_other_devices() -> None:
    hadamard.cache_clear()
    with torch.device("meta"):
        assert BlockHadamard().apply(torch.randn(2, 64)).is_meta
        assert not BlockHadamard().apply(torch.randn(2, 64, device="cpu")).is_meta


def test_autocast_does_not_reach_the_rotation() -> None:
    x = torch.randn(5, 256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(BlockHadamard().apply(x), BlockHadamard().apply(x.clone()))
        inside = BlockHadamard().apply(x)
    assert torch.equal(inside, BlockHadamard().apply(x))


def test_a_stated_block_must_divide() -> None:
    with pytest.raises(ValueError, match="does not fit width 96"):
        BlockHadamard(64).apply(torch.zeros(1, 96))

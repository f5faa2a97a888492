"""Every operator: opcheck, and equal to the definition in numerics, values and gradients."""

import pytest
import torch

from bitquest import ops
from bitquest.errors import ConfigError
from bitquest.numerics import (
    FP4,
    BlockHadamard,
    Clip,
    CodebookGrid,
    Learned,
    NofM,
    NoRotation,
    PerGroup,
    PerRow,
    PerTensor,
    Quantizer,
    StraightThrough,
    Trust,
    UniformGrid,
    encode,
    fake_quantize,
    integer_form,
)
from bitquest.ops.registry import (
    fake_quantize_backward_op,
    fake_quantize_op,
    quantizer_text,
    rotate_op,
    step_gradient_op,
)

QUANTIZERS = [
    Quantizer(UniformGrid(1), estimator=Clip(1.3)),
    Quantizer(UniformGrid(4)),
    Quantizer(UniformGrid(8), PerGroup(32)),
    Quantizer(FP4, PerTensor(), estimator=Trust(0.5)),
    Quantizer(UniformGrid(3), estimator=StraightThrough()),
    Quantizer(UniformGrid(4), sparsity=NofM(2, 4, pair=True)),
    Quantizer(UniformGrid(2), PerTensor(), Learned(), Clip(1.0)),
    Quantizer(UniformGrid(2), PerRow(), Learned(), StraightThrough()),
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize("block", [1, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_fake_quantize(quantizer: Quantizer, block: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 64).to(dtype).requires_grad_()
    step = None
    if quantizer.is_learned:
        step = encode(x.detach(), quantizer, NoRotation()).step.requires_grad_()
    torch.library.opcheck(fake_quantize_op, (x, step, quantizer_text(quantizer), block))


@pytest.mark.parametrize("block", [1, 32])
def test_opcheck_inputs_that_are_not_contiguous(block: int) -> None:
    """The memory layout of a result is promised to the compiler."""
    x, mask = torch.randn(64, 6).t(), (torch.rand(64, 6) > 0.2).t()
    for quantizer in QUANTIZERS[:6]:
        torch.library.opcheck(fake_quantize_op, (x.clone().requires_grad_(), None, quantizer_text(quantizer), block))
    torch.library.opcheck(fake_quantize_backward_op, (x, mask, block))
    torch.library.opcheck(fake_quantize_backward_op, (x, torch.empty(0, dtype=torch.bool), block))
    torch.library.opcheck(rotate_op, (x, block))


def test_opcheck_an_estimator_that_masks_nothing() -> None:
    """Its mask is empty, whichever way it says so."""
    for estimator in (StraightThrough(), Clip(1e308), Trust(1.7e308)):
        quantizer = Quantizer(UniformGrid(8) if estimator != Trust(1.7e308) else FP4, estimator=estimator)
        torch.library.opcheck(fake_quantize_op, (torch.randn(3, 64), None, quantizer_text(quantizer), 32))


def test_opcheck_the_others() -> None:
    x, mask = torch.randn(3, 64), torch.rand(3, 64) > 0.2
    torch.library.opcheck(fake_quantize_backward_op, (x, mask, 32))
    torch.library.opcheck(fake_quantize_backward_op, (x, torch.empty(0, dtype=torch.bool), 1))
    torch.library.opcheck(rotate_op, (x.clone().requires_grad_(), 64))
    learned = Quantizer(UniformGrid(2), PerRow(), Learned())
    torch.library.opcheck(step_gradient_op, (x, torch.randn(3, 64), torch.ones(3, 1), quantizer_text(learned)))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
@pytest.mark.parametrize("rotation", [NoRotation(), BlockHadamard()], ids=str)
@pytest.mark.parametrize("width", [64, 96, 288])
def test_operator_is_the_definition(quantizer: Quantizer, rotation: object, width: int) -> None:
    results = []
    for function in (fake_quantize, ops.fake_quantize):
        x = torch.randn(5, width, generator=torch.Generator().manual_seed(1)).requires_grad_()
        step = None
        if quantizer.is_learned:
            step = encode(x.detach(), quantizer, rotation).step.requires_grad_()  # type: ignore[arg-type]
        y = function(x, quantizer, rotation, step)  # type: ignore[arg-type]
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)))
        results.append((y.detach(), x.grad, None if step is None else step.grad))
    for reference, operator in zip(*results, strict=True):
        assert (reference is None) == (operator is None)
        if reference is not None and operator is not None:
            assert torch.equal(reference, operator)


def test_results_are_written_in_full() -> None:
    """Memory that comes poisoned must not show through."""
    x = torch.randn(4, 64)
    clean = [ops.fake_quantize(x, quantizer, BlockHadamard()) for quantizer in QUANTIZERS]
    with _poisoned():
        dirty = [ops.fake_quantize(x, quantizer, BlockHadamard()) for quantizer in QUANTIZERS]
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


class _poisoned:
    """torch.empty gives NaN (largest integers) while deterministic algorithms are on."""

    def __enter__(self) -> None:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        assert bool(torch.empty(3).isnan().all())

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(False)


def test_gradient_arrives_for_non_contiguous_gradients() -> None:
    x = torch.randn(6, 64, requires_grad=True)
    y = ops.fake_quantize(x, Quantizer(), BlockHadamard())
    y.t().sum(0).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_backends() -> None:
    assert ops.resolve_backend("auto") is ops.Backend.AUTO
    assert ops.resolve_backend("torch") is ops.Backend.TORCH
    with pytest.raises(ConfigError, match="unknown backend 'metal'"):
        ops.resolve_backend("metal")
    assert "torch" in [report.name for report in ops.backend_report() if report.available]


def test_an_unavailable_backend_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    report = (ops.BackendReport("torch", False, "a reason"),)
    monkeypatch.setattr("bitquest.ops.backend.backend_report", lambda: report)
    with pytest.raises(ConfigError, match="a reason"):
        ops.resolve_backend("torch")


def test_a_codebook_without_integers_is_no_business_of_the_integer_operators() -> None:
    assert integer_form(CodebookGrid("x", (-1.0, 0.3))) is None

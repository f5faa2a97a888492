"""Faster ways to the same numbers: one torch.library schema per operation, numerics as its default backend."""

from torch import Tensor

from bitquest.numerics.quantizer import Quantizer
from bitquest.numerics.rotations import Rotation
from bitquest.ops.backend import Backend, BackendReport, backend_report, resolve_backend
from bitquest.ops.registry import fake_quantize_op, grid_text, quantizer_text

__all__ = [
    "Backend",
    "BackendReport",
    "backend_report",
    "fake_quantize",
    "grid_text",
    "quantizer_text",
    "resolve_backend",
]


def fake_quantize(x: Tensor, quantizer: Quantizer, rotation: Rotation, step: Tensor | None = None) -> Tensor:
    """Quantized values of x (…, K) in rotated space, in x's dtype; the gradient arrives in x's own space.

    step: a given Δ instead of the scale rule's; for a `Learned` quantizer it is differentiable.
    Raises ConfigError if K does not fit the rotation, the groups or the sparsity pattern.
    """
    block = rotation.resolve(x.shape[-1]).block
    values: Tensor = fake_quantize_op(x, step, quantizer_text(quantizer), block)[0]
    return values

"""Leave a Llama's norms and gated products to the kernels that quantize what they make.

A norm in front of quantized layers writes a tensor that they read once more, to rotate and round it. `fuse_` lets
such a norm (and SwiGLU's product) hand on its operands instead; the layers' kernels take it on the way (nn/pending.py).
Parameters keep their names, so checkpoints fit as before. Layers without such kernels compute the tensor as ever.
"""

from collections.abc import Iterable
from typing import TypeVar

from torch import Tensor, nn

from bitquest.models.llama import Block, RMSNorm, SwiGLU
from bitquest.nn import PackedLinear, QuantizedLinear
from bitquest.nn.pending import PendingInput
from bitquest.ops import rows

_Model = TypeVar("_Model", bound=nn.Module)


class DeferredRMSNorm(RMSNorm):
    """A norm that hands on x and its weight."""

    def __init__(self, norm: RMSNorm) -> None:
        nn.Module.__init__(self)
        self.weight, self.eps = norm.weight, norm.eps
        self.train(norm.training)

    def forward(self, x: Tensor) -> PendingInput:  # type: ignore[override]
        return PendingInput(x, rows.RMSNorm(self.weight, self.eps))


class DeferredSwiGLU(SwiGLU):
    """A gated product that hands on the gate and what it gates."""

    def forward(self, gate: Tensor, up: Tensor) -> PendingInput:  # type: ignore[override]
        return PendingInput(gate, rows.SwiGLU(up))


def fuse_(model: _Model) -> _Model:
    """Defer every norm and product of a Llama whose readers all are quantized or packed layers. Returns the model."""
    for block in model.modules():
        if isinstance(block, Block):
            _fuse_block(block)
    return model


def _fuse_block(block: Block) -> None:
    attention, mlp = block.self_attn, block.mlp
    if _are_quantized((attention.q_proj, attention.k_proj, attention.v_proj)):
        block.input_layernorm = DeferredRMSNorm(block.input_layernorm)
    if attention.o_norm is not None and _are_quantized((attention.o_proj,)):
        attention.o_norm = DeferredRMSNorm(attention.o_norm)
    if _are_quantized((mlp.gate_proj, mlp.up_proj)):
        block.post_attention_layernorm = DeferredRMSNorm(block.post_attention_layernorm)
    if _are_quantized((mlp.down_proj,)):
        if mlp.down_norm is not None:
            mlp.down_norm = DeferredRMSNorm(mlp.down_norm)
        else:
            mlp.act = DeferredSwiGLU()


def _are_quantized(readers: Iterable[nn.Module]) -> bool:
    return all(isinstance(reader, QuantizedLinear | PackedLinear) for reader in readers)

"""Decoding on a CPU with one call into the compiled engine a token: no Python between the layers, nothing allocated.

The cache is the one that the model's own forward fills, so a prompt is prefilled in Python and decoding goes on here.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from bitquest.errors import ConfigError, DataError
from bitquest.inference.kv_cache import KVCache
from bitquest.models import Llama
from bitquest.models.fuse import DeferredRMSNorm, DeferredSwiGLU
from bitquest.models.llama import MLP, Attention, Block, Decoder, RMSNorm, SwiGLU
from bitquest.nn import PackedEmbedding, PackedLinear
from bitquest.ops import native_decoder as native
from bitquest.ops.backend import Backend
from bitquest.ops.linear_spec import LinearSpec

_KNOWN = {
    *(Llama, Decoder, Block, Attention, MLP, SwiGLU, DeferredSwiGLU, RMSNorm, DeferredRMSNorm),
    *(nn.ModuleList, nn.Linear, nn.Embedding, PackedLinear, PackedEmbedding),
}
_ATTENTION = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


class NativeDecoder:
    """Steps of one token on a cache that the model has filled. Raises ConfigError, with the reason, for others.

    The model's weights are read where they lie, so it must stay on its device and unchanged while it decodes.
    """

    def __init__(self, model: Llama, cache: KVCache) -> None:
        reason = NativeDecoder.refuses(model, cache)
        if reason is not None:
            raise ConfigError(f"native decoding: {reason}")
        config, decoder = model.config, model.model
        self.cache = cache
        self._readers = [reader for i in range(len(decoder.layers)) for reader in _readers(i)] + [("lm_head",)]
        self._inputs: list[Tensor] | None = None
        sizes = native.Sizes(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_size,
            config.vocab_size,
        )
        self._decoder = native.Decoder(
            sizes,
            [_block(cast(Block, block)) for block in decoder.layers],
            _table(decoder.embed_tokens),
            native.Norm(decoder.norm.weight, decoder.norm.eps),
            _layer(model.lm_head),
            (decoder.cos, decoder.sin),
            (cache.keys, cache.values),
        )

    @staticmethod
    def refuses(model: Llama, cache: KVCache | None = None) -> str | None:
        """Why the model does not decode in native code, None if it does."""
        for name, module in model.named_modules():
            if type(module) not in _KNOWN:
                return f"{name or 'the model'} is a {type(module).__name__}"
            if module._forward_hooks or module._forward_pre_hooks:
                return f"{name or 'the model'} has forward hooks"
            if isinstance(module, PackedLinear):
                backend = module._ready().backend
                if backend != Backend.NATIVE:
                    return f"{name} runs on backend {backend.value!r}"
            elif isinstance(module, PackedEmbedding) and module.kept is not None:
                return f"{name} is a sparse table"
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_cpu:
                return f"{name} is on {tensor.device}"
            if tensor.is_floating_point() and tensor.dtype != torch.float32:
                return f"{name} is {tensor.dtype}, and the step computes in float32"
        if not any(isinstance(module, PackedLinear) for module in model.modules()):
            return "no layer of it is packed"
        if cache is not None:
            for memory in (cache.keys, cache.values):
                if memory.dtype != torch.float32 or not memory.is_cpu or memory.shape[1] != 1:
                    return "its cache is not one stream of float32 on the CPU"
        return native.unavailable()

    def step(self, token: int) -> Tensor:
        """Feed one token at the next position. Logits (V,), valid until the next. DataError past the cache's end."""
        position = self.cache.length
        if position >= self.cache.positions:
            raise DataError(f"the key-value cache holds {position} positions; {position + 1} are needed")
        logits_V = self._decoder.step(token, position)
        self.cache.advance(1)
        return logits_V

    def watched_step(self, token: int, watch: Callable[[str, Tensor], None]) -> Tensor:
        """As `step`, which afterwards hands watch(name, x) the float32 input (1, 1, K) of every layer, before rotation.

        These are the values that were rounded, to the bit, so a layer's `encode_input` gives the codes that were used.
        """
        if self._inputs is None:
            self._inputs = self._decoder.watch()
        logits_V = self.step(token)
        for names, x_K in zip(self._readers, self._inputs, strict=True):
            for name in names:
                watch(name, x_K.view(1, 1, -1))
        return logits_V


def _readers(block: int) -> list[tuple[str, ...]]:
    """Names of the layers of a block, those that read one input together, in the order of the engine."""
    attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
    return [
        (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
        (f"{attention}.o_proj",),
        (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        (f"{mlp}.down_proj",),
    ]


def _block(block: Block) -> native.Block:
    attention, mlp = block.self_attn, block.mlp
    norms: dict[str, RMSNorm | None] = {
        "attention_norm": block.input_layernorm,
        "q_norm": attention.q_norm,
        "k_norm": attention.k_norm,
        "o_norm": attention.o_norm,
        "mlp_norm": block.post_attention_layernorm,
        "down_norm": mlp.down_norm,
    }
    layers = {name: _layer(getattr(attention, of)) for name, of in _ATTENTION.items()}
    layers |= {name: _layer(getattr(mlp, of)) for name, of in _MLP.items()}
    made = {name: None if norm is None else native.Norm(norm.weight, norm.eps) for name, norm in norms.items()}
    return native.Block(made, layers)


def _layer(layer: nn.Module) -> native.Layer:
    if isinstance(layer, PackedLinear):
        return native.Layer(layer._spec, layer._ready().parts[0], layer.activation_step, bias=layer.bias)
    assert isinstance(layer, nn.Linear)
    spec = LinearSpec(layer.in_features, layer.out_features, None, None, 1)
    return native.Layer(spec, dense=layer.weight, bias=layer.bias)


def _table(table: nn.Module) -> native.Table:
    if isinstance(table, PackedEmbedding):
        grid, block = table.weight_spec.grid, table.rotation.block
        return native.Table(packed=table.packed, step=table.step, grid=grid, block=block)
    assert isinstance(table, nn.Embedding)
    return native.Table(dense=table.weight)

"""Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU. No quantization branches: layers are swapped in.

B batch, T tokens, D hidden_size, H heads, C channels of a head, V vocabulary.
Modules carry Hugging Face's names. Source: Touvron et al., arXiv 2302.13971; RoPE: Su et al., arXiv 2104.09864.
"""

from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bitquest.errors import DataError
from bitquest.models.config import LlamaConfig

INIT_SIGMA = 0.02


class Cache(Protocol):
    """What a key-value cache offers the model; inference/kv_cache.py has one."""

    length: int
    mask_TS: Tensor | None

    def begin(self, tokens: int) -> None:
        """Prepare for new tokens: `mask_TS` says which positions each of them may see; None: all."""

    def rows(self, table: Tensor, tokens: int) -> Tensor:
        """The rows of a table of positions that belong to the new tokens."""

    def append(self, layer: int, k_BHTC: Tensor, v_BHTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer; all of them so far come back."""

    def attend(self, q_BHTC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor) -> Tensor:
        """Attention (B, H, T, C) of the new tokens over what `append` gave: `masked_attention`, or its equal."""

    def advance(self, tokens: int) -> None:
        """Count tokens once all layers have stored them."""


class RMSNorm(nn.Module):
    """x / rms(x) · weight, in float32 whatever the dtype of x; the result has x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rope_tables(config: LlamaConfig, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin (positions, C) float32 of the rotary embedding, halves side by side as in Hugging Face's Llama."""
    c = config.head_size
    exponents = torch.arange(0, c, 2, dtype=torch.int64, device=device).float() / c
    frequencies = 1.0 / (config.rope_theta**exponents)
    angles = torch.outer(torch.arange(config.max_position_embeddings, device=device).float(), frequencies)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def apply_rope(x_BHTC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Rotate each pair (i, i + C/2) of a head by its position's angle."""
    first, second = x_BHTC.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (x_BHTC * cos_TC + turned * sin_TC).to(x_BHTC.dtype)


def masked_attention(q_BHTC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, mask_TS: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √C) v (B, H, T, C) where the mask is True; keys and values of fewer heads serve several each."""
    grouped = q_BHTC.shape[1] != k_BHSC.shape[1]
    return F.scaled_dot_product_attention(q_BHTC, k_BHSC, v_BHSC, attn_mask=mask_TS, enable_gqa=grouped)


class Attention(nn.Module):
    """Grouped-query attention. q, k and v read one tensor, so that quantized layers share its quantization."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        d, c = config.hidden_size, config.head_size
        self.layer, self.c = layer, c
        self.h, self.h_kv = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(d, self.h * c, bias=False)
        self.k_proj = nn.Linear(d, self.h_kv * c, bias=False)
        self.v_proj = nn.Linear(d, self.h_kv * c, bias=False)
        self.o_proj = nn.Linear(self.h * c, d, bias=False)
        eps = config.rms_norm_eps
        self.q_norm = RMSNorm(c, eps) if config.qk_norm else None
        self.k_norm = RMSNorm(c, eps) if config.qk_norm else None
        self.o_norm = RMSNorm(self.h * c, eps) if config.norm_before_o_proj else None

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor, cache: Cache | None) -> Tensor:
        b, t, _ = x_BTD.shape
        q_BHTC = self.q_proj(x_BTD).view(b, t, self.h, self.c).transpose(1, 2)
        k_BHTC = self.k_proj(x_BTD).view(b, t, self.h_kv, self.c).transpose(1, 2)
        v_BHTC = self.v_proj(x_BTD).view(b, t, self.h_kv, self.c).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BHTC, k_BHTC = self.q_norm(q_BHTC), self.k_norm(k_BHTC)
        q_BHTC, k_BHTC = apply_rope(q_BHTC, cos_TC, sin_TC), apply_rope(k_BHTC, cos_TC, sin_TC)
        if cache is None:
            grouped = self.h != self.h_kv
            y_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BHTC, v_BHTC, is_causal=True, enable_gqa=grouped)
        else:
            k_BHTC, v_BHTC = (t.to(q_BHTC.dtype) for t in cache.append(self.layer, k_BHTC, v_BHTC))
            y_BHTC = cache.attend(q_BHTC, k_BHTC, v_BHTC)
        y_BTD = y_BHTC.transpose(1, 2).reshape(b, t, self.h * self.c)
        return cast(Tensor, self.o_proj(y_BTD if self.o_norm is None else self.o_norm(y_BTD)))


class SwiGLU(nn.Module):
    """silu(gate) · up: no parameters, a module so that it can be left to the layer behind it (models/fuse.py)."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)). gate and up read one tensor."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        d, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, hidden, bias=False)
        self.up_proj = nn.Linear(d, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, d, bias=False)
        self.act = SwiGLU()
        self.down_norm = RMSNorm(hidden, config.rms_norm_eps) if config.norm_before_down_proj else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden = self.act(self.gate_proj(x_BTD), self.up_proj(x_BTD))
        return cast(Tensor, self.down_proj(hidden if self.down_norm is None else self.down_norm(hidden)))


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, cos_TC: Tensor, sin_TC: Tensor, cache: Cache | None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), cos_TC, sin_TC, cache)
        return x_BTD + cast(Tensor, self.mlp(self.post_attention_layernorm(x_BTD)))


class Decoder(nn.Module):
    """The stack between token ids and the head (Hugging Face's `model`)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)


class Llama(nn.Module):
    """A causal language model: ids (B, T) int64 to logits (B, T, V). Made plain; `quantize_` swaps its layers.

    activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def init_weights(self, seed: int) -> "Llama":
        """Normal weights of σ 0.02 and unit norms, the same for the same seed whatever the global generator did."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() < 2:
                    parameter.fill_(1.0)
                elif not name.endswith("_quantizer.step"):
                    values = torch.empty(parameter.shape).normal_(0.0, INIT_SIGMA, generator=generator)
                    parameter.copy_(values)
        return self

    def forward(
        self, tokens_BT: Tensor, cache: Cache | None = None, last: bool = False, only_N: Tensor | None = None
    ) -> Tensor:
        """Logits of the next token after each position. With a cache, positions continue after what it holds.

        last: of the last position alone, (B, 1, V), as writing on after a prompt needs them.
        only_N: int64, positions counted through the batch (row · T + place); only their logits are made, (N, V).

        Raises DataError for more positions than the model has.
        """
        start, t = (0 if cache is None else cache.length), tokens_BT.shape[1]
        if start + t > self.config.max_position_embeddings:
            raise DataError(
                f"{start + t} tokens are more than the {self.config.max_position_embeddings} positions of this model; "
                "shorten the text"
            )
        decoder = self.model
        if cache is None:
            cos_TC, sin_TC = decoder.cos[:t], decoder.sin[:t]
        else:
            cache.begin(t)
            cos_TC, sin_TC = cache.rows(decoder.cos, t), cache.rows(decoder.sin, t)
        x_BTD = decoder.embed_tokens(tokens_BT)
        for block in decoder.layers:
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, cos_TC, sin_TC, None, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, cos_TC, sin_TC, cache)
        if cache is not None:
            cache.advance(t)
        if only_N is not None:
            x_BTD = x_BTD.flatten(0, 1)[only_N]
        return cast(Tensor, self.lm_head(decoder.norm(x_BTD[:, -1:] if last else x_BTD)))

"""The key-value cache: memory for every position reserved once, filled as tokens come.

`KVCache` counts positions on the host. `WindowView` is the same memory as a CUDA graph must see it: one token at a
time, its position in a tensor, attention always over a whole window of which the later part is masked.
B batch, H key-value heads, T new tokens, S positions seen, C channels of a head.
"""

import torch
from torch import Tensor

from bitquest.errors import DataError
from bitquest.models.config import LlamaConfig
from bitquest.models.llama import masked_attention
from bitquest.ops import native_decoder


class KVCache:
    """Keys and values (layers, B, heads, positions, head size) of up to `positions` tokens.

    The model begins with `begin`, asks for one layer after the other with `append`, then counts the tokens with
    `advance`. Raises DataError when more tokens come than were reserved.

    native: prompts attend in the compiled CPU engine, to the bit as its decoding does; for one stream of float32 on the
    CPU, without gradients.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int = 1,
        positions: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        native: bool = False,
    ) -> None:
        self.native = native
        self.positions = min(positions or config.max_position_embeddings, config.max_position_embeddings)
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, self.positions, config.head_size)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0
        self.mask_TS: Tensor | None = None

    def begin(self, tokens: int) -> None:
        """Prepare for new tokens: which of the positions each of them may see; None: all."""
        end = self.length + tokens
        if end > self.positions:
            raise DataError(f"the key-value cache holds {self.positions} positions; {end} are needed")
        if tokens == 1:
            self.mask_TS = None
        else:
            everything = torch.ones(tokens, end, dtype=torch.bool, device=self.keys.device)
            self.mask_TS = everything.tril(self.length)

    def rows(self, table: Tensor, tokens: int) -> Tensor:
        """The rows of a table of positions that belong to the new tokens."""
        return table[self.length : self.length + tokens]

    def append(self, layer: int, k_BHTC: Tensor, v_BHTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; views of all of them so far come back."""
        end = self.length + k_BHTC.shape[2]
        self.keys[layer, :, :, self.length : end] = k_BHTC
        self.values[layer, :, :, self.length : end] = v_BHTC
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def attend(self, q_BHTC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor) -> Tensor:
        """Attention (B, H, T, C) of the new tokens over everything so far."""
        if self.native and q_BHTC.shape[2] > 1:
            return native_decoder.attend_rows(q_BHTC[0], k_BHSC[0], v_BHSC[0]).unsqueeze(0)
        return masked_attention(q_BHTC, k_BHSC, v_BHSC, self.mask_TS)

    def advance(self, tokens: int) -> None:
        """Count tokens that every layer has stored."""
        self.length += tokens

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.length = 0


class WindowView:
    """The first `window` positions of a cache, for steps of one token whose position is a tensor.

    Nothing here depends on the host's count, so that the same launches serve every step. Positions of the window that
    hold nothing yet are masked; they must hold finite numbers, so the memory is cleared when the view is made.
    """

    def __init__(self, memory: KVCache, window: int) -> None:
        assert memory.length < window <= memory.positions
        self.memory, self.window = memory, window
        device = memory.keys.device
        self.position = torch.full((1,), memory.length, dtype=torch.int64, device=device)
        self.mask_TS: Tensor | None = None
        self._range = torch.arange(window, device=device).unsqueeze(0)
        for kept in (memory.keys, memory.values):
            kept[:, :, :, memory.length : window].zero_()

    @property
    def length(self) -> int:
        """Positions filled, by the host's count."""
        return self.memory.length

    def begin(self, tokens: int) -> None:
        assert tokens == 1
        self.mask_TS = self._range <= self.position

    def rows(self, table: Tensor, tokens: int) -> Tensor:
        return table.index_select(0, self.position)

    def append(self, layer: int, k_BHTC: Tensor, v_BHTC: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.memory.keys[layer], self.memory.values[layer]
        keys.index_copy_(2, self.position, k_BHTC.to(keys.dtype))
        values.index_copy_(2, self.position, v_BHTC.to(values.dtype))
        return keys[:, :, : self.window], values[:, :, : self.window]

    def attend(self, q_BHTC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor) -> Tensor:
        return masked_attention(q_BHTC, k_BHSC, v_BHSC, self.mask_TS)

    def advance(self, tokens: int) -> None:
        """The host counts (`StaticDecoder`): a replayed graph runs no Python."""

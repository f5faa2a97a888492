"""The key-value cache: memory for every position reserved once, filled as tokens come."""

import torch
from torch import Tensor

from bitquest.errors import DataError
from bitquest.models.config import LlamaConfig


class KVCache:
    """Keys and values (layers, B, heads, positions, head size) of up to `positions` tokens.

    The model asks for one layer after the other with `append`, then counts the tokens with `advance`.
    Raises DataError when more tokens come than were reserved.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int = 1,
        positions: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.positions = min(positions or config.max_position_embeddings, config.max_position_embeddings)
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, self.positions, config.head_size)
        self._keys = torch.empty(shape, dtype=dtype, device=device)
        self._values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, layer: int, k_BHTC: Tensor, v_BHTC: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values; views of all of them so far come back."""
        end = self.length + k_BHTC.shape[2]
        if end > self.positions:
            raise DataError(f"the key-value cache holds {self.positions} positions; {end} are needed")
        self._keys[layer, :, :, self.length : end] = k_BHTC
        self._values[layer, :, :, self.length : end] = v_BHTC
        return self._keys[layer, :, :, :end], self._values[layer, :, :, :end]

    def advance(self, tokens: int) -> None:
        """Count tokens that every layer has stored."""
        self.length += tokens

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self.length = 0

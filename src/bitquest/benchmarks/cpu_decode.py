"""Whole Llamas on a CPU: seconds for a token of one decoded stream, and for the prefill of a prompt.

Ours runs as `bitquest generate` runs it; torch runs the same model with plain layers, the head of a prompt only at its
last token. Both choose the likeliest token. Token ids are random: speed does not depend on them.
"""

import time
from typing import Protocol

import torch
from torch import Tensor, nn

from bitquest.inference.engine import Speed, generate
from bitquest.inference.kv_cache import KVCache
from bitquest.inference.sampling import SamplingOptions
from bitquest.models import Llama

_GREEDY = SamplingOptions(temperature=0.0)


class Runner(Protocol):
    """One model, ready to be timed."""

    def decode(self, tokens: int) -> float:
        """Seconds a token of decoding `tokens` tokens one by one after a prompt of one token."""

    def prefill(self, tokens: int) -> float:
        """Seconds until the first new token after a prompt of `tokens` tokens."""


def prompt_of(tokens: int, vocabulary: int) -> list[int]:
    """Random ids, the same for every model of this vocabulary."""
    return torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()


class Generating:
    """A model through `bitquest.inference.generate`."""

    def __init__(self, model: Llama) -> None:
        self.model = model

    def decode(self, tokens: int) -> float:
        speed = self._run(1, tokens + 1)
        return speed.seconds / speed.tokens

    def prefill(self, tokens: int) -> float:
        return self._run(tokens, 1).prompt_seconds

    def _run(self, prompt: int, new: int) -> Speed:
        speed = Speed()
        for _ in generate(self.model, prompt_of(prompt, self.model.config.vocab_size), new, _GREEDY, speed=speed):
            pass
        return speed


class _LastToken(nn.Module):
    """A head that is only asked about the last position."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x_BTD: Tensor) -> Tensor:
        made: Tensor = self.head(x_BTD[:, -1:])
        return made


class PlainTorch:
    """An unquantized model in the dtype of its weights, the best that plain PyTorch does."""

    def __init__(self, model: Llama) -> None:
        self.model, self.dtype = model, model.lm_head.weight.dtype
        self.model.lm_head = _LastToken(model.lm_head)  # type: ignore[assignment]

    @torch.no_grad()
    def decode(self, tokens: int) -> float:
        cache, ids = self._cache(tokens + 1), torch.tensor([prompt_of(1, self.model.config.vocab_size)])
        ids = self._step(ids, cache)
        began = time.perf_counter()
        for _ in range(tokens):
            ids = self._step(ids, cache)
        return (time.perf_counter() - began) / tokens

    @torch.no_grad()
    def prefill(self, tokens: int) -> float:
        cache, ids = self._cache(tokens), torch.tensor([prompt_of(tokens, self.model.config.vocab_size)])
        began = time.perf_counter()
        self._step(ids, cache)
        return time.perf_counter() - began

    def _cache(self, positions: int) -> KVCache:
        return KVCache(self.model.config, positions=positions, dtype=self.dtype)

    def _step(self, ids: Tensor, cache: KVCache) -> Tensor:
        likeliest: Tensor = self.model(ids, cache)[:, -1].argmax(-1, keepdim=True)
        int(likeliest)
        return likeliest

"""How the next token is chosen from the logits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitquest.errors import ConfigError


@dataclass(frozen=True)
class SamplingOptions:
    """temperature 0 takes the likeliest token; top_k 0 and top_p 1 keep all. The seed makes a text repeatable.

    Raises ConfigError for values out of range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"the temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top-k must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"the seed must be a whole number from 0 to 2^63 - 1, not {self.seed}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top-p must be above 0 and at most 1, not {self.top_p}")


def probabilities(logits_V: Tensor, options: SamplingOptions) -> Tensor:
    """The distribution (V,) float32 that is sampled: temperature, then the k likeliest, then the smallest set whose
    probability reaches p (Holtzman et al., arXiv 1904.09751), renormalised."""
    logits_V = logits_V.float() / options.temperature
    if 0 < options.top_k < logits_V.shape[-1]:
        kept = torch.topk(logits_V, options.top_k).indices
        logits_V = torch.full_like(logits_V, -math.inf).index_copy_(0, kept, logits_V[kept])
    p_V = logits_V.softmax(-1)
    if options.top_p < 1:
        ordered, order = torch.sort(p_V, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        p_V = torch.zeros_like(p_V).index_copy_(0, order, ordered.masked_fill(before >= options.top_p, 0.0))
        p_V = p_V / p_V.sum()
    return p_V


def choose(logits_V: Tensor, options: SamplingOptions, generator: torch.Generator) -> int:
    """One token id from logits (V,)."""
    if options.temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial(probabilities(logits_V, options).cpu(), 1, generator=generator))

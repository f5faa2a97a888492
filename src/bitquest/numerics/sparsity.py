"""Sparsity: which elements of a row are kept at all, by rotated magnitude (METHOD, "Sparse representations")."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitquest.errors import ConfigError


@dataclass(frozen=True)
class Dense:
    """Every element is kept."""

    def check(self, width: int) -> None:
        """Raise ConfigError where a row of `width` cannot carry the pattern."""

    def kept(self, x: Tensor) -> Tensor | None:
        """None: nothing is dropped."""
        return None

    def to_json(self) -> dict[str, Any]:
        return {"kind": "dense"}


@dataclass(frozen=True)
class NofM:
    """Keep the n largest of every m consecutive elements; with `pair`, of every m consecutive pairs by their L2 norm.

    2:4 is NofM(2, 4); 4:8 in pairs is NofM(2, 4, pair=True). Equal magnitudes: the earlier one is kept.
    """

    n: int
    m: int
    pair: bool = False

    def __post_init__(self) -> None:
        integers = all(isinstance(number, int) and not isinstance(number, bool) for number in (self.n, self.m))
        if not (integers and 1 <= self.n < self.m <= 32):
            raise ConfigError(f"N:M sparsity needs 1 ≤ n < m ≤ 32, not {self.n}:{self.m}")

    @property
    def span(self) -> int:
        """Consecutive elements that one choice covers."""
        return self.m * (2 if self.pair else 1)

    def check(self, width: int) -> None:
        if width % self.span:
            raise ConfigError(
                f"{self.n}:{self.m} sparsity covers {self.span} elements at a time; width {width} is no multiple"
            )

    def kept(self, x: Tensor) -> Tensor:
        """The mask (bool, shape of x) of kept elements along the last dimension."""
        self.check(x.shape[-1])
        groups = x.unflatten(-1, (-1, self.m, 2 if self.pair else 1))
        magnitude = groups.square().sum(-1) if self.pair else groups.abs().squeeze(-1)
        order = torch.sort(magnitude, dim=-1, descending=True, stable=True).indices[..., : self.n]
        chosen = torch.zeros_like(magnitude, dtype=torch.bool).scatter_(-1, order, True)
        return chosen.unsqueeze(-1).expand(groups.shape).reshape(x.shape)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "n_of_m", "n": self.n, "m": self.m, "pair": self.pair}


Sparsity = Dense | NofM
ALL_SPARSITIES: tuple[Sparsity, ...] = (Dense(), NofM(2, 4), NofM(2, 4, pair=True), NofM(1, 4))


def sparsity_from_json(fields: dict[str, Any]) -> Sparsity:
    """The sparsity that `to_json` described."""
    match fields:
        case {"kind": "dense", **rest} if not rest:
            return Dense()
        case {"kind": "n_of_m", "n": n, "m": m, "pair": bool(pair), **rest} if not rest:
            return NofM(n, m, pair)
    raise ConfigError(f"not a sparsity: {fields!r}; expected kind 'dense' or 'n_of_m' (n, m, pair)")

"""What a linear layer computes, as the operators take it: sizes, two quantizers and a rotation, as text."""

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache

from bitquest.numerics.integers import IntegerForm, integer_form
from bitquest.numerics.quantizer import Quantizer


@dataclass(frozen=True)
class LinearSpec:
    """y (T, N) = Q(xH) Q(WH)ᵀ + b. None leaves an operand rotated and not quantized. block 1: no rotation."""

    in_features: int
    out_features: int
    weight: Quantizer | None
    activation: Quantizer | None
    block: int

    @cached_property
    def text(self) -> str:
        """The specification as the operators take it; `LinearSpec.of` reads it."""
        operands = [None if q is None else q.to_json() for q in (self.weight, self.activation)]
        return json.dumps([self.in_features, self.out_features, *operands, self.block], separators=(",", ":"))

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(text: str) -> "LinearSpec":
        n_in, n_out, weight, activation, block = json.loads(text)
        made = [None if q is None else Quantizer.from_json(q) for q in (weight, activation)]
        return LinearSpec(n_in, n_out, made[0], made[1], block)

    @cached_property
    def weight_form(self) -> IntegerForm | None:
        """The integers of the weight's grid, if it has a grid and the grid has integers."""
        return None if self.weight is None else integer_form(self.weight.grid)

    @cached_property
    def input_form(self) -> IntegerForm | None:
        return None if self.activation is None else integer_form(self.activation.grid)

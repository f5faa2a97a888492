"""What a linear layer computes, as the operators take it: sizes, two quantizers and a rotation, as text."""

import json
from dataclasses import dataclass, field
from functools import lru_cache

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
    # Made once, at the start: torch.compile cannot enter the lock of a cached property.
    text: str = field(init=False, compare=False, repr=False)  # as the operators take it; `LinearSpec.of` reads it
    weight_form: IntegerForm | None = field(init=False, compare=False, repr=False)  # integers of the weight's grid
    input_form: IntegerForm | None = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        operands = [None if q is None else q.to_json() for q in (self.weight, self.activation)]
        fields = [self.in_features, self.out_features, *operands, self.block]
        object.__setattr__(self, "text", json.dumps(fields, separators=(",", ":")))
        forms = [None if q is None else integer_form(q.grid) for q in (self.weight, self.activation)]
        object.__setattr__(self, "weight_form", forms[0])
        object.__setattr__(self, "input_form", forms[1])

    @staticmethod
    @lru_cache(maxsize=1024)
    def of(text: str) -> "LinearSpec":
        n_in, n_out, weight, activation, block = json.loads(text)
        made = [None if q is None else Quantizer.from_json(q) for q in (weight, activation)]
        return LinearSpec(n_in, n_out, made[0], made[1], block)

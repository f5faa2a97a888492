"""The scaling law of low-bit training: L(N, D, P) = A/(N·eff(P))^α + B/D^β + E.

N parameters without token table and head, D training tokens, P the number format: a model of N parameters in format P
learns like one of N·eff(P) unquantized parameters. Constants are the published fit (METHOD, "Scaling law"),
to 104 runs on C4 with Llama-type models; nothing here fits.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from bitquest.errors import ConfigError


@dataclass(frozen=True)
class ScalingLaw:
    """The five constants of the law; losses are in nats per token."""

    a: float
    alpha: float
    b: float
    beta: float
    e: float

    def loss(self, parameters: float, tokens: float, efficiency: float = 1.0) -> float:
        """Loss of a model of N `parameters` (no token table, no head) after D `tokens`, at eff(P) `efficiency`."""
        if not (parameters > 0 and tokens > 0 and efficiency > 0):
            raise ConfigError("the scaling law takes positive numbers of parameters and tokens")
        return float(self.a / (parameters * efficiency) ** self.alpha + self.b / tokens**self.beta + self.e)

    def size(self, loss: float, efficiency: float = 1.0, tokens_per_parameter: float = 100.0) -> float:
        """The N whose loss is `loss` when trained on N·tokens_per_parameter tokens.

        Raises ConfigError for a loss that no model from a thousand to 10^18 parameters has.
        """
        low, high = math.log(1e3), math.log(1e18)
        at_low, at_high = (self._at(size, efficiency, tokens_per_parameter) for size in (low, high))
        if not at_high < loss < at_low:
            raise ConfigError(
                f"no size has a loss of {loss:g} in this format: the law gives {at_high:.3g} to {at_low:.3g} nats"
            )
        for _ in range(200):  # bisection: the loss falls with the size
            middle = (low + high) / 2
            if self._at(middle, efficiency, tokens_per_parameter) > loss:
                low = middle
            else:
                high = middle
        return math.exp((low + high) / 2)

    def _at(self, log_size: float, efficiency: float, tokens_per_parameter: float) -> float:
        size = math.exp(log_size)
        return self.loss(size, size * tokens_per_parameter, efficiency)


PUBLISHED = ScalingLaw(a=8.1340, alpha=0.062727, b=86.412, beta=0.241288, e=0.001423)

# eff(P) by format, named as schemes are. "norot": without the rotation.
EFFICIENCY: dict[str, float] = {
    "bf16": 1.0,
    "w1a1": 0.0205,
    "w2a2": 0.152,
    "w3a3": 0.433,
    "w4a4": 0.692,
    "w8a8": 1.016,
    "w4a4-fp4": 0.630,
    "w4a4-4:8": 0.381,
    "w1a16": 0.138,
    "w2a16": 0.414,
    "w3a16": 0.653,
    "w4a16": 0.840,
    "w1a1-norot": 0.0156,
    "w2a2-norot": 0.0784,
    "w3a3-norot": 0.322,
    "w4a4-norot": 0.603,
    "w8a8-norot": 0.938,
}

# What the fit has seen: beyond it the law is an extrapolation.
FITTED_PARAMETERS = (30_482_560, 822_151_168)
FITTED_TOKENS_PER_PARAMETER = (24.3, 100.9)
FITTED_LOSSES = (2.461, 3.987)


def efficiency_of(format_name: str) -> tuple[float, str]:
    """The published eff(P) of a format and the format that it was taken from; see `efficiency_in`."""
    return efficiency_in(format_name, EFFICIENCY)


def efficiency_in(format_name: str, efficiencies: Mapping[str, float]) -> tuple[float, str]:
    """eff(P) of a format in a table of fitted ones, and the entry that it was taken from.

    A format that was not fitted is taken as the same one with unquantized tables (-h8, -h4), then with unquantized
    activations for 8-bit ones. Raises ConfigError if none of these is there.
    """
    plain = re.sub("-h[48](?=@|$)", "", format_name)
    for name in (format_name, plain, plain.replace("a8", "a16", 1)):
        if name in efficiencies:
            return efficiencies[name], name
    raise ConfigError(f"the scaling law knows no format {format_name!r}; it has {', '.join(efficiencies)}")


def is_extrapolated(parameters: float) -> bool:
    """Whether a size lies outside what the law was fitted to."""
    return not FITTED_PARAMETERS[0] <= parameters <= FITTED_PARAMETERS[1]

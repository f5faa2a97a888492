"""Quantities as people write them: 2GB, 100B tokens, 20ms, 100 H100-hours, $5000."""

import math
import re
from dataclasses import dataclass

from bitquest.errors import ConfigError

_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_BYTES = {"": 1.0, "b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
          "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30, "tib": 2.0**40}  # fmt: skip
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBER = r"([0-9][0-9_,]*(?:\.[0-9]*)?(?:e[+-]?[0-9]+)?|\.[0-9]+)"


@dataclass(frozen=True)
class Budget:
    """What training may cost: one of hours on a named machine, dollars, floating-point operations."""

    hours: float | None = None
    machine: str | None = None
    dollars: float | None = None
    flops: float | None = None


def _split(option: str, text: str, units: dict[str, float], example: str) -> float:
    found = re.fullmatch(_NUMBER + r"\s*([a-zµ]*)", text.strip().lower())
    if found is None or found[2] not in units:
        raise ConfigError(f"{option} {text!r}: not a quantity; write for example {example}")
    value = float(found[1].replace(",", "").replace("_", "")) * units[found[2]]
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{option} {text!r}: must be more than nothing; write for example {example}")
    return value


def parse_count(option: str, text: str) -> float:
    """100B, 3.5M, 2e10 as a number: k, M, B (or G) and T are thousands. Raises ConfigError naming the option."""
    return _split(option, re.sub(r"\s*tokens?$", "", text.strip(), flags=re.I), _COUNTS, "100B, 500M or 2e10")


def parse_bytes(option: str, text: str) -> float:
    """2GB, 512 MiB, 300000 as bytes; GB are 10^9, GiB 2^30. Raises ConfigError naming the option."""
    return _split(option, text, _BYTES, "2GB, 512MB or 1GiB")


def parse_seconds(option: str, text: str) -> float:
    """20ms, 0.5s, 300us as seconds; a unit has to be there. Raises ConfigError naming the option."""
    return _split(option, text, _SECONDS, "20ms or 0.5s")


def parse_budget(option: str, text: str) -> Budget:
    """`100 H100-hours`, `$5000`, `5000 USD`, `1e21 FLOP`. Raises ConfigError naming the option."""
    example = '"100 H100-hours", "$5000" or "1e21 FLOP"'
    clean = text.strip()
    hours = re.fullmatch(_NUMBER + r"\s*([a-z0-9_.]+)[-\s]hours?", clean, re.I)
    dollars = re.fullmatch(rf"\$\s*{_NUMBER}\s*([kmb]?)|{_NUMBER}\s*([kmb]?)\s*(?:usd|dollars?|\$)", clean, re.I)
    flops = re.fullmatch(_NUMBER + r"\s*flops?", clean, re.I)
    if hours:
        return Budget(hours=_split(option, hours[1], {"": 1.0}, example), machine=hours[2].lower())
    if dollars:
        amount = (dollars[1] or dollars[3]) + (dollars[2] or dollars[4] or "")
        return Budget(dollars=_split(option, amount, _COUNTS, example))
    if flops:
        return Budget(flops=_split(option, flops[1], {"": 1.0}, example))
    raise ConfigError(f"{option} {text!r}: not a budget; write for example {example}")

"""Machines that plans are made for: speed, memory, bandwidth, price; each number with its source and date.

Prices are assumptions: they change from week to week, and a file of one's own replaces them.
"""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bitquest.errors import ConfigError
from bitquest.models.config import nearest


@dataclass(frozen=True)
class Hardware:
    """One machine or card. peak_tflops: dense bf16, None where nobody trains on it; memory in GB (10^9 bytes), for CPUs
    what programs may use of the usual equipment; bandwidth in GB/s; price_per_hour in dollars, None for not rented.
    """

    name: str
    memory_gb: float
    bandwidth_gbs: float
    source: str
    date: str
    peak_tflops: float | None = None
    price_per_hour: float | None = None
    price_source: str = ""
    note: str = ""

    @property
    def trains(self) -> bool:
        """Whether training on it can be planned."""
        return self.peak_tflops is not None


_RUNPOD = "RunPod's list, as deploybase.ai/articles/runpod-gpu-pricing gives it, 2026-03-10"
_TWO_CHANNELS = "two 64-bit channels of 5600 MT/s: 2 · 8 · 5.6 GB/s (JEDEC JESD79-5)"

HARDWARE: dict[str, Hardware] = {
    machine.name: machine
    for machine in (
        Hardware(
            "h100", 80, 3350, "NVIDIA H100 SXM data sheet", "2023-03", 989.4, 2.69, _RUNPOD, "989.4 is without sparsity"
        ),
        Hardware("h200", 141, 4800, "NVIDIA H200 SXM data sheet", "2023-11", 989.4, 3.59, _RUNPOD),
        Hardware("a100", 80, 2039, "NVIDIA A100 80GB SXM data sheet", "2021-06", 312, 1.39, _RUNPOD),
        Hardware(
            "rtx4090", 24, 1008, "NVIDIA Ada GPU architecture whitepaper", "2022-09", 165.2, 0.34, _RUNPOD,
            "bf16 with float32 accumulation",
        ),
        Hardware("desktop", 32, 89.6, _TWO_CHANNELS, "2020-07", note="DDR5-5600"),
        Hardware("m4", 16, 120, "Apple, M4 announcement", "2024-05"),
        Hardware("phone", 8, 68.3, "64 bits of LPDDR5X-8533: 8 · 8.533 GB/s (JEDEC JESD209-5B)", "2021-07"),
        Hardware("pi5", 8, 17.1, "32 bits of LPDDR4X-4267: 4 · 4.267 GB/s (Raspberry Pi 5 product brief)", "2023-09"),
    )
}  # fmt: skip

_NUMBERS = ("memory_gb", "bandwidth_gbs", "peak_tflops", "price_per_hour")


def find_hardware(name: str, own: Path | None = None) -> Hardware:
    """A machine by name, of a file of one's own first, then of the table. Raises ConfigError naming what there is."""
    known = dict(HARDWARE) | (_read(own) if own is not None else {})
    key = name.strip().lower()
    if key not in known:
        hint = nearest(key, known)
        raise ConfigError(f"unknown hardware {name!r}{hint}{' There' if hint else '; there'} are {', '.join(known)}")
    return known[key]


def _read(path: Path) -> dict[str, Hardware]:
    """Machines of a TOML file: a table each, with Hardware's fields; what a known machine's table leaves out stays."""
    from bitquest.training.toml import read_toml

    found = {}
    fields = {field.name for field in dataclasses.fields(Hardware)} - {"name"}
    for name, table in read_toml(path).items():
        where = f"{path}: [{name}]"
        if not isinstance(table, Mapping):
            raise ConfigError(f"{where}: a machine is a table with the keys {', '.join(sorted(fields))}")
        for key, value in table.items():
            if key not in fields:
                raise ConfigError(f"{where}: unknown key {key!r}{nearest(key, fields)}")
            if key in _NUMBERS:
                _check(f"{where}: {key}", value)
            elif not isinstance(value, str):
                raise ConfigError(f"{where}: {key} must be text, not {value!r}")
        key = name.lower()
        given: dict[str, typing.Any] = {**table, "source": table.get("source", f"{path}")}
        if key in HARDWARE:
            if "price_per_hour" in table:
                given.setdefault("price_source", str(path))
            found[key] = dataclasses.replace(HARDWARE[key], **given)
            continue
        missing = [name for name in ("memory_gb", "bandwidth_gbs") if name not in table]
        if missing:
            raise ConfigError(f"{where}: {' and '.join(missing)} missing")
        found[key] = Hardware(**{"name": key, "date": "", "price_source": str(path), **given})
    return found


def _check(where: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{where} must be a positive number, not {value!r}")

"""What every part of the GPU benchmark is given: the device, the backend, sizes, rounds; and what the device is."""

import gc
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bitquest.benchmarks.gpu_table import Sizes
from bitquest.nn import PackedLinear, QuantizedLinear
from bitquest.ops.backend import Backend, backend_for, resolve_backend
from bitquest.ops.linear_spec import LinearSpec

_CPU_L2_BYTES = 2**12  # for dry runs: small, so that two copies do


@dataclass
class Context:
    """One process's measurements. backend: for packed layers and training; `torch` on a CPU."""

    device: torch.device
    backend: str
    sizes: Sizes
    rounds: int
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device).manual_seed(self.seed)

    @property
    def chosen(self) -> Backend:
        """The backend as the layers take it."""
        return resolve_backend(self.backend)

    @property
    def l2_bytes(self) -> int:
        if self.device.type != "cuda":
            return _CPU_L2_BYTES
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def free(self) -> None:
        """Give memory back between two measurements."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def packed_backend(layer: PackedLinear) -> str:
    """Which code runs a packed layer where it is."""
    spec = LinearSpec(
        layer.in_features, layer.out_features, layer.weight_spec, layer.activation_spec, layer.rotation.block
    )
    assert layer.packed is not None
    return backend_for(layer.backend, spec, layer.packed.device.type).value


def training_backend(layer: QuantizedLinear) -> str:
    """Which code trains a layer where it is."""
    weight, activation = layer.weight_quantizer.spec, layer.activation_quantizer.spec
    spec = LinearSpec(layer.in_features, layer.out_features, weight, activation, layer.rotation.block)
    return backend_for(layer.backend, spec, layer.weight.device.type, training=True).value


def describe_device(device: torch.device) -> dict[str, Any]:
    """GPU, driver and the versions that make the code, as plain JSON values; None for what is not there."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    fields: dict[str, Any] = {
        "gpu": None,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        fields |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    return fields


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()
        if said:
            return said[0]
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        return Path("/sys/module/nvidia/version").read_text(encoding="utf-8").strip()
    except OSError:
        return None

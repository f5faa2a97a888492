"""What a measurement was made on: without it a number means nothing."""

import datetime
import os
import platform
from pathlib import Path
from typing import Any

# Instruction sets that matter to low-bit arithmetic, as /proc/cpuinfo spells them.
_ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_vpopcntdq", "avx_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm")


def describe() -> dict[str, Any]:
    """Date, processor, instruction sets, cores, memory, GPU and versions, as plain JSON values."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": _cpu_name(),
        "isa": _isa(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpuinfo(*keys: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() in keys), "")


def _cpu_name() -> str:
    return _cpuinfo("model name", "Model") or platform.processor() or platform.machine()


def _isa() -> list[str]:
    flags = set(_cpuinfo("flags", "Features").split())
    return [name for name in _ISA if name in flags]


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None

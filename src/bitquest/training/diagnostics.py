"""What metrics say about the machine: time spent in steps, memory, and what bit-identical resumption depends on."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_MEBIBYTE = 2**20


class StepClock:
    """Seconds spent in training steps, without evaluation and saving; `lap` tells the time since the last lap."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._offset = seconds - time.perf_counter()
        self._paused_at: float | None = None
        self._lap_started = seconds

    @property
    def seconds(self) -> float:
        """Since the run began, over all its sessions."""
        return self._offset + (time.perf_counter() if self._paused_at is None else self._paused_at)

    def lap(self) -> float:
        """Seconds since the last lap, and starts the next one."""
        now = self.seconds
        started, self._lap_started = self._lap_started, now
        return now - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what happens inside."""
        self._paused_at = time.perf_counter()
        try:
            yield
        finally:
            self._offset -= time.perf_counter() - self._paused_at
            self._paused_at = None


def memory_mb(device: torch.device) -> float:
    """MiB: the most a GPU's allocator has held in this process, or what this process has resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MEBIBYTE
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / _MEBIBYTE
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / (_MEBIBYTE if sys.platform == "darwin" else 1024)


def environment(device: torch.device) -> dict[str, str | int]:
    """What floating-point results depend on besides the configuration."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": name}

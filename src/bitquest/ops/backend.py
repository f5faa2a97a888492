"""Which code runs a layer. Probed once, and chosen when a layer is made or moved; never inside forward."""

import os
from collections.abc import Callable
from enum import StrEnum
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch

from bitquest.errors import ConfigError
from bitquest.ops.engine import Engine, TorchEngine
from bitquest.ops.linear_spec import LinearSpec

AUTO_MEANS = "BITQUEST_BACKEND"  # environment variable: the backend that `auto` stands for, to look for a fault


class BackendError(ConfigError):
    """A backend was asked for by name and cannot do it."""


class WrongDeviceError(BackendError):
    """A backend was asked for by name, and the layer is not on one of its devices (yet)."""


class Backend(StrEnum):
    """Names a user can ask for. `auto` is the fastest one that is there."""

    AUTO = "auto"
    CUDA = "cuda"
    TRITON = "triton"
    NATIVE = "native"
    TORCH = "torch"


class BackendReport(NamedTuple):
    """One line of `bitquest doctor`."""

    name: str
    available: bool
    reason: str


def interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU, on CPU tensors: for tests, and slow."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _devices(backend: Backend) -> tuple[str, ...]:
    """Types of device whose tensors a backend takes."""
    match backend:
        case Backend.NATIVE:
            return ("cpu",)
        case Backend.TRITON:
            return ("cpu",) if interpreted() else ("cuda",)
        case Backend.CUDA:
            return ("cuda",)
    return ()


def _triton() -> tuple[bool, str]:
    if find_spec("triton") is None:
        return False, "Triton is not installed; PyTorch's CUDA builds for Linux bring it"
    if interpreted():
        return True, "Triton's interpreter on the CPU (TRITON_INTERPRET=1): for tests, and slow"
    if not torch.cuda.is_available():
        return False, "no CUDA device that PyTorch can use"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        return False, f"the GPU has compute capability {major}.{minor}; the kernels need 8.0 (Ampere) or newer"
    return True, "fused quantization, int8 and few-bit products in Triton"


def _cuda() -> tuple[bool, str]:
    if interpreted():
        return False, "TRITON_INTERPRET=1 runs the kernels beside it on the CPU"
    there, reason = _triton()
    if not there:
        return False, reason
    from bitquest.ops.cuda.one_bit import availability

    return availability()


def _probe(backend: Backend) -> tuple[bool, str]:
    match backend:
        case Backend.CUDA:
            return _cuda()
        case Backend.TRITON:
            return _triton()
        case Backend.NATIVE:
            from bitquest.ops.native import availability

            return availability()
        case Backend.TORCH:
            return True, "exact integers through torch's int8 matrix product; runs wherever torch does"
    raise AssertionError(f"{backend} has no probe")


@cache
def backend_report() -> tuple[BackendReport, ...]:
    """Every backend, whether it can be used here, and why or why not. Fastest first."""
    return tuple(BackendReport(b.value, *_probe(b)) for b in Backend if b != Backend.AUTO)


def _native_engine() -> Engine:
    from bitquest.ops.native_engine import NativeEngine

    return NativeEngine()


def _cuda_engine() -> Engine:
    from bitquest.ops.cuda.engine import CudaEngine

    return CudaEngine()


def _triton_engine() -> Engine:
    from bitquest.ops.triton.engine import TritonEngine

    return TritonEngine()


_MAKERS: dict[Backend, Callable[[], Engine]] = {
    Backend.CUDA: _cuda_engine,
    Backend.TRITON: _triton_engine,
    Backend.NATIVE: _native_engine,
    Backend.TORCH: TorchEngine,
}


@cache
def engine(backend: str) -> Engine:
    """The engine of a backend that is available."""
    return _MAKERS[Backend(backend)]()


def resolve_backend(name: str | Backend) -> Backend:
    """`name` as a Backend, `auto` included. Raises BackendError for one that is unknown or not available here."""
    if name == Backend.AUTO:
        return Backend.AUTO
    for report in backend_report():
        if report.name == name:
            if not report.available:
                raise BackendError(f"backend {report.name!r} is not available here: {report.reason}")
            return Backend(report.name)
    known = ", ".join(["auto", *(report.name for report in backend_report())])
    raise BackendError(f"unknown backend {str(name)!r}; this version has: {known}")


def preferred() -> Backend | None:
    """The backend that BITQUEST_BACKEND names for `auto`, None if it is not set. BackendError if it cannot be used."""
    named = os.environ.get(AUTO_MEANS, Backend.AUTO)
    try:
        found = resolve_backend(named)
    except BackendError as error:
        raise BackendError(f"{AUTO_MEANS}={named}: {error}") from None
    return None if found == Backend.AUTO else found


def backend_for(name: Backend, spec: LinearSpec, device: str, training: bool = False) -> Backend:
    """The backend that runs (or trains) a layer on a type of device.

    `auto` takes the one that BITQUEST_BACKEND names where it does, else the fastest available one that does, and torch
    where none does. Raises BackendError, with the reason, for another one that does not.
    """
    if name not in (Backend.AUTO, Backend.TORCH):
        if device not in _devices(name):
            takes = " or ".join(_devices(name))
            raise WrongDeviceError(
                f"backend {name.value!r} runs on {takes}, and the layer is on {device}: move it there"
            )
        reason = _refused(name, spec, training)
        if reason is not None:
            raise BackendError(f"backend {name.value!r}: {reason}")
    if name != Backend.AUTO:
        return name
    wanted = preferred()
    if wanted is not None:
        fits = device in _devices(wanted) and _refused(wanted, spec, training) is None
        return wanted if fits else Backend.TORCH
    for report in backend_report():
        candidate = Backend(report.name)
        if candidate == Backend.NATIVE and not report.available and os.environ.get("BITQUEST_ISA") and device == "cpu":
            raise BackendError(report.reason)  # somebody looks for a fault: torch would hide it
        if candidate == Backend.TORCH or not report.available or _only_asked(candidate):
            continue
        if device in _devices(candidate) and _refused(candidate, spec, training) is None:
            return candidate
    return Backend.TORCH


def _only_asked(backend: Backend) -> bool:
    return backend == Backend.TRITON and interpreted()


def _refused(backend: Backend, spec: LinearSpec, training: bool) -> str | None:
    made = engine(backend.value)
    return made.refuses_training(spec) if training else made.refuses(spec)

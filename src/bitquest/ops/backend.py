"""Which code runs an operation. Probed once, when a layer is made; never inside forward."""

from enum import StrEnum
from functools import cache
from typing import NamedTuple

from bitquest.errors import ConfigError


class Backend(StrEnum):
    """Names a user can ask for. `auto` is the fastest one that is there."""

    AUTO = "auto"
    TORCH = "torch"


class BackendReport(NamedTuple):
    """One line of `bitquest doctor`."""

    name: str
    available: bool
    reason: str


@cache
def backend_report() -> tuple[BackendReport, ...]:
    """Every backend, whether it can be used here, and why or why not. Fastest first."""
    return (
        BackendReport("torch", True, "exact integers through torch's int8 matrix product; runs wherever torch does"),
    )


def resolve_backend(name: str | Backend) -> Backend:
    """The backend that `name` stands for here. Raises ConfigError for one that is unknown or not available."""
    if name == Backend.AUTO:
        return Backend(next(report.name for report in backend_report() if report.available))
    for report in backend_report():
        if report.name == name:
            if not report.available:
                raise ConfigError(f"backend {report.name!r} is not available here: {report.reason}")
            return Backend(report.name)
    known = ", ".join(["auto", *(report.name for report in backend_report())])
    raise ConfigError(f"unknown backend {str(name)!r}; this version has: {known}")

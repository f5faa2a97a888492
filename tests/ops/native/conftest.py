"""The native engine once per instruction set: a copy of the library loads as another one, with another BITQUEST_ISA."""

import ctypes
import shutil
from pathlib import Path

import pytest

from bitquest.ops import native, native_abi

ISAS = native.isas() if native.availability()[0] else ("portable",)  # "portable" skips, with the reason
_copies: dict[str, ctypes.CDLL] = {}


@pytest.fixture(scope="session")
def library_of(tmp_path_factory: pytest.TempPathFactory):
    """A library that runs on one instruction set; skips where it, or the library, is not there."""

    def load(isa: str) -> ctypes.CDLL:
        library, reason = native_abi.open_library()
        if library is None:
            pytest.skip(reason)
        if isa not in library.bq_isa_available().decode().split():
            pytest.skip(f"this machine or build has no {isa}")
        if isa not in _copies:
            path = Path(shutil.copy(native_abi.LIBRARY, tmp_path_factory.mktemp("native") / f"{isa}.so"))
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("BITQUEST_ISA", isa)
                patch.setattr(native_abi, "LIBRARY", path)
                _copies[isa], reason = native_abi.open_library.__wrapped__()
            assert _copies[isa] is not None, reason
        return _copies[isa]

    return load


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, library_of, monkeypatch: pytest.MonkeyPatch) -> str:
    """The engine of `bitquest.ops.native`, on one instruction set after the other."""
    library = library_of(request.param)
    assert library.bq_isa().decode() == request.param
    monkeypatch.setattr(native_abi, "open_library", lambda: (library, ""))
    return request.param

"""NVRTC, NVIDIA's run-time compiler, through ctypes: CUDA C++ text in, machine code for one architecture out.

Needs no CUDA toolkit: torch's CUDA wheels bring the library. Needs no GPU and no driver either, so tests compile every
kernel for every architecture anywhere. Nothing is loaded when this module is imported.
"""

import ctypes
import glob
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from bitquest.errors import ConfigError

OLDEST = (12, 0)  # the first that knows sm_90a
_INSTALL = "install a CUDA build of torch, or `pip install nvidia-cuda-nvrtc`, or set CUDA_HOME to a CUDA toolkit"


class CompilerMissingError(ConfigError):
    """NVRTC is not installed, cannot be loaded or is too old."""


class CompileError(ConfigError):
    """NVRTC refused a source. The message carries the compiler's log."""


class Nvrtc:
    """A loaded NVRTC library.

    `path` is the library's file (or the name the system's loader found it by), `version` its (major, minor).
    """

    def __init__(self, path: str) -> None:
        """Load the library at `path`. Raises CompilerMissingError when it cannot be loaded or is older than OLDEST."""
        try:
            # NVRTC opens its built-ins by name alone, which finds them only if they are loaded or on the system's path.
            for builtins in glob.glob(str(Path(path).parent / "libnvrtc-builtins.so*")) if os.path.isabs(path) else ():
                ctypes.CDLL(builtins)
            self._library = ctypes.CDLL(path)
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:
            raise CompilerMissingError(f"{path} cannot be loaded as NVRTC: {error}; {_INSTALL}") from error
        self.path = path
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
        self.version = (major.value, minor.value)
        if self.version < OLDEST:
            found, needed = (".".join(map(str, version)) for version in (self.version, OLDEST))
            raise CompilerMissingError(f"NVRTC {found} in {path} is too old, {needed} or newer is needed; {_INSTALL}")

    def architectures(self) -> tuple[int, ...]:
        """The architectures this compiler can build for, as 10·major + minor, ascending: (75, 80, 86, …)."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "nvrtcGetNumSupportedArchs")
        found = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(found), "nvrtcGetSupportedArchs")
        return tuple(found)

    def compile(
        self,
        source: str,
        *,
        name: str,
        architecture: str,
        options: Sequence[str] = (),
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """Compile CUDA C++ to a cubin, the machine code of one architecture.

        `name` stands in the compiler's messages, `architecture` is "sm_80", "sm_90a", …, `options` are NVRTC's own
        (`-DNAME=value`), `headers` are the texts of the files that `#include <…>` may name: no folder is searched.
        Raises CompileError with the compiler's log.
        """
        headers = headers or {}
        program = ctypes.c_void_p()
        texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
        names = (ctypes.c_char_p * len(headers))(*(header.encode() for header in headers))
        result = self._library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), name.encode(), ctypes.c_int(len(headers)), texts, names
        )
        self._check(result, "nvrtcCreateProgram")
        try:
            arguments = [f"--gpu-architecture={architecture}", "--std=c++17", *options]
            encoded = (ctypes.c_char_p * len(arguments))(*(argument.encode() for argument in arguments))
            result = self._library.nvrtcCompileProgram(program, ctypes.c_int(len(arguments)), encoded)
            if result:
                log = self._read(program, "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace").strip()
                raise CompileError(
                    f"NVRTC {self.version[0]}.{self.version[1]} could not compile {name} for {architecture} "
                    f"({self._error(result)}), with {' '.join(options) or 'no options'}:\n{log}"
                )
            return self._read(program, "nvrtcGetCUBIN")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, function: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(self._library[f"{function}Size"](program, ctypes.byref(size)), f"{function}Size")
        buffer = ctypes.create_string_buffer(size.value)
        self._check(self._library[function](program, buffer), function)
        return buffer.raw

    def _error(self, result: int) -> str:
        return str(self._library.nvrtcGetErrorString(ctypes.c_int(result)).decode())

    def _check(self, result: int, function: str) -> None:
        if result:
            raise CompileError(f"{function} of {self.path} failed: {self._error(result)}")


@cache
def load_nvrtc() -> Nvrtc:
    """The compiler of this process: of torch's wheels, else of CUDA_HOME or CUDA_PATH, else of the system.

    Raises CompilerMissingError saying where it was looked for and how to install it.
    """
    return _first_that_loads(candidates())


def _first_that_loads(paths: Iterator[str], load: Callable[[str], Nvrtc] = Nvrtc) -> Nvrtc:
    refusals = []
    for path in paths:
        try:
            return load(path)
        except CompilerMissingError as error:
            refusals.append((path, error))
    files = [error for path, error in refusals if os.path.isabs(path)]
    if files:  # a library that is there and does not load says more than that the others are not there
        raise files[0]
    raise CompilerMissingError(f"NVRTC (libnvrtc.so) was found neither beside torch nor on this system; {_INSTALL}")


def candidates() -> Iterator[str]:
    """Where NVRTC may be, best first: files that exist, then names for the system's loader."""
    folders = [folder / part / "lib" for folder in _wheel_folders() for part in ("cu13", "cuda_nvrtc")]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            folders += [Path(os.environ[variable], part) for part in ("lib64", "lib", "targets/x86_64-linux/lib")]
    folders += [Path("/usr/local/cuda/lib64")]
    for folder in folders:
        found = glob.glob(str(folder / "libnvrtc.so*"))
        yield from sorted(found, key=len, reverse=True)[:1]  # libnvrtc.so.13.0.88 before its links
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


def _wheel_folders() -> list[Path]:
    """The folders of the `nvidia` namespace package, which torch's CUDA wheels share."""
    if not sys.platform.startswith("linux"):
        return []
    spec = importlib.util.find_spec("nvidia")
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []

"""Machine code kept between processes: one file per kernel source, compiler, architecture and options.

The files lie in `$BITQUEST_CACHE/cubin`, or `bitquest/cubin` in the user's cache folder. A file is written whole or not
at all, and is loaded only if it is this user's own, bears its key and matches its checksum; otherwise it is built anew.
Where nothing can be written, every process compiles for itself (a second or so per kernel).
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path

from bitquest.files import cache_folder
from bitquest.ops.cuda.driver import Function, Module, load_driver
from bitquest.ops.cuda.nvrtc import Nvrtc, load_nvrtc

_MAGIC = b"bitquest cubin 1\n"


@cache
def source(name: str) -> str:
    """The text of kernels/`name`."""
    return resources.files("bitquest.ops.cuda").joinpath("kernels", name).read_text(encoding="utf-8")


@cache
def headers() -> Mapping[str, str]:
    """The texts of kernels/*.cuh, which a kernel includes as <name.cuh>."""
    folder = resources.files("bitquest.ops.cuda").joinpath("kernels")
    return {file.name: source(file.name) for file in folder.iterdir() if file.name.endswith(".cuh")}


def cubin(name: str, architecture: str, options: Sequence[str] = (), compiler: Nvrtc | None = None) -> bytes:
    """The machine code of kernels/`name` ("b1_mma.cu") for `architecture` ("sm_90a"): from the cache, else compiled.

    Raises CompilerMissingError where there is no NVRTC and CompileError, with its log, where it refuses the source.
    """
    compiler = compiler or load_nvrtc()
    # All headers, since they include each other: building too often is better than running stale code.
    described = "\0".join((name, source(name), *headers(), *headers().values(), architecture, *options))
    described += "\0" + ".".join(map(str, compiler.version))
    key = hashlib.sha256(described.encode()).hexdigest()
    path = cache_folder() / "cubin" / f"{Path(name).stem}-{architecture}-{key[:32]}.cubin"
    image = _read(path, key)
    if image is None:
        image = compiler.compile(source(name), name=name, architecture=architecture, options=options, headers=headers())
        _write(path, key, image)
    return image


def _read(path: Path, key: str) -> bytes | None:
    """A whole, unharmed entry with this key, or None."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_uid != os.getuid():
                return None
            head, found_key, checksum, image = file.readline(), file.readline(), file.readline(), file.read()
    except OSError:
        return None
    if head != _MAGIC or found_key != f"{key}\n".encode():
        return None
    return image if checksum == f"{hashlib.sha256(image).hexdigest()}\n".encode() else None


def _write(path: Path, key: str, image: bytes) -> None:
    """Written aside and renamed, so that processes compiling the same kernel at once cannot harm each other."""
    content = _MAGIC + f"{key}\n{hashlib.sha256(image).hexdigest()}\n".encode() + image
    with suppress(OSError):  # a cache that cannot be written is not needed
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=".", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(aside, path)
        except OSError:
            Path(aside).unlink(missing_ok=True)
            raise


@cache
def _module(name: str, architecture: str, options: tuple[str, ...], device: int) -> Module:
    return load_driver().load(cubin(name, architecture, options), device)


@cache
def kernel(
    name: str, function: str, architecture: str, options: tuple[str, ...], shared_bytes: int, device: int
) -> Function:
    """The kernel `function` of kernels/`name`, compiled and loaded once per process and device."""
    return _module(name, architecture, options, device).function(function, shared_bytes=shared_bytes)

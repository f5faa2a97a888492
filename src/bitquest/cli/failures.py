"""Which failures are the user's to mend, and how they are told: what, where, what to do. Anything else is a bug."""

import errno
import re

# What to do about the operating system's refusals.
_ADVICE = {
    errno.ENOSPC: "make room, or choose another place",
    errno.EDQUOT: "make room, or choose another place",
    errno.EFBIG: "the system limits the size of files here; raise the limit, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "check the permissions, or choose another place",
    errno.EPERM: "check the permissions, or choose another place",
    errno.EEXIST: "something of this name is in the way; choose another",
    errno.ENOTDIR: "a folder is needed where there is a file; choose another place",
    errno.EISDIR: "a file is needed where there is a folder; choose another name",
    errno.ENOENT: "check the spelling",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def message_of(error: BaseException) -> str | None:
    """The message of a mistake or a missing resource; None for an error that should keep its traceback."""
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, ValueError):
        return str(error)
    return _of_memory(error)


def _of_system(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    advice = _ADVICE.get(error.errno or 0)
    return f"{where}{error.strerror}" + (f"; {advice}" if advice else "")


def _of_memory(error: BaseException) -> str | None:
    """PyTorch reports a failed allocation as a RuntimeError, on a GPU as a subclass of it."""
    if not isinstance(error, (MemoryError, RuntimeError)):
        return None
    if not isinstance(error, MemoryError) and not re.search(r"out of memory|can't allocate memory", str(error), re.I):
        return None
    wanted = re.search(r"allocate ([\d.]+ (?:bytes|[KMGT]iB))", str(error))
    asked = f" ({wanted[1]} were asked for at once)" if wanted else ""
    return (
        f"out of memory{asked}: take a smaller model, context or batch; when training, "
        "a larger train.accumulation computes the same step in smaller parts"
    )

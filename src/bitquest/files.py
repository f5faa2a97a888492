"""Files that are whole or not there: written aside, synced to the disk, renamed into place."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text_atomic(path: Path, text: str) -> None:
    """Write a small text file so that a reader, or a restart after a crash, sees all of it or the one before.

    Raises OSError naming the path.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON and sync it; for files inside a folder that is itself renamed into place."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_folder(folder: Path) -> None:
    """Remove a folder so that, interrupted half-way, what is left no longer bears its name."""
    aside = folder.with_name(f".{folder.name}.removed")
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(folder, aside)
    shutil.rmtree(aside)


def cache_folder() -> Path:
    """`$BITQUEST_CACHE`, else `$XDG_CACHE_HOME/bitquest`, else `~/.cache/bitquest`. Nothing is created."""
    chosen = os.environ.get("BITQUEST_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "bitquest")

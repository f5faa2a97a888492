"""Result files: one JSON object with what was measured, on what, when, and how to measure it again."""

import json
import os
from pathlib import Path
from typing import Any

from bitquest.benchmarks.hardware import describe
from bitquest.errors import ConfigError
from bitquest.files import write_text_atomic


def check_place(path: Path) -> None:
    """Raise ConfigError where no result could be written, before anything is measured."""
    if path.is_dir():
        raise ConfigError(f"{path}: this is a folder; name the file to write")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        raise ConfigError(f"{path}: {parent} is a file, and a folder is needed there; choose another place")
    if not os.access(parent, os.W_OK):
        raise ConfigError(f"{path}: {parent} cannot be written; choose another place")


def write_result(path: Path, command: str, fields: dict[str, Any]) -> None:
    """Write a benchmark's result aside and rename it into place. Raises OSError naming the path."""
    text = json.dumps({"command": command, "hardware": describe(), **fields}, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path, text)

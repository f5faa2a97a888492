"""Result files: one JSON object with what was measured, on what, when, and how to measure it again."""

import json
import os
from pathlib import Path
from typing import Any

from bitquest.benchmarks.hardware import describe


def write_result(path: Path, command: str, fields: dict[str, Any]) -> None:
    """Write a benchmark's result aside and rename it into place. Raises OSError naming the path."""
    text = json.dumps({"command": command, "hardware": describe(), **fields}, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".partial")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)

"""Where the commands speak: people read stderr, programs read one JSON object on stdout."""

import json
import sys
from typing import Any

from rich.console import Console

JSON_VERSION = 1

err = Console(stderr=True)
out = Console()


def print_json_object(command: str, fields: dict[str, Any]) -> None:
    """Print the one versioned object that `--json` promises, on stdout."""
    sys.stdout.write(json.dumps({"bitquest": JSON_VERSION, "command": command, **fields}) + "\n")
    sys.stdout.flush()

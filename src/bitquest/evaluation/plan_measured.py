"""How fast formats decode on a machine, from a result of `bitquest bench cpu --equal-loss`."""

import json
import math
from pathlib import Path

from bitquest.errors import DataError
from bitquest.evaluation.plan import Measured


def read_measured(path: Path) -> Measured:
    """Bytes per second of every format in the file: bytes a token reads over the median seconds of one.

    Raises DataError, naming the file, for anything else than such a result.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        speeds = {
            name: float(row["bytes_per_token"]) / float(row["decode"]["median_seconds"])
            for name, row in result["formats"].items()
        }
        machine = result["hardware"]
        where = f"{machine['cpu']}, {result['threads']} threads, {machine['date']} ({path})"
    except (
        UnicodeDecodeError,
        json.JSONDecodeError,
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        ZeroDivisionError,
    ):
        raise DataError(f"{path}: not a result of `bitquest bench cpu --equal-loss … --out {path.name}`") from None
    if not speeds or not all(math.isfinite(speed) and speed > 0 for speed in speeds.values()):
        raise DataError(f"{path}: no format has a speed in it")
    return Measured(speeds, where)

"""The little of TOML a configuration needs beyond the standard library: errors that help, writing, one value."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitquest.errors import ConfigError


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ConfigError for a file that is not there, not text or not TOML (line named)."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file. The repository's configs/ has examples.") from None
    except IsADirectoryError:
        inside = path / "config.toml"
        hint = f" Did you mean {inside}?" if inside.is_file() else " A configuration is a .toml file."
        raise ConfigError(f"{path}: this is a folder, not a configuration file.{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not a text file (byte {error.start} is not UTF-8). A configuration is TOML."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}. Strings need quotes, sections are [name].") from None


def parse_value(text: str) -> Any:
    """The value of `key=TEXT` on the command line: a TOML value, or the text itself where it is none (`w1a1`)."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return parsed["value"] if set(parsed) == {"value"} else text


def write_toml(tables: Mapping[str, Any]) -> str:
    """TOML text of plain values and one level of tables, values first. `tomllib.loads` gives an equal mapping back."""
    lines = [f"{key} = {_value(value)}" for key, value in tables.items() if not isinstance(value, Mapping)]
    for name, table in tables.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{name}]", *(f"{key} = {_value(value)}" for key, value in table.items())]
    return "\n".join(lines).lstrip("\n") + "\n"


def _value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            # JSON's escapes are TOML's, except that TOML wants DEL escaped too
            return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        case list() | tuple():
            return "[" + ", ".join(_value(item) for item in value) + "]"
    raise TypeError(f"no TOML for {value!r}")

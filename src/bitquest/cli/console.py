"""Where the commands speak: people read stderr, programs read one JSON object on stdout."""

import json
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from bitquest.evaluation.report_page import Table

JSON_VERSION = 1

err = Console(stderr=True)
out = Console()


def write_out(text: str) -> None:
    """Write text on stdout at once. Raises BrokenPipeError, and OSError that names standard output."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def print_json_object(command: str, fields: dict[str, Any]) -> None:
    """Print the one versioned object that `--json` promises, on stdout."""
    assert not {"bitquest", "command"} & set(fields), "the object's own keys"
    write_out(json.dumps({"bitquest": JSON_VERSION, "command": command, **fields}) + "\n")


def print_table(content: "Table") -> None:
    """Print a report's table on stderr: numbers flush right, long heads broken, verdicts coloured, its note below."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(
        title=content.title or None, title_justify="left", box=SIMPLE_HEAD, show_edge=False, collapse_padding=True
    )
    for number, column in enumerate(content.columns):
        widest = max(len(row[number]) for row in content.rows)
        head = column if len(column) <= widest else column.replace(" ", "\n")
        words = number == 0 or column in ("verdict", "why")
        table.add_column(head, justify="left" if words else "right", no_wrap=column != "why")
    styles = {"passed": "green", "failed": "bold red", "yes": "green", "no": "bold red"}
    for row in content.rows:
        table.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
    err.print("", table, "", sep="\n")
    err.print(content.note, soft_wrap=True, highlight=False, markup=False)

"""The `bitquest` command: collects the subcommands and turns a user's mistake into one clear message."""

import importlib
import importlib.util
import os
import sys

import typer
from rich.markup import escape

from bitquest import __version__
from bitquest.cli.console import err

ABOUT = (
    "Train Llama-type language models with 1- to 8-bit weights and activations, pack them, and run exactly those bits."
)

# One module per command with a function `command`; a group of commands (data, bench) has `app` instead.
COMMANDS = ("demo", "data", "train", "eval", "compare", "export", "verify", "generate", "bench", "doctor")

app = typer.Typer(
    name="bitquest",
    help=ABOUT,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"bitquest {__version__}")
        raise typer.Exit


@app.callback(help=ABOUT)
def _root(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    """Options of the command itself."""


for _name in COMMANDS:
    if importlib.util.find_spec(f"bitquest.cli.{_name}") is None:
        continue  # until every command is there
    _module = importlib.import_module(f"bitquest.cli.{_name}")
    if hasattr(_module, "app"):
        app.add_typer(_module.app, name=_name)
    else:
        app.command(_name)(_module.command)


def main() -> None:
    """Run the command line. A ValueError or OSError is the user's to mend: its message is shown alone, exit code 1.

    BITQUEST_TRACEBACK=1 shows the traceback as well, for reporting a bug.
    """
    try:
        app()
    except (ValueError, OSError) as error:
        if os.environ.get("BITQUEST_TRACEBACK"):
            raise
        err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()

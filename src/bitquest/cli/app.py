"""The `bitquest` command: collects the subcommands and turns a user's mistake into one clear message."""

import importlib
import io
import os
import sys
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from bitquest import __version__
from bitquest.cli.console import err
from bitquest.cli.failures import message_of

ABOUT = (
    "Train Llama-type language models with 1- to 8-bit weights and activations, pack them, and run exactly those bits."
)

# One module per command with a function `command`; a group of commands (data, bench) has `app` instead.
COMMANDS = (
    "demo",
    "data",
    "train",
    "eval",
    "compare",
    "diagnose",
    "scaling",
    "plan",
    "export",
    "verify",
    "generate",
    "bench",
    "doctor",
)


class _Commands(TyperGroup):
    """The commands in the order in which one meets them; Ctrl-C ends each of them alike."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in COMMANDS if name in self.commands]

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            err.print("interrupted")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="bitquest",
    cls=_Commands,
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
    _module = importlib.import_module(f"bitquest.cli.{_name}")
    if hasattr(_module, "app"):
        app.add_typer(_module.app, name=_name)
    else:
        app.command(_name)(_module.command)


def main() -> None:
    """Run the command line. What the user can mend is one message, with exit code 1; see `failures`.

    BITQUEST_TRACEBACK=1 shows the traceback as well, for reporting a bug.
    """
    _mend_streams()
    try:
        app()
    except Exception as error:
        message = message_of(error)
        if message is None or os.environ.get("BITQUEST_TRACEBACK"):
            raise
        err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)
        sys.exit(1)


def _mend_streams() -> None:
    """Streams that were closed swallow what is written; characters that a terminal cannot show appear as `?`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


if __name__ == "__main__":
    main()

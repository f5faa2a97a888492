"""`bitquest export`: pack a trained run into the directory that `generate`, `eval` and `load` read."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from bitquest.cli.console import err, print_json_object


def command(
    run: Annotated[Path, typer.Argument(help="Run directory that `bitquest train` wrote.")],
    out: Annotated[Path, typer.Option(help="Directory to write: the packed model.")],
    step: Annotated[
        int | None, typer.Option(help="Checkpoint to take; needed for a run that is not finished.", show_default="last")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a packed model that stands there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
) -> None:
    """Pack a trained model: codes of b bits, their scales, and everything else as trained."""
    from bitquest.export import packed_sizes, save
    from bitquest.training import load_run

    with err.status("reading the checkpoint") as status:
        loaded = load_run(run, step, require_finished=True)
        status.update("packing")
        save(loaded.model, out, loaded.tokenizer, loaded.metadata, overwrite=overwrite)
        sizes = packed_sizes(out)
    if json:
        print_json_object("export", {"run": str(run), "out": str(out), **loaded.metadata, **sizes})
    bits = 8 * sizes["total_bytes"] / sizes["parameters"]
    err.print(
        f"{out}: step {loaded.step}, {loaded.config.scheme}, {sizes['total_bytes'] / 1e6:.2f} MB "
        f"({sizes['linear_bytes'] / 1e6:.2f} blocks, {sizes['embedding_bytes'] / 1e6:.2f} embedding, "
        f"{sizes['head_bytes'] / 1e6:.2f} head), {bits:.2f} bits per parameter",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    err.print(
        f"Next: bitquest verify {shlex.quote(str(run))} {shlex.quote(str(out))}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )

"""`bitquest data`: text files to tokens on the disk, and a look at them."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from bitquest.cli.console import err, print_json_object

app = typer.Typer(help="Prepare text for training, and look at prepared data.", no_args_is_help=True)


@app.command("prepare")
def prepare(
    inputs: Annotated[list[Path], typer.Argument(help=".txt or .jsonl files (also .gz, .xz, .zst), or folders.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    tokenizer: Annotated[
        str, typer.Option(help="byte, bpe:SIZE (trained here), or a tokenizer.json or folder.")
    ] = "byte",
    val: Annotated[list[Path] | None, typer.Option(help="Text to hold out, instead of a part of the input.")] = None,
    val_fraction: Annotated[float, typer.Option(help="Part of the input to hold out for validation.")] = 0.01,
    text_field: Annotated[str, typer.Option(help="The field of a .jsonl line that holds the text.")] = "text",
    seed: Annotated[int, typer.Option(help="Decides which documents are held out.")] = 0,
    shard_tokens: Annotated[int, typer.Option(help="Tokens in one file, at most.")] = 1 << 26,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace prepared data in --out.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tokenize text into a folder that `bitquest train` reads."""
    from bitquest.training.prepare import prepare as prepare_data

    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}
        begun = 0.0

        def report(stage: str, done: int, total: int) -> None:
            nonlocal begun
            if stage not in tasks:
                tasks[stage], begun = bar.add_task(stage, total=total, rate=""), time.perf_counter()
            bar.update(tasks[stage], completed=done, total=total)

        def count_tokens(tokens: int) -> None:
            bar.update(next(reversed(tasks.values())), rate=f"{tokens / (time.perf_counter() - begun):,.0f} tokens/s")

        prepare_data(
            inputs,
            tokenizer,
            out,
            val_inputs=val or (),
            val_fraction=val_fraction,
            text_field=text_field,
            seed=seed,
            overwrite=overwrite,
            shard_tokens=shard_tokens,
            progress=report,
            on_tokens=count_tokens,
        )
    vocab_size = _describe(out, "data prepare", json)
    if tokenizer.startswith("bpe:") and vocab_size < int(tokenizer.removeprefix("bpe:")):
        err.print(f"note: the text has repetitions for a vocabulary of {vocab_size:,} only, not for {tokenizer}")


@app.command("show")
def show(
    directory: Annotated[Path, typer.Argument(help="A folder that `bitquest data prepare` wrote.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check prepared data against its checksums and summarise it."""
    from bitquest.training.data import open_tokens

    for split in ("train", "val"):
        open_tokens(directory, split)
    _describe(directory, "data show", json)


def _describe(directory: Path, command: str, json: bool) -> int:
    """Print what a prepared folder holds; returns the size of its vocabulary."""
    from bitquest.training.shards import read_manifest

    manifest = read_manifest(directory)
    splits = {
        name: {key: sum(shard[key] for shard in shards) for key in ("tokens", "utf8_bytes", "documents")}
        for name, shards in manifest["splits"].items()
    }
    if json:
        known = {key: manifest[key] for key in ("vocab_size", "eos_id", "dtype", "tokenizer_sha256")}
        print_json_object(command, {"directory": str(directory), **known, "splits": splits})
        return int(manifest["vocab_size"])
    table = Table(title=f"{directory}: vocabulary of {manifest['vocab_size']:,}")
    for heading in ("split", "tokens", "bytes of text", "bytes a token", "documents"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for name, sums in splits.items():
        ratio = f"{sums['utf8_bytes'] / max(1, sums['tokens']):.2f}"
        table.add_row(name, f"{sums['tokens']:,}", f"{sums['utf8_bytes']:,}", ratio, f"{sums['documents']:,}")
    err.print(table)
    return int(manifest["vocab_size"])

"""`bitquest export`: pack a trained run into the directory that `generate`, `eval` and `load` read."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitquest.cli.console import err, print_json_object

if TYPE_CHECKING:
    from torch import nn

    from bitquest.nn import TableRounding
    from bitquest.training.runs import LoadedRun

HELD_OUT_TOKENS = 8192


class Tables(StrEnum):
    """What becomes of a float embedding and head."""

    EIGHT = "8"
    FOUR = "4"
    FLOAT = "float"


def command(
    run: Annotated[Path, typer.Argument(help="Run directory that `bitquest train` wrote.")],
    out: Annotated[Path, typer.Option(help="Directory to write: the packed model.")],
    step: Annotated[
        int | None, typer.Option(help="Checkpoint to take; needed for a run that is not finished.", show_default="last")
    ] = None,
    tables: Annotated[
        Tables,
        typer.Option(help="Round a float embedding and head to so many bits, weight-only; float: leave as trained."),
    ] = Tables.FLOAT,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Held-out tokens to measure the rounding of --tables on.", show_default=str(HELD_OUT_TOKENS)
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a packed model that stands there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
) -> None:
    """Pack a trained model: codes of b bits, their scales, and everything else as trained."""
    from bitquest.errors import ConfigError
    from bitquest.export import packed_sizes, save
    from bitquest.training import load_run

    if tokens is not None and tables is Tables.FLOAT:
        raise ConfigError("--tokens is for the rounding of tables; add --tables 8 or --tables 4, or leave it out")
    with err.status("reading the checkpoint") as status:
        loaded = load_run(run, step, require_finished=True)
        rounding, replaced = _round(loaded, tables)
        noted = {**loaded.metadata, **({} if rounding is None else {"tables": rounding.to_json()})}
        status.update("packing")
        save(loaded.model, out, loaded.tokenizer, noted, overwrite=overwrite)
        sizes = packed_sizes(out)
    bits = 8 * sizes["total_bytes"] / sizes["parameters"]
    _say(
        f"{out}: step {loaded.step}, {loaded.config.scheme}, {sizes['total_bytes'] / 1e6:.2f} MB "
        f"({sizes['linear_bytes'] / 1e6:.2f} blocks, {sizes['embedding_bytes'] / 1e6:.2f} embedding, "
        f"{sizes['head_bytes'] / 1e6:.2f} head), {bits:.2f} bits per parameter"
    )
    result = {"run": str(run), "out": str(out), "tables": None, **noted, **sizes, "rounding": None}
    if rounding is not None:
        result["rounding"] = _measure(loaded, out, rounding, replaced, sizes, tokens or HELD_OUT_TOKENS)
    if json:
        print_json_object("export", result)
    _say(f"Next: bitquest verify {shlex.quote(str(run))} {shlex.quote(str(out))}")


def _round(loaded: "LoadedRun", tables: Tables) -> tuple["TableRounding | None", dict[str, "nn.Module"]]:
    """Round the tables of a loaded model in place; how, and the float ones by name."""
    if tables is Tables.FLOAT:
        return None, {}
    from bitquest.errors import ConfigError
    from bitquest.nn import Scheme, TableRounding, round_tables_

    rounding = TableRounding.to_bits(int(tables), Scheme.parse(loaded.config.scheme).rotation)
    try:
        return rounding, round_tables_(loaded.model, rounding)
    except ConfigError as error:
        raise ConfigError(
            f"--tables {tables} does not fit a run of scheme {loaded.config.scheme}: {error}. Leave --tables out"
        ) from None


def _measure(
    loaded: "LoadedRun",
    out: Path,
    rounding: "TableRounding",
    tables: dict[str, "nn.Module"],
    sizes: dict[str, int],
    tokens: int,
) -> dict[str, Any]:
    """Say what rounding saved and what it cost, as far as the data are at hand; the model is written already."""
    from rich.progress import Progress

    from bitquest.errors import DataError
    from bitquest.evaluation.table_rounding import float_bytes, held_out, rounding_cost

    before, after = float_bytes(tables), sizes["embedding_bytes"] + sizes["head_bytes"]
    found: dict[str, Any] = {"float_bytes": before, "saved_bytes": before - after, "not_measured": None}
    saved = f"Embedding and head: rounded after training to {rounding.bits} bits, {(before - after) / 1e6:.2f} MB saved"
    try:
        text = held_out(loaded.config.data.path, loaded.tokenizer, tokens)
        with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
            task = bar.add_task("measuring the rounding", total=None)
            cost = rounding_cost(out, tables, text, lambda done, total: bar.update(task, completed=done, total=total))
    except DataError as error:
        _say(f"{saved}. Its perplexity difference was not measured: {error}. See bitquest eval --data")
        return {**found, "not_measured": str(error), "before": None, "after": None, "relative_change": None}
    _say(
        f"{saved}; perplexity {cost.before.perplexity:.4f} before, {cost.after.perplexity:.4f} after "
        f"({100 * cost.relative_change:+.2f} %), {cost.before.bits_per_byte:.4f} and {cost.after.bits_per_byte:.4f} "
        f"bits per byte, on {cost.after.tokens} held-out tokens"
    )
    return {**found, **cost.to_json()}


def _say(text: str) -> None:
    err.print(text, soft_wrap=True, highlight=False, markup=False)

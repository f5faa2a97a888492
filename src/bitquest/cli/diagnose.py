"""`bitquest diagnose`: look at what quantization does inside a trained model."""

import re
import shlex
from pathlib import Path
from typing import Annotated

import typer

from bitquest.cli.console import err, print_json_object, print_table


def command(
    run: Annotated[Path, typer.Argument(help="Run directory, or one of its checkpoints.")],
    step: Annotated[int | None, typer.Option(help="Checkpoint of the run.", show_default="last")] = None,
    scheme: Annotated[
        str | None, typer.Option(help="Quantize the trained weights so instead.", show_default="the run's")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Prepared data with a validation split.", show_default="the run's")
    ] = None,
    sequences: Annotated[int, typer.Option(help="Held-out sequences to look at.")] = 16,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the page, PNG and CSV files.", show_default="RUN/diagnose")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    backend: Annotated[str, typer.Option(help="Which code runs the layers; see bitquest doctor.")] = "torch",
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
) -> None:
    """Compare gradients with the unquantized ones, block by block; show masks, errors, outliers, steps and flips."""
    from bitquest.evaluation.diagnose import blocks_table, diagnose, write_diagnosis
    from bitquest.evaluation.figures import require_matplotlib

    require_matplotlib()
    with err.status("looking at the model"):
        made = diagnose(run, step=step, scheme=scheme, data=data, sequences=sequences, backend=backend, device=device)
        suffix = "" if scheme is None else "-" + re.sub(r"[^a-z0-9.+-]", "_", made.scheme)[:60]
        folder = out if out is not None else made.run / f"diagnose{suffix}"
        written = write_diagnosis(made, folder, _command_line(run, step, scheme, data, sequences, out))
    if json:
        print_json_object("diagnose", {"out": str(folder), **made.to_json()})
    print_table(blocks_table(made))
    err.print(f"Written: {', '.join(map(str, written))}", soft_wrap=True, highlight=False, markup=False)


def _command_line(
    run: Path, step: int | None, scheme: str | None, data: Path | None, sequences: int, out: Path | None
) -> str:
    options = {"--step": step, "--scheme": scheme, "--data": data, "--sequences": sequences, "--out": out}
    words = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    return shlex.join(["bitquest", "diagnose", str(run), *words])

"""`bitquest generate`: text from a packed model, streamed to the terminal."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from bitquest.cli.console import err, print_json_object, write_out
from bitquest.errors import DataError


def command(
    directory: Annotated[Path, typer.Argument(help="A packed model (bitquest export) or a Hugging Face Llama folder.")],
    prompt: Annotated[str, typer.Option(help="The beginning of the text; '-' reads it from standard input.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="At most this many new tokens.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher is livelier.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Choose among the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest tokens that reach this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, …; auto: a GPU if PyTorch sees one.")] = "auto",
    backend: Annotated[str, typer.Option(help="Which code runs the packed layers; see bitquest doctor.")] = "auto",
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end instead of streaming.")
    ] = False,
) -> None:
    """Write text with a packed model."""
    from bitquest.inference import SamplingOptions, Speed, TextEngine
    from bitquest.nn import running_backends

    options = SamplingOptions(temperature, top_k, top_p, seed)
    if prompt == "-":
        prompt = _standard_input()
    engine, speed = TextEngine.open(directory, backend, device), Speed()
    pieces: list[str] = []
    for piece in engine.write(prompt, max_tokens, options, speed):
        if not json:
            write_out(piece if pieces else prompt + piece)  # a prompt that is refused is not echoed
        pieces.append(piece)
    if json:
        fields = {
            "prompt": prompt,
            "text": "".join(pieces),
            "tokens": speed.tokens + 1,
            "stopped": speed.stopped,
            "backend": running_backends(engine.model),
            "tokens_per_second": speed.tokens_per_second,
            "prompt_tokens": speed.prompt_tokens,
            "prompt_tokens_per_second": speed.prompt_tokens_per_second,
        }
        print_json_object("generate", fields)
    else:
        write_out("\n" if pieces else prompt + "\n")
        err.print(
            f"[dim]{speed.tokens_per_second:.1f} tokens/s "
            f"(prompt of {speed.prompt_tokens} tokens: {speed.prompt_tokens_per_second:.0f} tokens/s) "
            f"on {running_backends(engine.model)}; stopped at {speed.stopped}[/]",
            soft_wrap=True,
        )


def _standard_input() -> str:
    """All text of standard input. Raises DataError if it is closed or not UTF-8."""
    if sys.stdin is None:
        raise DataError("--prompt - reads standard input, which is closed; give the text itself")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataError(f"standard input: not UTF-8 at byte {error.start}; convert the text to UTF-8 first") from None

"""`bitquest eval`: perplexity and bits per byte of a text under a model."""

from pathlib import Path
from typing import Annotated

import typer

from bitquest.cli.console import err, print_json_object


def command(
    model: Annotated[Path, typer.Argument(help="A packed model, a run directory, or a Hugging Face Llama folder.")],
    data: Annotated[Path, typer.Option(help="Text (.txt, .jsonl, compressed, a folder) or prepared data.")],
    tokens: Annotated[int | None, typer.Option(help="Evaluate at most so many tokens.", show_default="all")] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint of a run.", show_default="last")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens of a window.", show_default="the model's")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    backend: Annotated[str, typer.Option(help="Which code runs the packed layers; see bitquest doctor.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
) -> None:
    """Measure perplexity and bits per byte: non-overlapping windows, each token predicted once, float32."""
    from rich.progress import Progress

    from bitquest.evaluation.perplexity import evaluate_tokens
    from bitquest.evaluation.sources import open_model, open_stream

    with err.status("reading the model"):
        opened = open_model(model, step, backend, device)
    with err.status("reading the text"):
        stream = open_stream(data, opened.tokenizer, tokens)
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task("evaluating", total=stream.tokens.numel() - 1)
        result = evaluate_tokens(
            opened.model,
            stream.tokens,
            utf8_bytes=stream.utf8_bytes,
            context=context,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if json:
        print_json_object("eval", {"model": str(model), "kind": opened.kind, "data": str(data), **result.to_json()})
    err.print(
        f"{result.tokens} tokens, {result.utf8_bytes} bytes: loss {result.loss:.4f} nats per token, "
        f"perplexity {result.perplexity:.3f}, {result.bits_per_byte:.4f} bits per byte, "
        f"{result.tokens_per_second:.0f} tokens/s",
        soft_wrap=True,
        highlight=False,
    )

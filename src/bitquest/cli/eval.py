"""`bitquest eval`: perplexity and bits per byte of a text, or scores on multiple-choice questions, under a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitquest.cli.console import err, print_json_object, print_table
from bitquest.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress

    from bitquest.evaluation.sources import OpenedModel
    from bitquest.evaluation.task_files import Task


def command(
    model: Annotated[Path, typer.Argument(help="A packed model, a run directory, or a Hugging Face Llama folder.")],
    data: Annotated[
        Path | None, typer.Option(help="Text (a file, compressed or not, or a folder) or prepared data.")
    ] = None,
    task: Annotated[
        list[Path] | None,
        typer.Option(help="Multiple-choice questions (.jsonl, compressed or not): HellaSwag, ARC, …; may be repeated."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Evaluate at most so many tokens.", show_default="all")] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only a task's first so many questions.", show_default="all")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Checkpoint of a run.", show_default="last")] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens the model sees at once.", show_default="the model's")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Windows or questions computed at once.", show_default="by length")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, …")] = "cpu",
    backend: Annotated[str, typer.Option(help="Which code runs the packed layers; see bitquest doctor.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")] = False,
) -> None:
    """Measure a model in float32: perplexity and bits per byte of a text, or accuracy on multiple-choice questions.

    Text is cut into windows that do not overlap, each token predicted once. A question is answered by the choice of
    largest log-likelihood, as lm-eval scores it, without examples.
    """
    from bitquest.evaluation.sources import open_model
    from bitquest.evaluation.task_files import read_task

    tasks = task or []
    if (data is None) == (not tasks):
        raise ConfigError("give either --data, a text, or --task, a file of multiple-choice questions")
    if data is None and tokens is not None:
        raise ConfigError("--tokens is for --data; --limit takes a part of a task")
    if data is not None and limit is not None:
        raise ConfigError("--limit is for --task; --tokens takes a part of a text")
    read = [read_task(path, limit) for path in tasks]  # mistakes in small files show before a large model is read
    with err.status("reading the model"):
        opened = open_model(model, step, backend, device)
    about = {"model": str(model), "kind": opened.kind}
    found: dict[str, Any]
    if data is not None:
        found = {"data": str(data), **_text(opened, data, tokens, context, batch)}
    else:
        found = {"tasks": _tasks(opened, read, context, batch)}
    if json:
        print_json_object("eval", about | found)


def _text(
    opened: "OpenedModel", data: Path, tokens: int | None, context: int | None, batch: int | None
) -> dict[str, Any]:
    from bitquest.evaluation.perplexity import evaluate_tokens
    from bitquest.evaluation.sources import open_stream

    with err.status("reading the text"):
        stream = open_stream(data, opened.tokenizer, tokens)
    with _progress() as bar:
        result = evaluate_tokens(
            opened.model,
            stream.tokens,
            utf8_bytes=stream.utf8_bytes,
            context=context,
            batch_size=batch,
            progress=_shown_on(bar, "evaluating"),
        )
    err.print(
        f"{result.tokens} tokens, {result.utf8_bytes} bytes: loss {result.loss:.4f} nats per token, "
        f"perplexity {result.perplexity:.3f}, {result.bits_per_byte:.4f} bits per byte, "
        f"{result.tokens_per_second:.0f} tokens/s",
        soft_wrap=True,
        highlight=False,
    )
    return dict(result.to_json())


def _tasks(opened: "OpenedModel", tasks: "list[Task]", context: int | None, batch: int | None) -> list[dict[str, Any]]:
    from bitquest.evaluation.tasks import evaluate_task, score_table

    scores = []
    with _progress() as bar:
        for task in tasks:
            shown = _shown_on(bar, task.path.name)
            scores.append(
                evaluate_task(opened.model, opened.tokenizer, task, context=context, batch_size=batch, progress=shown)
            )
    print_table(score_table(scores))
    return [score.to_json() for score in scores]


def _progress() -> "Progress":
    from rich.progress import Progress

    return Progress(console=err, transient=True, disable=not err.is_terminal)


def _shown_on(bar: "Progress", name: str) -> "Callable[[int, int], None]":
    row = bar.add_task(name, total=None)
    return lambda done, total: bar.update(row, completed=done, total=total)

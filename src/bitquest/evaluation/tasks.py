"""Multiple-choice tasks by log-likelihood: acc, acc_norm and their standard errors as lm-eval defines them.

A model answers with the choice whose log-likelihood after the context is largest (acc), or largest once divided by
the choice's length in characters (acc_norm). Where two are equal the first counts. The standard error of a mean of n
items is their sample standard deviation (n − 1) over √n.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bitquest.errors import DataError
from bitquest.evaluation.likelihood import Progress, context_of, cut_to_context, encode_requests, log_likelihoods
from bitquest.evaluation.report_page import Table
from bitquest.evaluation.task_files import Item, Task
from bitquest.models import Llama, Tokenizer


@dataclass(frozen=True)
class ItemScore:
    """ln p of an item's choices, and which of them the model takes by each rule."""

    item: Item
    log_likelihoods: tuple[float, ...]

    @property
    def taken(self) -> int:
        """The choice of largest log-likelihood, the first of equals."""
        return _largest(self.log_likelihoods)

    @property
    def taken_norm(self) -> int:
        """The same per character of the choice."""
        return _largest([ll / length for ll, length in zip(self.log_likelihoods, self.item.lengths, strict=True)])


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda number: values[number])


@dataclass(frozen=True)
class TaskScore:
    """A task's scores. cut: items whose context lost its beginning. seconds: of the model's work."""

    task: Task
    items: tuple[ItemScore, ...]
    cut: int = 0
    seconds: float = 0.0

    @property
    def acc(self) -> float:
        """Share of items whose right choice has the largest log-likelihood."""
        return _mean([score.taken == score.item.gold for score in self.items])

    @property
    def acc_stderr(self) -> float:
        """Standard error of acc; NaN for one item."""
        return _stderr([score.taken == score.item.gold for score in self.items])

    @property
    def acc_norm(self) -> float:
        """Share of items whose right choice has the largest log-likelihood per character."""
        return _mean([score.taken_norm == score.item.gold for score in self.items])

    @property
    def acc_norm_stderr(self) -> float:
        """Standard error of acc_norm; NaN for one item."""
        return _stderr([score.taken_norm == score.item.gold for score in self.items])

    @property
    def chance(self) -> float:
        """acc that guessing has on average."""
        return _mean([1 / len(score.log_likelihoods) for score in self.items])

    @property
    def bits_per_byte(self) -> float:
        """Bits that the right choices cost, per UTF-8 byte of what was predicted (delimiter and choice), all items."""
        nats = -sum(score.log_likelihoods[score.item.gold] for score in self.items)
        size = sum(len(score.item.continuations[score.item.gold].encode()) for score in self.items)
        return nats / math.log(2) / size

    def to_json(self) -> dict[str, object]:
        """All figures, for `--json`; null for one that is not finite."""
        figures = {
            "acc": self.acc,
            "acc_stderr": self.acc_stderr,
            "acc_norm": self.acc_norm,
            "acc_norm_stderr": self.acc_norm_stderr,
            "chance": self.chance,
            "bits_per_byte": self.bits_per_byte,
            "seconds": self.seconds,
        }
        return {
            "task": str(self.task.path),
            "format": self.task.format,
            "items": len(self.items),
            "choices": sum(len(score.log_likelihoods) for score in self.items),
            "cut": self.cut,
            **{name: figure if math.isfinite(figure) else None for name, figure in figures.items()},
        }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _stderr(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    mean = _mean(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def evaluate_task(
    model: Llama,
    tokenizer: Tokenizer,
    task: Task,
    *,
    context: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> TaskScore:
    """Scores of a model on a task of `read_task`, zero-shot, float32.

    context: tokens that the model sees at once, default its own; longer contexts lose their beginning. batch_size:
    contexts computed at once. progress(done, total) counts choices. Raises DataError, naming file and line, for a
    choice longer than the context.
    """
    positions = context_of(model, context)
    pairs = [pair for item in task.items for pair in zip(item.contexts, item.continuations, strict=True)]
    owners = [(item, number) for item in task.items for number in range(len(item.continuations))]
    requests, cut = encode_requests(tokenizer, pairs), set[int]()
    for (item, number), request in zip(owners, requests, strict=True):
        try:
            if cut_to_context(request, positions) != request:
                cut.add(item.line)
        except DataError as error:
            raise DataError(f"{task.path}, line {item.line}, choice {number}: {error}") from None
    started = time.perf_counter()
    found = log_likelihoods(model, requests, context=context, batch_size=batch_size, progress=progress)
    seconds = time.perf_counter() - started
    values = iter(found)
    items = tuple(ItemScore(item, tuple(next(values).nats for _ in item.continuations)) for item in task.items)
    return TaskScore(task, items, len(cut), seconds)


def score_table(scores: Sequence[TaskScore]) -> Table:
    """The scores as a person reads them, in percent, one task a row."""
    columns = ("task", "items", "acc %", "acc_norm %", "chance %", "bits per byte", "seconds")
    rows = [
        (
            score.task.path.name.partition(".")[0],
            str(len(score.items)),
            _percent(score.acc, score.acc_stderr),
            _percent(score.acc_norm, score.acc_norm_stderr),
            _percent(score.chance),
            f"{score.bits_per_byte:.4f}",
            f"{score.seconds:.1f}",
        )
        for score in scores
    ]
    notes = ["± one standard error; acc_norm: log-likelihood by character; bits per byte: of the right choices"]
    notes += [
        f"{score.task.path.name}: of {score.cut} items the context was too long for the model and lost its beginning"
        for score in scores
        if score.cut
    ]
    return Table(columns, rows, note="\n".join(notes))


def _percent(share: float, stderr: float = math.nan) -> str:
    return f"{100 * share:.2f}" + (f" ± {100 * stderr:.2f}" if math.isfinite(stderr) else "")

"""What rounding a packed model's embedding and head cost: perplexity before and after, and the bytes saved."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bitquest.errors import DataError
from bitquest.evaluation.perplexity import Perplexity, Stream, evaluate_tokens
from bitquest.evaluation.sources import open_stream
from bitquest.export import load
from bitquest.models import Tokenizer
from bitquest.nn.convert import replace_modules

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RoundingCost:
    """Perplexities of one text under the packed model: `before` with float tables, `after` as it was written."""

    before: Perplexity
    after: Perplexity

    @property
    def relative_change(self) -> float:
        """(after − before) / before, of the perplexities; positive is worse."""
        difference = self.after.loss - self.before.loss
        return math.inf if difference > 709 else math.expm1(difference)

    def to_json(self) -> dict[str, Any]:
        """For `--json`; null for a change that is not finite."""
        change = self.relative_change
        return {
            "before": self.before.to_json(),
            "after": self.after.to_json(),
            "relative_change": change if math.isfinite(change) else None,
        }


def held_out(data: str | Path, tokenizer: Tokenizer, tokens: int) -> Stream:
    """At most so many tokens of a run's validation split. Raises DataError, with the reason, if there are none."""
    path = Path(data)
    if not path.exists():
        raise DataError(f"{path}, the run's data, is gone")
    try:
        return open_stream(path, tokenizer, tokens)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None


def rounding_cost(
    packed_dir: str | Path, tables: Mapping[str, nn.Module], text: Stream, progress: Progress | None = None
) -> RoundingCost:
    """Measure a packed model on a text, as it is and with its float tables back in their places, by name.

    All else is the same packed model in both, so the difference is that of the tables alone. progress(done, total)
    counts the tokens of both.
    """
    model = load(packed_dir)
    tokens = text.tokens.numel() - 1

    def measured(earlier: int) -> Perplexity:
        report = None if progress is None else lambda done, total: progress(earlier + done, 2 * total)
        return evaluate_tokens(model, text.tokens, utf8_bytes=text.utf8_bytes, progress=report)

    after = measured(0)
    replace_modules(model, dict(tables))
    return RoundingCost(measured(tokens), after)


def float_bytes(tables: Mapping[str, nn.Module]) -> int:
    """Bytes of float tables as they would be stored, tied ones once."""
    held = {p.data_ptr(): p.numel() * p.element_size() for module in tables.values() for p in module.parameters()}
    return sum(held.values())

"""Perplexity and bits per byte of a text: every token predicted exactly once.

The stream is EOS, then each document followed by EOS, as in training. It is cut into windows of the model's context
that do not overlap: a window's first token is the last one of the window before, so each token after the leading EOS is
predicted once, with what stands before it in its window. The last window is as short as it must be.

Bits per byte = summed nats / ln 2 / UTF-8 bytes of the text. The cost of each EOS is in the nats, for a text must end;
it has no bytes. B windows, T tokens of a window.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitquest.errors import DataError
from bitquest.models import Llama, Tokenizer
from bitquest.training.evaluate import held_out_loss

Progress = Callable[[int, int], None]
_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Perplexity:
    """Summed negative log-likelihood (nats) of `tokens` predicted tokens, which stand for `utf8_bytes` of text."""

    nats: float
    tokens: int
    utf8_bytes: int
    seconds: float = 0.0

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte; NaN where the tokens stand for no bytes."""
        return self.nats / math.log(2) / self.utf8_bytes if self.utf8_bytes else math.nan

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, float | int]:
        """All figures, for `--json`."""
        return {
            "nats": self.nats,
            "tokens": self.tokens,
            "utf8_bytes": self.utf8_bytes,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }


@dataclass(frozen=True)
class Stream:
    """Tokens to predict, int64 (1 + n,) with the leading EOS, and the UTF-8 bytes that the n stand for."""

    tokens: Tensor
    utf8_bytes: int


def text_stream(tokenizer: Tokenizer, documents: str | Iterable[str], limit: int | None = None) -> Stream:
    """The stream of one or several documents; limit: at most so many predicted tokens, their bytes counted exactly.

    Raises DataError for a text without a token.
    """
    ids, size = [tokenizer.eos_id], 0
    for document in [documents] if isinstance(documents, str) else documents:
        if not document:
            continue
        room = None if limit is None else limit - (len(ids) - 1)
        if room is not None and room <= 0:
            break
        encoded = tokenizer.backend.encode(document, add_special_tokens=False)
        if room is not None and len(encoded.ids) >= room:
            ids += encoded.ids[:room]
            end = len(document) if len(encoded.ids) == room else encoded.offsets[room - 1][1]
            size += len(document[:end].encode("utf-8"))
            break
        ids += [*encoded.ids, tokenizer.eos_id]
        size += len(document.encode("utf-8"))
    if len(ids) < 2:
        raise DataError("the text is empty: there is no token to predict")
    return Stream(torch.tensor(ids, dtype=torch.int64), size)


def windows(tokens: Tensor, context: int, batch_size: int) -> Iterator[Tensor]:
    """int64 (B, T+1) windows of a stream (1 + n,): full ones in batches, then the rest alone."""
    full = (tokens.numel() - 1) // context
    starts = torch.arange(full) * context
    for part in starts.split(batch_size) if full else ():
        yield torch.stack([tokens[start : start + context + 1] for start in part.tolist()])
    if tokens.numel() - full * context > 1:
        yield tokens[full * context :].unsqueeze(0)


def evaluate_tokens(
    model: nn.Module,
    tokens: Tensor | Sequence[int],
    *,
    utf8_bytes: int,
    context: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a stream (1 + n,) whose first token is only context (EOS, usually); autocast off.

    model(tokens_BT) -> logits_BTV. context: default the model's own. progress(done, total) counts tokens.
    Raises DataError for ids outside the model's vocabulary and for a stream with nothing to predict.
    """
    stream = torch.as_tensor(tokens, dtype=torch.int64)
    if stream.dim() != 1 or stream.numel() < 2:
        raise DataError("there is no token to predict: a stream needs its first token and at least one more")
    context = _context(model, context)
    if isinstance(model, Llama) and not 0 <= int(stream.min()) <= int(stream.max()) < model.config.vocab_size:
        raise DataError(
            f"the text has token {int(stream.max())}, the model a vocabulary of {model.config.vocab_size}: "
            "it was made with another tokenizer"
        )
    batches = windows(stream, context, batch_size or max(1, _TOKENS_AT_ONCE // context))
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    started = time.perf_counter()
    with torch.autocast(device.type, enabled=False):
        measured = held_out_loss(model, _counted(batches, stream.numel() - 1, progress), device)
    return Perplexity(measured.nats, measured.tokens, utf8_bytes, time.perf_counter() - started)


def evaluate_text(
    model: nn.Module,
    tokenizer: Tokenizer,
    documents: str | Iterable[str],
    *,
    limit: int | None = None,
    context: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of one or several documents under the model, for at most `limit` tokens."""
    stream = text_stream(tokenizer, documents, limit)
    return evaluate_tokens(
        model,
        stream.tokens,
        utf8_bytes=stream.utf8_bytes,
        context=context,
        batch_size=batch_size,
        progress=progress,
    )


def _context(model: nn.Module, context: int | None) -> int:
    if context is None:
        if not isinstance(model, Llama):
            raise DataError("say how many tokens this model sees at once: context=…")
        return model.config.max_position_embeddings
    if context < 1:
        raise DataError(f"a context of {context} tokens predicts nothing")
    return context


def _counted(batches: Iterator[Tensor], total: int, progress: Progress | None) -> Iterator[Tensor]:
    done = 0
    for batch in batches:
        yield batch
        done += batch.shape[0] * (batch.shape[1] - 1)
        if progress is not None:
            progress(done, total)

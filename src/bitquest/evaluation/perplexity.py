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
from bitquest.training.readers import Piece

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

    def to_json(self) -> dict[str, float | int | None]:
        """All figures, for `--json`; null for one that is not finite."""
        figures = {
            "nats": self.nats,
            "tokens": self.tokens,
            "utf8_bytes": self.utf8_bytes,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }
        return {name: figure if math.isfinite(figure) else None for name, figure in figures.items()}


@dataclass(frozen=True)
class Stream:
    """Tokens to predict, int64 (1 + n,) with the leading EOS, and the UTF-8 bytes that the n stand for."""

    tokens: Tensor
    utf8_bytes: int


def text_stream(tokenizer: Tokenizer, documents: str | Iterable[str], limit: int | None = None) -> Stream:
    """The stream of one or several documents; see `pieces_stream`."""
    listed = [documents] if isinstance(documents, str) else documents
    return pieces_stream(tokenizer, (Piece(document, ends=True) for document in listed), limit)


def pieces_stream(tokenizer: Tokenizer, pieces: Iterable[Piece], limit: int | None = None) -> Stream:
    """The stream of documents that come in pieces, each encoded by itself as when data is prepared.

    limit: at most so many predicted tokens; only their bytes are counted, and no more text than needed is read.
    A document without text is none. Raises DataError for a text without a token.
    """
    ids, size, is_begun = [tokenizer.eos_id], 0, False
    for piece in pieces:
        room = math.inf if limit is None else limit - (len(ids) - 1)
        if room <= 0:
            break
        encoded = tokenizer.backend.encode(piece.text, add_special_tokens=False)
        if len(encoded.ids) > room:
            ids += encoded.ids[: int(room)]
            size += len(piece.text[: encoded.offsets[int(room) - 1][1]].encode("utf-8"))
            break
        ids += encoded.ids
        size += len(piece.text.encode("utf-8"))
        is_begun = is_begun or bool(piece.text)
        if piece.ends and is_begun and (limit is None or len(ids) - 1 < limit):
            ids.append(tokenizer.eos_id)
            is_begun = False
    if len(ids) < 2:
        raise DataError("the text is empty: there is no token to predict")
    return Stream(torch.tensor(ids, dtype=torch.int64), size)


def windows(tokens: Tensor, context: int, batch_size: int) -> Iterator[Tensor]:
    """int64 (B, T+1) windows of a stream (1 + n,): full ones in batches, then the rest alone."""
    full = (tokens.numel() - 1) // context
    for first in range(0, full, batch_size):
        numbers = range(first, min(first + batch_size, full))
        yield torch.stack([tokens[n * context : (n + 1) * context + 1] for n in numbers])
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
    if batch_size is not None and batch_size < 1:
        raise DataError(f"a batch of {batch_size} computes nothing; give at least 1")
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
    if isinstance(model, Llama) and context > model.config.max_position_embeddings:
        raise DataError(
            f"a context of {context} tokens is longer than the model's {model.config.max_position_embeddings} "
            "positions: lower it"
        )
    return context


def _counted(batches: Iterator[Tensor], total: int, progress: Progress | None) -> Iterator[Tensor]:
    done = 0
    for batch in batches:
        yield batch
        done += batch.shape[0] * (batch.shape[1] - 1)
        if progress is not None:
            progress(done, total)

"""Log-likelihoods of continuations after contexts, in batches that do not change them.

The tokens are those of EleutherAI's lm-evaluation-harness (`lm_eval.api.model.TemplateLM._encode_pair`): context and
continuation are encoded together, and cut where the context alone would end. What the tokenizer itself puts in front
(BOS, for most Llamas) is there; what is too long for the model loses its first tokens.

Continuations of one context are read in one row behind it, "context | first | second | …": each sees the context and
itself, and its positions go on from the context's end. Thus the context is computed once, and not once for each choice.
A row is padded to a length that it alone decides, never to the longest of a batch: attention adds up in an order that
depends on the length, and at 1 bit a last bit that differs can flip a code. So a row's numbers are the same in every
batch, but for what a float product rounds otherwise for another number of rows (packed layers multiply integers).

B rows, T places of a row, N predicted tokens of a batch, C channels of a head.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bitquest.errors import DataError
from bitquest.models import Llama, Tokenizer
from bitquest.models.llama import masked_attention

Progress = Callable[[int, int], None]
PAD_TO = 32
_PLACES_AT_ONCE = 2048


class Request(NamedTuple):
    """Token ids: at least one of context, and of the continuation whose likelihood is asked for."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """ln p(continuation | context), at most 0, and whether greedy decoding would write the continuation."""

    nats: float
    greedy: bool


def encode_requests(tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]) -> list[Request]:
    """Token ids of (context, continuation) texts. White space at a context's end goes to its continuation.

    A context without a token is BOS, or EOS where there is none. A continuation may come out empty, where the
    tokenizer joins it with the context.
    """
    moved = [(context.rstrip(), context[len(context.rstrip()) :] + continuation) for context, continuation in pairs]
    contexts = dict.fromkeys(context for context, _ in moved)
    encode = tokenizer.backend.encode_batch
    by_context = dict(zip(contexts, encode(list(contexts), add_special_tokens=True), strict=True))
    wholes = encode([context + continuation for context, continuation in moved], add_special_tokens=True)
    bare = encode([continuation for _, continuation in moved], add_special_tokens=False)
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    requests = []
    for (context, _), whole, alone in zip(moved, wholes, bare, strict=True):
        ids = tuple(by_context[context].ids)
        if context and ids:
            requests.append(Request(ids, tuple(whole.ids[len(ids) :])))
        else:
            requests.append(Request((start,), tuple(alone.ids)))
    return requests


def cut_to_context(request: Request, positions: int) -> Request:
    """The request less the first tokens of its context, as many as the model has no positions for.

    The last token of the continuation needs no position. Raises DataError where nothing of the context would be left.
    """
    if not request.continuation:
        raise DataError("there is no token to predict: the continuation has none of its own")
    if len(request.continuation) > positions:
        raise DataError(
            f"{len(request.continuation)} tokens are more than the {positions} positions that the model sees at once"
        )
    return Request(request.context[-(positions + 1 - len(request.continuation)) :], request.continuation)


@dataclass
class _Row:
    """A context and the continuations read behind it, with the numbers of their requests."""

    context: tuple[int, ...]
    continuations: list[tuple[int, ...]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    places: int = 0

    def padded(self, positions: int) -> int:
        return min(-(-self.places // PAD_TO) * PAD_TO, positions)


def _rows(requests: Iterable[Request], positions: int) -> list[_Row]:
    """Rows of at most `positions` places, in the order in which their contexts first come."""
    rows: list[_Row] = []
    open_rows: dict[tuple[int, ...], _Row] = {}
    for number, (context, continuation) in enumerate(requests):
        row = open_rows.get(context)
        if row is None or row.places + len(continuation) - 1 > positions:
            row = open_rows[context] = _Row(context, places=len(context))
            rows.append(row)
        row.continuations.append(continuation)
        row.numbers.append(number)
        row.places += len(continuation) - 1
    return rows


class _SideBySide:
    """What the model asks a cache for, kept empty: positions and sight of a batch of rows."""

    length = 0

    def __init__(self, place_BT: Tensor, part_BT: Tensor) -> None:
        # Part 0 is the context; a later part sees it and its own past.
        t = part_BT.shape[1]
        past_TT = torch.ones(t, t, dtype=torch.bool, device=part_BT.device).tril()
        same_BTT = part_BT.unsqueeze(1) == part_BT.unsqueeze(2)
        self.mask_TS: Tensor | None = (past_TT & (same_BTT | (part_BT == 0).unsqueeze(1))).unsqueeze(1)
        self._place_BT = place_BT

    def begin(self, tokens: int) -> None:
        """Nothing to prepare."""

    def rows(self, table: Tensor, tokens: int) -> Tensor:
        """(B, 1, T, C): each row's own positions, for all heads."""
        return table[self._place_BT].unsqueeze(1)

    def append(self, layer: int, k_BHTC: Tensor, v_BHTC: Tensor) -> tuple[Tensor, Tensor]:
        return k_BHTC, v_BHTC

    def attend(self, q_BHTC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor) -> Tensor:
        return masked_attention(q_BHTC, k_BHSC, v_BHSC, self.mask_TS)

    def advance(self, tokens: int) -> None:
        """Nothing to count."""


@torch.no_grad()
def log_likelihoods(
    model: Llama,
    requests: Sequence[Request],
    *,
    context: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> list[Likelihood]:
    """ln p of each request's continuation, float32 logits summed in float64; equal requests are computed once.

    context: positions that the model sees at once, default its own. batch_size: contexts of a batch, by default as
    many as fill 2048 places. progress(done, total) counts requests. The model's mode is put back. Raises DataError
    for a continuation without a token or longer than the context, and for ids outside the vocabulary.
    """
    positions = context_of(model, context)
    if batch_size is not None and batch_size < 1:
        raise DataError(f"a batch of {batch_size} computes nothing; give at least 1")
    cut = [cut_to_context(request, positions) for request in requests]
    unique = {request: number for number, request in enumerate(dict.fromkeys(cut))}
    largest = max((max(*context, *continuation) for context, continuation in unique), default=0)
    if largest >= model.config.vocab_size:
        raise DataError(
            f"the text has token {largest}, the model a vocabulary of {model.config.vocab_size}: "
            "they do not belong together"
        )
    found: list[Likelihood | None] = [None] * len(unique)
    done, was_training = 0, model.training
    device = next(t.device for t in (*model.parameters(), *model.buffers()))
    model.eval()
    try:
        with torch.autocast(device.type, enabled=False):
            for length, rows in _batches(_rows(unique, positions), positions, batch_size):
                for number, likelihood in _scored(model, rows, length, device):
                    found[number] = likelihood
                done += sum(len(row.numbers) for row in rows)
                if progress is not None:
                    progress(done * len(requests) // len(unique), len(requests))
    finally:
        model.train(was_training)
    scores = [likelihood for likelihood in found if likelihood is not None]
    assert len(scores) == len(unique)
    return [scores[unique[request]] for request in cut]


def context_of(model: Llama, context: int | None) -> int:
    """Positions to use, the model's own by default. Raises DataError for none, and for more than it has."""
    most = model.config.max_position_embeddings
    if context is not None and not 1 <= context <= most:
        raise DataError(f"a context of {context} tokens: this model sees from 1 to {most}")
    return context or most


def _batches(rows: list[_Row], positions: int, batch_size: int | None) -> Iterator[tuple[int, list[_Row]]]:
    """(padded length, rows) with the longest first: what does not fit in memory shows at once."""
    by_length: dict[int, list[_Row]] = {}
    for row in rows:
        by_length.setdefault(row.padded(positions), []).append(row)
    for length in sorted(by_length, reverse=True):
        alike = by_length[length]
        size = batch_size or max(1, _PLACES_AT_ONCE // length)
        for first in range(0, len(alike), size):
            yield length, alike[first : first + size]


def _scored(model: Llama, rows: list[_Row], length: int, device: torch.device) -> Iterator[tuple[int, Likelihood]]:
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    place, part = torch.zeros_like(tokens), torch.full_like(tokens, -1)  # padding sees the context and itself
    at: list[int] = []
    targets: list[int] = []
    for b, row in enumerate(rows):
        end = len(row.context)
        tokens[b, :end] = torch.tensor(row.context)
        place[b, :end] = torch.arange(end)
        part[b, :end] = 0
        for number, continuation in enumerate(row.continuations, 1):
            start, end = end, end + len(continuation) - 1
            tokens[b, start:end] = torch.tensor(continuation[:-1])
            place[b, start:end] = torch.arange(len(row.context), len(row.context) + end - start)
            part[b, start:end] = number
            at += [b * length + len(row.context) - 1, *range(b * length + start, b * length + end)]
            targets += continuation
    cache = _SideBySide(place.to(device), part.to(device))
    target_N = torch.tensor(targets, device=device)
    logits_NV = model(tokens.to(device), cache, only_N=torch.tensor(at, device=device)).float()
    nats_N = F.cross_entropy(logits_NV, target_N, reduction="none").neg().double()
    hit_N = logits_NV.argmax(-1) == target_N
    values = zip(nats_N.tolist(), hit_N.tolist(), strict=True)
    for row in rows:
        for number, continuation in zip(row.numbers, row.continuations, strict=True):
            nats, hits = zip(*islice(values, len(continuation)), strict=True)
            yield number, Likelihood(sum(nats), all(hits))

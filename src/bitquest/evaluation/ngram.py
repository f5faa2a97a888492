"""A byte trigram model: the least that a trained language model has to beat.

Interpolated Witten-Bell smoothing (Witten and Bell, 1991; Chen and Goodman, 1998, section 2.5). With n(h, c) the number
of times symbol c follows history h in training, n(h) the sum over c and t(h) the number of different c seen after h,

    P(c | h) = (n(h, c) + t(h) · P(c | h')) / (n(h) + t(h))

where h' is h without its oldest symbol; the empty history falls back on the uniform distribution, a history never seen
on h'. Nothing is left to tune, and the probabilities after any history sum to 1.
"""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from bitquest.errors import DataError

Symbols: TypeAlias = "bytes | bytearray | NDArray[np.integer]"

END_OF_DOCUMENT = 256
ALPHABET = 257


class ByteTrigram:
    """Counts of a training text, and the probabilities they give."""

    def __init__(self, train: Symbols) -> None:
        symbols = _symbols(train, "training text")
        # counts of one, two and three symbols in a row, as dense tables over 257, 257² and 257³ codes
        self._tables = [_Table(_codes(symbols, order), order) for order in (1, 2, 3)]

    def probabilities(self, symbols: Symbols) -> NDArray[np.float64]:
        """P(symbol | the two before it) of every symbol in a text, float64; its first two have shorter histories."""
        text = _symbols(symbols, "text")
        p = np.full(len(text), 1 / ALPHABET)
        for order, table in enumerate(self._tables, 1):
            start = order - 1  # the first symbol with a whole history of this order
            p[start:] = table.interpolate(_codes(text, order), p[start:])
        return p


class _Table:
    """n(h, c), n(h) and t(h) for histories of one length."""

    def __init__(self, codes: NDArray[np.int64], order: int) -> None:
        self._pairs = np.bincount(codes, minlength=ALPHABET**order)
        per_history = self._pairs.reshape(-1, ALPHABET)
        self._total = per_history.sum(axis=1)
        self._distinct = np.count_nonzero(per_history, axis=1)

    def interpolate(self, codes: NDArray[np.int64], shorter: NDArray[np.float64]) -> NDArray[np.float64]:
        """P(c | h) of codes h·257 + c, from P(c | h') of the shorter history."""
        history = codes // ALPHABET
        total, distinct = self._total[history], self._distinct[history]
        seen = self._pairs[codes] + distinct * shorter
        return np.where(total > 0, seen / np.maximum(total + distinct, 1), shorter)


def byte_trigram_bits_per_byte(train: Symbols, held_out: Symbols) -> float:
    """Bits per UTF-8 byte that a byte trigram model fitted to `train` needs for `held_out`.

    Both are bytes, or integer arrays of byte values in which 256 ends a document: it is predicted like any symbol, and
    its cost counts, but it is no byte. That is how `bits_per_byte` of a byte-level language model is counted as well.

    Raises DataError for an empty text and for values that are neither a byte nor 256.
    """
    text = _symbols(held_out, "held-out text")
    p = ByteTrigram(train).probabilities(text)
    count = int(np.count_nonzero(text != END_OF_DOCUMENT))
    if count == 0:
        raise DataError("the held-out text of the trigram baseline has no bytes")
    return float(-np.log2(p).sum() / count)


def _symbols(text: Symbols, what: str) -> NDArray[np.int64]:
    values = np.frombuffer(text, np.uint8) if isinstance(text, (bytes, bytearray)) else np.asarray(text)
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer):
        raise DataError(f"the {what} of the trigram baseline must be bytes or a one-dimensional integer array")
    if len(values) == 0:
        raise DataError(f"the {what} of the trigram baseline is empty")
    if values.min() < 0 or values.max() > END_OF_DOCUMENT:
        raise DataError(
            f"the {what} of the trigram baseline has the value {values.max() if values.max() > 256 else values.min()}: "
            "it takes bytes (0 to 255) and 256 for the end of a document, so tokens must be of the byte-level tokenizer"
        )
    return values.astype(np.int64)


def _codes(symbols: NDArray[np.int64], order: int) -> NDArray[np.int64]:
    """One integer for every `order` symbols in a row, the oldest the most significant."""
    codes = np.zeros(max(len(symbols) - order + 1, 0), np.int64)
    for offset in range(order):
        codes = codes * ALPHABET + symbols[offset : offset + len(codes)]
    return codes

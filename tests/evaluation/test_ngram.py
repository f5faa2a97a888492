"""The byte trigram baseline against a slow one written from the formula."""

import math
import random
import time
from collections import Counter, defaultdict

import numpy as np
import pytest

from bitquest.errors import DataError
from bitquest.evaluation.ngram import ALPHABET, END_OF_DOCUMENT, ByteTrigram, byte_trigram_bits_per_byte


class SlowTrigram:
    """Dictionaries and recursion, straight from the formula."""

    def __init__(self, train):
        self.counts = defaultdict(Counter)
        for order in (0, 1, 2):
            for i in range(order, len(train)):
                self.counts[tuple(train[i - order : i])][train[i]] += 1

    def probability(self, history, symbol):
        shorter = self.probability(history[1:], symbol) if history else 1 / ALPHABET
        seen = self.counts.get(tuple(history))
        if seen is None:
            return shorter
        return (seen[symbol] + len(seen) * shorter) / (sum(seen.values()) + len(seen))

    def bits_per_byte(self, text):
        bits = -sum(math.log2(self.probability(text[max(i - 2, 0) : i], c)) for i, c in enumerate(text))
        return bits / sum(c != END_OF_DOCUMENT for c in text)


def sentences(seed, length):
    rng = random.Random(seed)
    return " ".join(rng.choice(["the", "of", "Übung", "a", "state", "union"]) for _ in range(length)).encode()


def test_equals_the_slow_reference_on_text_with_unseen_histories_and_document_ends():
    train = [*sentences(0, 300), END_OF_DOCUMENT, *sentences(1, 200), END_OF_DOCUMENT]
    held_out = [*sentences(2, 80), END_OF_DOCUMENT, *b"zebra \x00\xff", *sentences(3, 10)]
    expected = SlowTrigram(train).bits_per_byte(held_out)
    assert byte_trigram_bits_per_byte(np.array(train), np.array(held_out, np.uint16)) == pytest.approx(expected, 1e-12)


@pytest.mark.parametrize("held_out", [b"a", b"ab", b"abc", b"zzz"])
def test_short_texts_use_the_history_they_have(held_out):
    train = b"abcabcabd"
    assert byte_trigram_bits_per_byte(train, held_out) == pytest.approx(
        SlowTrigram(train).bits_per_byte(held_out), 1e-12
    )


@pytest.mark.parametrize("train", [b"a", b"ab", sentences(5, 50)])
@pytest.mark.parametrize("history", [b"th", b"qz", b"\xff\x00", b"b"])
def test_probabilities_after_any_history_sum_to_one(train, history):
    model = ByteTrigram(train)
    last = [model.probabilities(np.array([*history, c]))[-1] for c in range(ALPHABET)]
    assert min(last) > 0
    assert sum(last) == pytest.approx(1, abs=1e-12)


def test_noise_costs_its_entropy_and_repetition_almost_nothing():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 4, 200_000)
    assert byte_trigram_bits_per_byte(noise[:150_000], noise[150_000:]) == pytest.approx(2, abs=0.005)
    assert byte_trigram_bits_per_byte(b"abc" * 10_000, b"abc" * 100) < 0.02


def test_twelve_megabytes_take_seconds():
    text = np.frombuffer(sentences(0, 200_000) * 12, np.uint8)[:12_000_000]
    started = time.perf_counter()
    byte_trigram_bits_per_byte(text, text[:100_000])
    assert time.perf_counter() - started < 20


def test_real_prose_costs_what_a_trigram_costs(shared_data):
    text = (shared_data / "text" / "enwiki2015_ci_10MB.jsonl").read_bytes()[:4_000_000]
    assert 2.2 < byte_trigram_bits_per_byte(text[:3_600_000], text[3_600_000:]) < 3.2


@pytest.mark.parametrize(
    ("train", "held_out", "says"),
    [
        (b"", b"a", "training text of the trigram baseline is empty"),
        (b"a", b"", "held-out text of the trigram baseline is empty"),
        (b"a", np.array([256, 256]), "no bytes"),
        (np.array([1, 257]), b"a", "value 257"),
        (np.array([-1, 3]), b"a", "value -1"),
        (np.zeros((2, 2), int), b"a", "one-dimensional"),
        (np.zeros(3), b"a", "integer array"),
    ],
)
def test_texts_that_are_none(train, held_out, says):
    with pytest.raises(DataError, match=says):
        byte_trigram_bits_per_byte(train, held_out)

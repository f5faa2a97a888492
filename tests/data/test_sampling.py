"""Sampling without replacement, a function of (seed, step) alone."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquest.errors import DataError
from bitquest.training.data import Tokens, permuted


def tokens(count: int, shard: int = 1000) -> Tokens:
    """Every token is its own position, in shards of `shard`."""
    whole = np.arange(count, dtype=np.uint32)
    parts = [whole[i : i + shard] for i in range(0, count, shard)]
    return Tokens(Path("x"), parts, count + 1, count, count)  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.integers(1, 500), st.binary(min_size=1, max_size=32))
def test_permutations_are_permutations(size: int, key: bytes) -> None:
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


@settings(deadline=None, max_examples=50)
@given(st.integers(20, 900), st.integers(1, 9), st.integers(1, 5), st.integers(0, 99), st.integers(1, 300))
def test_every_window_once_an_epoch(count: int, context: int, batch: int, seed: int, shard: int) -> None:
    data = tokens(count, shard)
    windows = max(1, (count - 1) // context - 1)
    steps = -(-2 * windows // batch)
    rows = torch.cat([data.batch(seed, step, batch, context) for step in range(steps)])
    assert torch.equal(rows, rows[:, :1] + torch.arange(context + 1))  # consecutive, across shards too
    for epoch in (rows[:windows, 0], rows[windows : 2 * windows, 0]):
        starts = sorted(epoch.tolist())
        assert all(b - a == context for a, b in pairwise(starts))
    assert int(rows.max()) < count


def test_a_function_of_seed_and_step() -> None:
    data = tokens(5000)
    first = data.batch(1, 7, 4, 16)
    assert torch.equal(first, tokens(5000, 333).batch(1, 7, 4, 16))
    assert not torch.equal(first, data.batch(2, 7, 4, 16))
    assert not torch.equal(first, data.batch(1, 8, 4, 16))
    assert first.dtype == torch.int64
    assert first.shape == (4, 17)


def test_epochs_have_an_order_and_an_offset_of_their_own() -> None:
    data, context = tokens(20_000), 1000
    epochs = [data.batch(3, epoch, 18, context)[:, 0] for epoch in range(40)]
    orders = {tuple((starts // context).tolist()) for starts in epochs}
    offsets = {int(starts[0]) % context for starts in epochs}
    assert len(orders) == 40
    assert len(offsets) > 30
    assert max(offsets) - min(offsets) > context // 2


def test_order_is_no_order() -> None:
    starts = tokens(100_000).batch(0, 0, 200, 10)[:, 0].float()
    assert abs(float(torch.corrcoef(torch.stack([starts, torch.arange(200.0)]))[0, 1])) < 0.25
    assert float(starts.std()) > 20_000


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 700), st.integers(1, 20), st.integers(1, 6))
def test_windows_predict_each_token_once(count: int, context: int, batch: int) -> None:
    data = tokens(count)
    if count < context + 1:
        with pytest.raises(DataError, match="too few"):
            next(data.windows(context, batch))
        return
    rows = list(data.windows(context, batch))
    assert [i for row in rows for i in row[:, 1:].flatten().tolist()] == list(range(1, count))
    assert [i for row in rows for i in row[:, :-1].flatten().tolist()] == list(range(count - 1))
    assert all(len(row) <= batch for row in rows)
    assert all(row.shape[1] == context + 1 for row in rows[:-1])
    for limit in range(len(rows) + 1):
        assert len(list(data.windows(context, batch, limit=limit))) == limit


def test_ids_outside_the_vocabulary() -> None:
    data = Tokens(Path("x"), [np.array([1, 2, 300], dtype=np.uint16)], 257, 256, 3)  # type: ignore[list-item]
    with pytest.raises(DataError, match="token 300 is outside the vocabulary of 257"):
        data.batch(0, 0, 1, 2)

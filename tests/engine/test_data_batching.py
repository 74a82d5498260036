"""Batches: every row once, the same ones again for the same seed and epoch, little padding."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fuserl.data.batching import epoch_batches, pad_rows

LENGTHS = st.lists(st.integers(0, 200), max_size=300)
SIZES = st.integers(1, 40)
SEEDS = st.integers(0, 2**40)


@given(lengths=LENGTHS, batch_size=SIZES, seed=SEEDS, epoch=st.integers(0, 9))
def test_every_row_once_in_full_batches_and_one_short_last(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    batches = epoch_batches(lengths, batch_size, seed=seed, epoch=epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(batches)


@given(lengths=LENGTHS, batch_size=SIZES, seed=SEEDS, done=st.integers(0, 300))
def test_resuming_is_slicing(lengths: list[int], batch_size: int, seed: int, done: int) -> None:
    """Neither the global generators nor earlier epochs enter: the rest is what was to come."""
    whole = epoch_batches(lengths, batch_size, seed=seed, epoch=1)
    random.seed(done)
    torch.manual_seed(done)
    before = random.getstate(), torch.get_rng_state()
    resumed = epoch_batches(lengths, batch_size, seed=seed, epoch=1)[done:]
    assert whole[:done] + resumed == whole
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_the_order_is_pinned() -> None:
    """A change here breaks resuming from checkpoints of earlier versions."""
    assert epoch_batches([3, 1, 2, 5, 4], 2, seed=0, epoch=0) == [[1, 2], [0, 3], [4]]


def test_seeds_and_epochs_differ() -> None:
    lengths = list(range(64))
    orders = {
        str(epoch_batches(lengths, 4, seed=seed, epoch=epoch))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


def test_like_lengths_are_together_and_batches_are_shuffled() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 500) for _ in range(8 * 320)]
    batches = epoch_batches(lengths, 8, seed=0, epoch=0)
    padded = sum(max(lengths[index] for index in batch) * len(batch) for batch in batches)
    assert sum(lengths) / padded > 0.95
    longest = [max(lengths[index] for index in batch) for batch in batches]
    rising = sum(a < b for a, b in pairwise(longest)) / len(longest)
    assert 0.4 < rising < 0.6


def test_batch_size_is_checked() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        epoch_batches([1], 0, seed=0, epoch=0)


@given(rows=st.lists(st.lists(st.integers(0, 2**40), max_size=9), max_size=9))
def test_padding_is_on_the_right_and_lengths_tell_it(rows: list[list[int]]) -> None:
    ids, lengths = pad_rows(rows, pad_id=7)
    assert ids.dtype == lengths.dtype == torch.int64
    assert ids.shape == (len(rows), max(map(len, rows), default=0))
    assert [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)] == rows
    assert all((row[length:] == 7).all() for row, length in zip(ids, lengths, strict=True))


def test_padding_takes_any_sequences_and_pads_with_zero() -> None:
    ids, lengths = pad_rows([(5, 6), range(1)])
    assert ids.tolist() == [[5, 6], [0, 0]]
    assert lengths.tolist() == [2, 1]

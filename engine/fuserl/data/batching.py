"""Which rows form a batch, and rows padded to a tensor."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

WINDOW = 32  # batches; rows are grouped by length within windows of this many


def epoch_batches(
    lengths: Sequence[int], batch_size: int, *, seed: int, epoch: int
) -> list[list[int]]:
    """Row indices [num_batches][batch_size] of one epoch, every row exactly once.

    The order depends on (seed, epoch) and the lengths only, so an epoch is resumed by slicing
    off the batches already done. A random permutation is sorted by length within windows of 32
    batches, which keeps padding small, and the batches are shuffled. Rows that fill no batch,
    picked at random, come as a short last one.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    rng = random.Random(f"{seed}:{epoch}")  # a text is hashed: near seeds give unrelated orders
    order = list(range(len(lengths)))
    rng.shuffle(order)
    num_full = len(order) - len(order) % batch_size
    window = WINDOW * batch_size
    batches = []
    for start in range(0, num_full, window):
        rows = sorted(order[start : min(start + window, num_full)], key=lengths.__getitem__)
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rng.shuffle(batches)
    if num_full < len(order):
        batches.append(order[num_full:])
    return batches


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """B rows of ids, right-padded -> ids [B, S] int64, lengths [B] int64, S the longest length.

    With causal attention no real token looks at the padding on its right. Take masks from the
    lengths: `torch.arange(S) < lengths[:, None]`; pad_id may be a real token.
    """
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)  # [B]
    longest = max(map(len, rows), default=0)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)  # [B, S]
    is_real = torch.arange(longest) < lengths[:, None]  # [B, S]
    ids[is_real] = torch.tensor(list(chain.from_iterable(rows)), dtype=torch.int64)
    return ids, lengths

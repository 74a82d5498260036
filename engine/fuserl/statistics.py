"""Intervals for means, by the bootstrap."""

from collections.abc import Sequence

import numpy as np


def bootstrap_ci95(
    values: Sequence[float],
    counts: Sequence[int] | None = None,
    *,
    seed: int,
    draws: int = 2000,
) -> tuple[float, float]:
    """Percentile interval (95 %) of the mean of `values` (Efron, 1979). For a difference of two
    systems on the same items pass the items' differences. With counts a value is the sum over
    so many things, and the mean is over things while items are drawn."""
    sums = np.asarray(values, dtype=np.float64)
    sizes = np.ones_like(sums) if counts is None else np.asarray(counts, dtype=np.float64)
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(sums), size=(draws, len(sums)))
    means = sums[rows].sum(axis=1) / sizes[rows].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)

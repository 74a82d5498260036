"""Intervals for means, by the bootstrap."""

from collections.abc import Sequence

import numpy as np


def bootstrap_ci95(values: Sequence[float], *, seed: int, draws: int = 2000) -> tuple[float, float]:
    """Percentile interval (95 %) of the mean of `values` (Efron, 1979). For a difference of two
    systems on the same items pass the items' differences."""
    sample = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(sample), size=(draws, len(sample)))
    low, high = np.percentile(sample[rows].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)

"""A decode step as CUDA graphs, one for each size of a batch, captured once.

A graph holds addresses: of the rows, of the cache and of the weights. Optimizers write weights in
place, so graphs stay valid from one rollout to the next; what moves weights needs new ones.
"""

from collections.abc import Callable
from typing import Any

import torch

from fuserl.rollout.live_rows import LiveRows

WARM_UPS = 2
"""Runs before a capture, in which kernels are compiled and libraries take their workspaces."""


def bucket_of(num_rows: int, num_slots: int) -> int:
    """The captured size that a batch of num_rows runs in: 1, 2, 4, 8, multiples of 16 up to 256,
    then of 64; never more than the slots."""
    for size in (1, 2, 4, 8):
        if num_rows <= size:
            return min(size, num_slots)
    multiple = 16 if num_rows <= 256 else 64
    return min(-(-num_rows // multiple) * multiple, num_slots)


class CapturedSteps:
    """step(num_rows) must have fixed shapes, read and write only what stays where it is, and leave
    rows whose slot is below 0 alone."""

    def __init__(self, step: Callable[[int], None], rows: LiveRows) -> None:
        self._step, self._rows = step, rows
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None  # one for all: they never run side by side

    def replay(self, num_rows: int) -> None:
        """A step of the first num_rows rows; the rows behind them, up to the captured size, must
        be off."""
        size = bucket_of(num_rows, len(self._rows.slots))
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)
        self._rows.slots[num_rows:size] = -1
        self._graphs[size].replay()

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        rows = self._rows
        saved = [array[:size].clone() for array in (rows.slots, rows.lengths, rows.hidden)]
        rows.slots[:size] = -1  # warming up changes nothing that counts
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._step(size)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._step(size)
        self._pool = graph.pool()
        for array, values in zip((rows.slots, rows.lengths, rows.hidden), saved, strict=True):
            array[:size] = values
        return graph

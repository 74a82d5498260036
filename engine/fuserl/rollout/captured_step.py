"""A decode step as CUDA graphs, one for each size of a batch, captured once.

A graph holds addresses: of the rows, of the cache and of the weights. Optimizers write weights in
place, so graphs stay valid from one rollout to the next; what moves weights needs new ones
(kept_runner.py sees to both).
"""

import time
import weakref
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


_idle_streams: dict[torch.device, list[torch.cuda.Stream]] = {}


def _lend_stream(device: torch.device, owner: object) -> torch.cuda.Stream:
    """A stream to capture on, the owner's as long as it lives.

    A library keeps a workspace for every stream that it was ever called on, tens of MB each, so
    streams are used again. But graphs of one stream share that workspace, and versions of torch
    free it with the first graph that dies: so no two that live have the same.
    """
    idle = _idle_streams.setdefault(device, [])
    stream = idle.pop() if idle else torch.cuda.Stream(device)
    weakref.finalize(owner, idle.append, stream)
    return stream


class CapturedSteps:
    """Steps of the rows of one runner.

    A step(num_rows) must have fixed shapes, read and write only what stays where it is, leave rows
    whose slot is below 0 alone, and be the same in every call. It is handed in with each call and
    not held: a runner that holds its graphs, which hold the runner, would outlive its last user,
    and with it the cache.
    """

    def __init__(self, rows: LiveRows) -> None:
        self._rows = rows
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None  # one for all: they never run side by side
        self._stream: torch.cuda.Stream | None = None
        self.seconds = 0.0
        """Spent on captures, the compilation of kernels included."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Those captured so far, in that order."""
        return tuple(self._graphs)

    def prepare(self, step: Callable[[int], None], num_rows: int) -> None:
        """Capture every size that up to num_rows rows can need, the largest first: the others fit
        into its memory. Rows that are live meanwhile stay as they are."""
        num_slots = len(self._rows.slots)
        sizes = {bucket_of(n, num_slots) for n in range(1, num_rows + 1)}
        for size in sorted(sizes, reverse=True):
            self._graph(step, size)

    def replay(self, step: Callable[[int], None], num_rows: int, num_steps: int) -> None:
        """num_steps steps of the first num_rows rows; those behind them, up to the captured size,
        are turned off."""
        rows = self._rows
        size = bucket_of(num_rows, len(rows.slots))
        graph = self._graph(step, size)
        with torch.cuda.device(rows.slots.device):
            rows.slots[num_rows:size] = -1
            for _ in range(num_steps):
                graph.replay()

    def _graph(self, step: Callable[[int], None], size: int) -> torch.cuda.CUDAGraph:
        if size not in self._graphs:
            began = time.perf_counter()
            with torch.cuda.device(self._rows.slots.device):
                self._graphs[size] = self._capture(step, size)
            self.seconds += time.perf_counter() - began
        return self._graphs[size]

    def _capture(self, step: Callable[[int], None], size: int) -> torch.cuda.CUDAGraph:
        rows = self._rows
        changed = (rows.slots, rows.lengths, rows.hidden)
        saved = [array[:size].clone() for array in changed]
        rows.slots[:size] = -1  # warming up changes nothing that counts
        if self._stream is None:
            self._stream = _lend_stream(rows.slots.device, self)
        current, side = torch.cuda.current_stream(), self._stream
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step(size)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device: what they do is no part of the graph. The outer
        # context is for a capture that fails, which would leave its stream the current one.
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(
                graph, pool=self._pool, stream=side, capture_error_mode="thread_local"
            ),
        ):
            step(size)
        self._pool = graph.pool()
        for array, values in zip(changed, saved, strict=True):
            array[:size] = values
        return graph

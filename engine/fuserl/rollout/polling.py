"""How the host learns of what the device counted, without making the device wait."""

import torch
from torch import Tensor


class Poll:
    """Looks at a small tensor of counters. On CUDA a look asks for a copy into pinned memory and
    answers from the look before, whose copy has long arrived: the queue never runs dry, and what
    the host knows is one look old.

    Two copies take turns: the one that is written is never the one that is read.
    """

    def __init__(self, counts: Tensor) -> None:
        self._counts = counts
        self._num_looks = 0
        self._copies: list[tuple[Tensor, torch.cuda.Event]] = []
        if counts.device.type == "cuda":
            self._copies = [(_pinned_like(counts), torch.cuda.Event()) for _ in range(2)]

    def restart(self) -> None:
        """The counters were set to 0, and the device has done all that was asked of it before."""
        self._num_looks = 0

    def look(self) -> list[int]:
        if not self._copies:
            return self._counts.tolist()
        copy, arrived = self._copies[self._num_looks % 2]
        copy.copy_(self._counts, non_blocking=True)
        arrived.record(torch.cuda.current_stream(self._counts.device))
        self._num_looks += 1
        if self._num_looks == 1:
            return [0] * len(copy)
        before, arrived = self._copies[self._num_looks % 2]
        arrived.synchronize()
        return before.tolist()


def _pinned_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)

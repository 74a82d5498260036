"""The rows that are being decoded: parallel arrays, which the device reads and writes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.rollout.requests import End


@dataclass(frozen=True, slots=True)
class NewPrompt:
    item: int  # of the cache
    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class NewRow:
    slot: int
    item: int  # of the cache, where its prompt is
    limit: int
    request_id: int


@dataclass(frozen=True, slots=True)
class Ended:
    slot: int
    length: int
    end: End


class LiveRows:
    """Room for S rows, the first num_rows of which are in use, and what was drawn for each slot.

    The arrays never move, so that a captured graph may read them.
    """

    def __init__(
        self,
        num_slots: int,
        capacity: int,
        num_prompts: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        def numbers(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        self.num_rows = 0
        self.slots = numbers(num_slots)  # below 0: a row that ended and is still in its place
        self.prompt_ids = numbers(num_slots)
        self.lengths = numbers(num_slots)  # completion tokens so far
        self.limits = numbers(num_slots)
        self.request_ids = numbers(num_slots)
        self.hidden = torch.zeros(num_slots, hidden_size, dtype=dtype, device=device)
        # What the first token of each prompt's completions is drawn from.
        self.prompt_hidden = torch.zeros(num_prompts, hidden_size, dtype=dtype, device=device)
        # By slot. The last row takes what rows that ended go on to draw.
        self.token_ids = numbers(num_slots + 1, capacity)
        sizes = (num_slots + 1, capacity)
        self.logprobs = torch.zeros(sizes, dtype=torch.float32, device=device)
        self.truncated_logprobs = torch.zeros(sizes, dtype=torch.float32, device=device)

    def start(self, rows: Sequence[NewRow]) -> None:
        """Append rows at the beginning of their completions; their prompts' hidden states are
        there."""
        first, stop = self.num_rows, self.num_rows + len(rows)
        fields = [(row.slot, row.item, row.limit, row.request_id) for row in rows]
        given = torch.tensor(fields, dtype=torch.int64).to(self.slots.device)
        arrays = (self.slots, self.prompt_ids, self.limits, self.request_ids)
        for array, values in zip(arrays, given.unbind(1), strict=True):
            array[first:stop] = values
        self.lengths[first:stop] = 0
        self.hidden[first:stop] = self.prompt_hidden[given[:, 1]]
        self.num_rows = stop

    def keep(self, rows: Tensor) -> None:
        """Make these rows, [n] int64, the live ones, in this order."""
        numbers = (self.slots, self.prompt_ids, self.lengths, self.limits, self.request_ids)
        for array in (*numbers, self.hidden):
            array[: len(rows)] = array[rows]
        self.num_rows = len(rows)

    def without(self, slots: Sequence[int]) -> Tensor:
        """[n] int64: the live rows but those of these slots."""
        gone = torch.tensor(slots, device=self.slots.device)
        return (~torch.isin(self.slots[: self.num_rows], gone)).nonzero().squeeze(1)

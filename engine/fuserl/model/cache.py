"""Keys and values of the tokens decoded so far: prompts once, each completion in a slot.

Row b of the batch reads its prompt's keys in the prefix arena, shared by all samples of that
prompt, then those of its own slot. Rows are dropped by dropping their numbers: no key is moved.
"""

import torch
from torch import Tensor

from fuserl.model.config import DecoderConfig
from fuserl.model.packing import Packing


class KVCache:
    """prompts: their packing, [P] sequences. prompt_of_row: [R] int64, ascending. capacity: tokens
    a completion may have."""

    def __init__(
        self,
        config: DecoderConfig,
        prompts: Packing,
        prompt_of_row: Tensor,
        capacity: int,
        dtype: torch.dtype,
    ) -> None:
        device = prompts.device
        self.prompts = prompts
        self.prompt_lengths = torch.tensor(prompts.lengths, device=device)
        self.prompt_of_row = prompt_of_row
        self.slots = torch.arange(len(prompt_of_row), device=device)  # of each row
        self.lengths = torch.zeros_like(prompt_of_row)  # of each row's completion so far
        self.num_positions = prompts.max_length + capacity
        if config.rope is None:  # an ended row decodes on, unread, but not past a table
            self.num_positions = min(self.num_positions, config.max_positions)

        def arena(rows: int, width: int) -> list[Tensor]:
            shape = (config.num_layers, rows, config.num_kv_heads, width, config.head_dim)
            return list(torch.empty(shape, dtype=dtype, device=device))

        self.prefix_keys = arena(len(prompts.lengths), prompts.max_length)
        self.prefix_values = arena(len(prompts.lengths), prompts.max_length)
        self.keys = arena(len(prompt_of_row), capacity)
        self.values = arena(len(prompt_of_row), capacity)

    @property
    def num_bytes(self) -> int:
        arenas = (self.prefix_keys, self.prefix_values, self.keys, self.values)
        return sum(tensor.nbytes for arena in arenas for tensor in arena)

    def keep(self, rows: Tensor) -> None:
        """Make these rows the batch ([kept] int64, ascending)."""
        self.prompt_of_row = self.prompt_of_row[rows]
        self.slots = self.slots[rows]
        self.lengths = self.lengths[rows]

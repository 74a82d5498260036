"""Keys and values: prompts once, each completion in a slot.

A row of a batch reads its prompt's keys in the arena of prompts, shared by all samples of that
prompt, then those of its own slot. Which row has which slot is the caller's: rows come and go
without a key being moved.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fuserl.model.config import DecoderConfig
from fuserl_kernels import native


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    num_slots: int
    capacity: int  # tokens of a slot
    num_prompts: int
    prompt_capacity: int  # tokens of a prompt

    @property
    def num_tokens(self) -> int:
        """There is room for, prompts' and completions'."""
        return self.num_slots * self.capacity + self.num_prompts * self.prompt_capacity

    def num_bytes(self, config: DecoderConfig, dtype: torch.dtype) -> int:
        """Of the arenas: a key and a value a token, layer and head."""
        head_bytes = config.num_kv_heads * config.head_dim * dtype.itemsize
        return 2 * config.num_layers * head_bytes * self.num_tokens


class KVCache:
    """Arenas of keys and values, [num_layers, items, num_kv_heads, capacity, head_dim] each."""

    def __init__(
        self, config: DecoderConfig, shape: CacheShape, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape = shape

        def arena(items: int, capacity: int) -> Tensor:
            sizes = (config.num_layers, items, config.num_kv_heads, capacity, config.head_dim)
            tensor = torch.empty(sizes, dtype=dtype, device=device)
            native.advise_large_pages(tensor)
            return tensor

        self.keys = arena(shape.num_slots, shape.capacity)
        self.values = arena(shape.num_slots, shape.capacity)
        self.prompt_keys = arena(shape.num_prompts, shape.prompt_capacity)
        self.prompt_values = arena(shape.num_prompts, shape.prompt_capacity)
        self.prompt_lengths = torch.zeros(shape.num_prompts, dtype=torch.int64, device=device)
        # Positions that a row can have; a learned table ends where the model does.
        self.num_positions = shape.prompt_capacity + shape.capacity
        if config.rope is None:
            self.num_positions = min(self.num_positions, config.max_positions)

    @property
    def num_bytes(self) -> int:
        arenas = (self.keys, self.values, self.prompt_keys, self.prompt_values)
        return sum(tensor.nbytes for tensor in arenas)

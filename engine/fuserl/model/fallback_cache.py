"""What the rows of a batch have seen, for models that run through transformers.

Both kinds are made for prompts and the rows that start from them, as KVCache is, and have the same
three methods.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from fuserl.model.packing import Packing


class Extends(Protocol):
    """What these ask of a trunk: see TransformersTrunk."""

    @property
    def max_positions(self) -> int: ...

    def __call__(self, token_ids: Tensor, packing: Packing) -> Tensor: ...

    def extend(
        self, token_ids: Tensor, attention_mask: Tensor, positions: Tensor, past: Any
    ) -> tuple[Tensor, Any]: ...


class CachedRows:
    """Keys and values in transformers' DynamicCache. Prompts are padded on the left, as for
    transformers' generate: the next tokens of all rows share a slot, so that windows, which count
    slots, are right.

    prompts: their packing, [P] sequences. prompt_of_row: [R] int64. capacity: unused, it grows.
    """

    def __init__(self, prompts: Packing, prompt_of_row: Tensor, capacity: int) -> None:
        self._prompts, self._prompt_of_row = prompts, prompt_of_row
        self.past: Any = None
        lengths = torch.tensor(prompts.lengths, device=prompts.device)
        slots = torch.arange(prompts.max_length, device=prompts.device)
        # [P, longest prompt], then [B, tokens so far] int64: 1 for a real token
        self._mask = (slots >= prompts.max_length - lengths[:, None]).long()
        self._positions = lengths  # [P], then [B]: of the next token

    @property
    def is_plain(self) -> bool:
        """After the prefill: whether transformers' cache holds keys and values and no more."""
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

        layers = self.past.layers if type(self.past) is DynamicCache else [None]
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)

    def prefill(self, trunk: Extends, token_ids: Tensor) -> Tensor:
        """[N] packed; their hidden states, [N, D]."""
        prompts = self._prompts
        padding = prompts.max_length - self._positions
        where = (prompts.rows, padding[prompts.rows] + prompts.positions)
        padded = token_ids.new_zeros(self._mask.shape)
        padded[where] = token_ids
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        hidden, self.past = trunk.extend(padded, self._mask, positions, None)
        self.keep(self._prompt_of_row)
        return hidden[where]

    def decode(self, trunk: Extends, token_ids: Tensor) -> Tensor:
        """[B]; their hidden states, [B, D]."""
        self._mask = torch.cat((self._mask, self._mask.new_ones(len(self._mask), 1)), dim=1)
        # A row that ended goes on, unread, until it is dropped: past a table of positions too.
        positions = self._positions.clamp(max=trunk.max_positions - 1)
        hidden, self.past = trunk.extend(
            token_ids[:, None], self._mask, positions[:, None], self.past
        )
        self._positions = self._positions + 1
        return hidden[:, 0]

    def keep(self, rows: Tensor) -> None:
        """Make these rows the batch ([kept] int64)."""
        self.past.batch_select_indices(rows)
        self._mask, self._positions = self._mask[rows], self._positions[rows]


class RecomputedRows:
    """No cache: each token computes its whole row again, in time that grows with the square of
    the length. For architectures whose state is no plain cache of keys and values, and for rows
    that pass a length at which all their keys change. Arguments as CachedRows'."""

    def __init__(self, prompts: Packing, prompt_of_row: Tensor, capacity: int) -> None:
        self._prompts = prompts
        self._prompt_of_row = prompt_of_row.tolist()
        self._room = capacity

    def prefill(self, trunk: Extends, token_ids: Tensor) -> Tensor:
        prompts = self._prompts
        shape = (len(prompts.lengths), prompts.max_length + self._room)
        tokens = token_ids.new_zeros(shape)
        tokens[prompts.rows, prompts.positions] = token_ids
        self._tokens = tokens[self._prompt_of_row]
        self._lengths = [prompts.lengths[prompt] for prompt in self._prompt_of_row]
        return trunk(token_ids, prompts)

    def decode(self, trunk: Extends, token_ids: Tensor) -> Tensor:
        # As in CachedRows: an ended row stays within the positions.
        self._lengths = [min(length + 1, trunk.max_positions) for length in self._lengths]
        packing = Packing.of(self._lengths, token_ids.device)
        last = torch.tensor(self._lengths, device=token_ids.device) - 1
        self._tokens[torch.arange(len(last), device=last.device), last] = token_ids
        return trunk(self._tokens[packing.rows, packing.positions], packing)[packing.last]

    def keep(self, rows: Tensor) -> None:
        self._tokens = self._tokens[rows]
        self._lengths = [self._lengths[row] for row in rows.tolist()]

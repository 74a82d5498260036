"""Keys and values of the tokens decoded so far, right-padded: slot p holds position p."""

import torch
from torch import Tensor

from fuserl.model.config import DecoderConfig


class KVCache:
    """Contiguous cache for a batch of rows that started from ragged prompts.

    prompt_lengths: [B] int64. capacity: positions a row may reach (prompt and completion).
    Prefill writes whole prompts, padding included; a padded slot is overwritten by the token
    that later takes that position before any query may look at it.
    """

    def __init__(
        self, config: DecoderConfig, prompt_lengths: Tensor, capacity: int, dtype: torch.dtype
    ) -> None:
        self.positions = prompt_lengths  # [B] the position the next token takes
        self.is_prefill = True
        shape = (len(prompt_lengths), config.num_kv_heads, capacity, config.head_dim)
        device = prompt_lengths.device
        self._keys = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)
        ]
        self._values = [torch.zeros_like(keys) for keys in self._keys]
        self._slots = torch.arange(capacity, device=device)
        self._rows = torch.arange(len(prompt_lengths), device=device)
        self._used = 0
        self._mask: Tensor | None = None

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """key, value: [B, kv_heads, S, head_dim]; S is the prompts' width, then always 1."""
        if self.is_prefill:
            self._keys[layer][:, :, : key.shape[2]] = key
            self._values[layer][:, :, : value.shape[2]] = value
        else:
            self._keys[layer][self._rows, :, self.positions] = key.squeeze(2)
            self._values[layer][self._rows, :, self.positions] = value.squeeze(2)

    def read(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values up to the furthest position in use, and which of them each row may
        see ([B, 1, 1, used] bool, True = visible; the token being decoded included)."""
        keys, values = self._keys[layer], self._values[layer]
        return keys[:, :, : self._used], values[:, :, : self._used], self._mask

    def begin_decode(self, used: int) -> None:
        """End the prefill. used: the longest prompt."""
        self.is_prefill = False
        self._used = used

    def begin_step(self) -> None:
        """Before one token a row is decoded at `positions`."""
        self._used += 1
        self._mask = (self._slots[: self._used] <= self.positions.unsqueeze(1))[:, None, None]

    def end_step(self) -> None:
        self.positions = self.positions + 1

    def keep(self, rows: Tensor) -> None:
        """Make these rows the batch ([kept] int64): the others are dropped, one named n times
        is there n times."""
        self.positions = self.positions[rows]
        self._keys = [keys[rows] for keys in self._keys]
        self._values = [values[rows] for values in self._values]
        self._rows = torch.arange(len(rows), device=rows.device)

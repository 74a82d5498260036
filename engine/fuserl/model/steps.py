"""One pass over a decoder's layers: which tokens, and where their keys and values are."""

from typing import Protocol

from torch import Tensor

import fuserl_kernels as fk
from fuserl.model.attention import packed_attention
from fuserl.model.cache import KVCache
from fuserl.model.packing import Packing


class Heads(Protocol):
    """What a step asks of an attention layer."""

    layer: int
    scale: float
    window: int | None
    softcap: float | None

    def rotary(
        self, qkv: Tensor, positions: Tensor, num_positions: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value heads with their positions in, [N, heads, head_dim] each."""

    def rotary_kv_write(
        self,
        qkv: Tensor,
        positions: Tensor,
        num_positions: int,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        offsets: Tensor,
    ) -> Tensor:
        """The query heads; key and value heads go into a cache."""


class Step(Protocol):
    positions: Tensor  # [N] int64: of each token in its sequence

    def attend(self, attention: Heads, qkv: Tensor) -> Tensor:
        """[N, (num_heads + 2 num_kv_heads) * head_dim] to [N, num_heads, head_dim]."""


class PackedStep:
    """Training and scoring: a token's keys are in the same pass. Keeps nothing."""

    def __init__(self, packing: Packing) -> None:
        self.packing = packing
        self.positions = packing.positions

    def attend(self, attention: Heads, qkv: Tensor) -> Tensor:
        return self._attend(attention, qkv)[0]

    def _attend(self, attention: Heads, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = attention.rotary(qkv, self.positions, self.packing.max_length)
        out = packed_attention(
            query,
            key,
            value,
            self.packing,
            scale=attention.scale,
            window=attention.window,
            softcap=attention.softcap,
        )
        return out, key, value


class PrefillStep(PackedStep):
    """The prompts, whose keys go into the cache."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__(cache.prompts)
        self._cache = cache

    def attend(self, attention: Heads, qkv: Tensor) -> Tensor:
        out, key, value = self._attend(attention, qkv)
        where = (self.packing.rows, slice(None), self.positions)
        self._cache.prefix_keys[attention.layer][where] = key
        self._cache.prefix_values[attention.layer][where] = value
        return out


class DecodeStep:
    """The next token of every row. `advance` ends it."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._offsets = cache.lengths
        self._lengths = cache.lengths + 1
        positions = cache.prompt_lengths[cache.prompt_of_row] + cache.lengths
        self.positions = positions.clamp(max=cache.num_positions - 1)

    def attend(self, attention: Heads, qkv: Tensor) -> Tensor:
        cache, layer = self._cache, attention.layer
        query = attention.rotary_kv_write(
            qkv,
            self.positions,
            cache.num_positions,
            cache.keys[layer],
            cache.values[layer],
            cache.slots,
            self._offsets,
        )
        return fk.decode_attention(
            query,
            cache.keys[layer],
            cache.values[layer],
            self._lengths,
            slots=cache.slots,
            prefix_keys=cache.prefix_keys[layer],
            prefix_values=cache.prefix_values[layer],
            prefix_ids=cache.prompt_of_row,
            prefix_lengths=cache.prompt_lengths,
            scale=attention.scale,
            window=attention.window,
            softcap=attention.softcap,
        )

    def advance(self) -> None:
        self._cache.lengths = self._lengths

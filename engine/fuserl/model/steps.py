"""One pass over a decoder's layers: which tokens, where their keys and values are, and how its
products are made."""

from typing import Protocol

from torch import Tensor, nn

import fuserl_kernels as fk
from fuserl.model.attention import packed_attention
from fuserl.model.cache import KVCache
from fuserl.model.fixed_attention import fixed_attention
from fuserl.model.packing import Packing
from fuserl.model.products import Product, training_product
from fuserl_kernels.decode_attention import uses_plan


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

    def product(self, linear: nn.Linear, x: Tensor) -> Tensor:
        """[N, in] to [N, out]."""

    def attend(self, attention: Heads, qkv: Tensor) -> Tensor:
        """[N, (num_heads + 2 num_kv_heads) * head_dim] to [N, num_heads, head_dim]."""


class PackedStep:
    """Training and scoring: a token's keys are in the same pass. Keeps nothing.

    exact: attention sums in the order of cached decoding; where products have a fixed order too,
    both then give the same bits (the packing must say where completions begin).
    """

    def __init__(self, packing: Packing, exact: bool = False) -> None:
        self.packing = packing
        self.positions = packing.positions
        self.product: Product = training_product
        self._attention = fixed_attention if exact else packed_attention

    def attend(self, attention: Heads, qkv: Tensor) -> Tensor:
        query, key, value = attention.rotary(qkv, self.positions, self.packing.max_length)
        return self._attention(
            query,
            key,
            value,
            self.packing,
            scale=attention.scale,
            window=attention.window,
            softcap=attention.softcap,
        )


class PrefillStep:
    """Prompts, whose keys go into the cache.

    prompt_ids: [B] int64, the item of the cache for each sequence of the packing. from_cache: the
    prompts see themselves there, which gives the bits of cached decoding; else by the attention of
    training, which reads a key once for many queries.
    """

    def __init__(
        self,
        packing: Packing,
        cache: KVCache,
        prompt_ids: Tensor,
        product: Product,
        *,
        from_cache: bool,
    ) -> None:
        self.positions = packing.positions
        self.product = product
        self._packing, self._cache = packing, cache
        self._items = prompt_ids[packing.rows]
        self._lengths = self.positions + 1
        # Not a bound method: a step that held itself would keep the cache until it is collected.
        self._reads_cache = from_cache

    def attend(self, attention: Heads, qkv: Tensor) -> Tensor:
        attend = self._from_cache if self._reads_cache else self._packed
        layer = attention.layer
        return attend(
            attention, qkv, self._cache.prompt_keys[layer], self._cache.prompt_values[layer]
        )

    def _from_cache(self, attention: Heads, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        query = attention.rotary_kv_write(
            qkv,
            self.positions,
            self._cache.num_positions,
            keys,
            values,
            self._items,
            self.positions,
        )
        return fk.decode_attention(
            query,
            keys,
            values,
            self._lengths,
            slots=self._items,
            scale=attention.scale,
            window=attention.window,
            softcap=attention.softcap,
        )

    def _packed(self, attention: Heads, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        query, key, value = attention.rotary(qkv, self.positions, self._cache.num_positions)
        keys[self._items, :, self.positions] = key
        values[self._items, :, self.positions] = value
        return packed_attention(
            query,
            key,
            value,
            self._packing,
            scale=attention.scale,
            window=attention.window,
            softcap=attention.softcap,
        )


class DecodeStep:
    """The next token of every row.

    slots: [B] int64, below 0 for a row that is off: its result is anything, and nothing of it is
    kept. prompt_ids: [B] int64. places: [B] int64, of the token in its slot; used: places + 1;
    positions: of the token in its sequence, below the cache's num_positions for any row.
    """

    def __init__(
        self,
        cache: KVCache,
        product: Product,
        *,
        slots: Tensor,
        prompt_ids: Tensor,
        places: Tensor,
        used: Tensor,
        positions: Tensor,
    ) -> None:
        self.product = product
        self.positions = positions
        self._cache, self._slots, self._prompt_ids = cache, slots, prompt_ids
        self._places, self._used = places, used
        self._plan: Tensor | None = None

    def attend(self, attention: Heads, qkv: Tensor) -> Tensor:
        cache, layer = self._cache, attention.layer
        query = attention.rotary_kv_write(
            qkv,
            self.positions,
            cache.num_positions,
            cache.keys[layer],
            cache.values[layer],
            self._slots,
            self._places,
        )
        prompt_keys = cache.prompt_keys[layer]
        if self._plan is None and uses_plan(query):
            self._plan = fk.decode_attention_plan(
                prompt_keys, self._prompt_ids, num_heads=query.shape[1], slots=self._slots
            )
        return fk.decode_attention(
            query,
            cache.keys[layer],
            cache.values[layer],
            self._used,
            slots=self._slots,
            prefix_keys=prompt_keys,
            prefix_values=cache.prompt_values[layer],
            prefix_ids=self._prompt_ids,
            prefix_lengths=cache.prompt_lengths,
            prefix_plan=self._plan,
            scale=attention.scale,
            window=attention.window,
            softcap=attention.softcap,
        )

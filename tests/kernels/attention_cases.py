"""What the tests of decode attention share: problems whose unused memory is NaN, and the truth."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

import fuserl_kernels as fk
from fuserl_kernels.reference.attention import decode_attention_fwd


@dataclass(frozen=True)
class Problem:
    """Arguments of fk.decode_attention; the prefix tensors may be None together."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    lengths: torch.Tensor
    slots: torch.Tensor | None = None
    prefix_keys: torch.Tensor | None = None
    prefix_values: torch.Tensor | None = None
    prefix_ids: torch.Tensor | None = None
    prefix_lengths: torch.Tensor | None = None

    def options(self) -> dict[str, Any]:
        names = "slots prefix_keys prefix_values prefix_ids prefix_lengths"
        return {name: getattr(self, name) for name in names.split()}

    def run(self, **options: Any) -> torch.Tensor:
        positional = (self.query, self.key_cache, self.value_cache, self.lengths)
        return fk.decode_attention(*positional, **{**self.options(), **options})

    def to(self, dtype: torch.dtype) -> "Problem":
        names = "query key_cache value_cache prefix_keys prefix_values"
        tensors = {name: getattr(self, name) for name in names.split()}
        return replace(self, **{n: None if x is None else x.to(dtype) for n, x in tensors.items()})

    def rows(self, index: torch.Tensor) -> "Problem":
        """Only these rows of the batch; the cache stays."""
        slots = torch.arange(len(self.lengths)) if self.slots is None else self.slots
        ids = None if self.prefix_ids is None else self.prefix_ids[index.to(self.query.device)]
        return replace(
            self,
            query=self.query[index],
            lengths=self.lengths[index],
            slots=slots.to(self.query.device)[index],
            prefix_ids=ids,
        )

    def definition(
        self, scale: float | None = None, window: int = 0, softcap: float = 0.0
    ) -> torch.Tensor:
        scale = self.query.shape[-1] ** -0.5 if scale is None else scale
        positional = (self.query, self.key_cache, self.value_cache, self.lengths)
        return decode_attention_fwd(*positional, *self.options().values(), scale, window, softcap)


def problem(
    num_rows: int = 5,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 64,
    capacity: int = 300,
    prefix: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    amount: float = 1.0,
) -> Problem:
    """Random rows in random slots. heads: of queries and of keys; prefix: how many and how long.

    The first row has no token in its slot, the last one all; what no row may see is NaN."""
    num_heads, num_kv_heads = heads

    def draw(*shape: int) -> torch.Tensor:
        return (amount * torch.randn(*shape)).to(dtype)

    keys, values = (draw(num_rows + 2, num_kv_heads, capacity, head_dim) for _ in range(2))
    lengths = torch.randint(1, capacity + 1, (num_rows,))
    slots = torch.randperm(num_rows + 2)[:num_rows]
    if num_rows:
        lengths[0], lengths[-1] = 0, capacity
    used = torch.zeros(num_rows + 2, dtype=torch.int64).index_put((slots,), lengths)
    beyond = (torch.arange(capacity) >= used[:, None])[:, None, :, None]
    given: dict[str, torch.Tensor] = {}
    if prefix is not None:
        count, longest = prefix
        shape = (count, num_kv_heads, longest, head_dim)
        shared = torch.randint(0, longest + 1, (count,))
        shared[0] = longest
        ids = torch.randint(-1, count, (num_rows,))
        ids[:2] = 0
        past = (torch.arange(longest) >= shared[:, None])[:, None, :, None]
        given = {
            "prefix_keys": draw(*shape).masked_fill(past, math.nan),
            "prefix_values": draw(*shape).masked_fill(past, math.nan),
            "prefix_ids": ids,
            "prefix_lengths": shared,
        }
    return Problem(
        query=draw(num_rows, num_heads, head_dim).to(device),
        key_cache=keys.masked_fill(beyond, math.nan).to(device),
        value_cache=values.masked_fill(beyond, math.nan).to(device),
        lengths=lengths.to(device),
        slots=slots.to(device),
        **{name: x.to(device) for name, x in given.items()},
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) and bool((a.isnan() == b.isnan()).all())

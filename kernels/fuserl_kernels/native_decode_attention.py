"""decode_attention on the CPU: float32, bf16 or fp16 caches in the compiled module."""

import torch

from fuserl_kernels import native
from fuserl_kernels.token_logprobs import _unit_stride

_NO_LAYOUT: tuple[int, ...] = (0,) * 8


def _layout(keys: torch.Tensor, values: torch.Tensor) -> tuple[int, ...]:
    return keys.shape[0], keys.shape[2], *keys.stride()[:3], *values.stride()[:3]


def decode_attention_native(
    query: torch.Tensor,  # [B, num_heads, head_dim]
    key_cache: torch.Tensor,  # [num_slots, num_kv_heads, T, head_dim]
    value_cache: torch.Tensor,
    lengths: torch.Tensor,  # [B] int64
    slots: torch.Tensor | None,
    prefix_keys: torch.Tensor | None,  # [num_prefixes, num_kv_heads, P, head_dim]
    prefix_values: torch.Tensor | None,
    prefix_ids: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    _plan: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns [B, num_heads, head_dim] of query's dtype. It needs no plan: rows that share a prefix
    find its keys in the processor's caches.

    Raises ValueError for a length, slot or prefix that does not exist."""
    query, lengths = _unit_stride(query), lengths.contiguous()
    slots = None if slots is None else slots.contiguous()
    prefix_ids = None if prefix_ids is None else prefix_ids.contiguous()
    prefix_lengths = None if prefix_lengths is None else prefix_lengths.contiguous()
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if prefix_keys is None or prefix_values is None:
        prefix_layout = _NO_LAYOUT
    else:
        prefix_layout = _layout(prefix_keys, prefix_values)
    native.module().decode_attention(
        dtype=native.dtype(query),
        query=query.data_ptr(),
        query_shape=query.shape,
        query_strides=query.stride()[:2],
        num_kv_heads=key_cache.shape[1],
        key_cache=key_cache.data_ptr(),
        value_cache=value_cache.data_ptr(),
        cache_layout=_layout(key_cache, value_cache),
        lengths=lengths.data_ptr(),
        slots=native.address(slots),
        prefix_keys=native.address(prefix_keys),
        prefix_values=native.address(prefix_values),
        prefix_layout=prefix_layout,
        prefix_ids=native.address(prefix_ids),
        prefix_lengths=native.address(prefix_lengths),
        scale=scale,
        window=window,
        softcap=softcap,
        out=out.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return out

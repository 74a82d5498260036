"""Attention of one new token a row over cached keys and values: softmax(cap(scale q K^T)) V."""

import torch

from fuserl_kernels.reference.sequences import compute_dtype


def decode_attention_fwd(
    query: torch.Tensor,  # [B, num_heads, head_dim]
    key_cache: torch.Tensor,  # [num_slots, num_kv_heads, T, head_dim]
    value_cache: torch.Tensor,
    lengths: torch.Tensor,  # [B] int64
    slots: torch.Tensor | None,  # [B] int64, negative for a row that is off
    prefix_keys: torch.Tensor | None,  # [num_prefixes, num_kv_heads, P, head_dim]
    prefix_values: torch.Tensor | None,
    prefix_ids: torch.Tensor | None,  # [B] int64, negative for none
    prefix_lengths: torch.Tensor | None,  # [num_prefixes] int64
    scale: float,
    window: int,  # 0 for none
    softcap: float,  # 0 for none
) -> torch.Tensor:
    """Returns [B, num_heads, head_dim] of query's dtype.

    A row's keys are the tokens of its prefix, then those of its slot; head h reads the kv head
    h // (num_heads / num_kv_heads). A row that is off, or has no token, gives zeros."""
    num_rows, num_heads, head_dim = query.shape
    if key_cache.shape[0] == 0:  # without a slot every row is off
        return torch.zeros_like(query, memory_format=torch.contiguous_format)
    dtype = compute_dtype(query)
    if slots is None:
        slots = torch.arange(num_rows, device=query.device)
    on = slots >= 0
    slots = slots.clamp(min=0)
    keys, values = key_cache[slots], value_cache[slots]  # [B, num_kv_heads, T, head_dim]
    tokens = torch.arange(keys.shape[2], device=query.device)
    visible = (tokens < lengths[:, None]) & on[:, None]  # [B, T]
    positions = tokens.expand_as(visible)
    total = lengths
    if prefix_keys is not None:
        assert prefix_values is not None
        assert prefix_ids is not None
        assert prefix_lengths is not None
        has_prefix = on & (prefix_ids >= 0)
        ids = torch.where(has_prefix, prefix_ids, 0)
        shared = torch.where(has_prefix, prefix_lengths[ids], 0)  # [B]
        keys = torch.cat([prefix_keys[ids], keys], 2)
        values = torch.cat([prefix_values[ids], values], 2)
        tokens = torch.arange(prefix_keys.shape[2], device=query.device)
        in_prefix = (tokens < shared[:, None]) & on[:, None]
        visible = torch.cat([in_prefix, visible], 1)  # [B, P + T]
        positions = torch.cat([tokens.expand_as(in_prefix), positions + shared[:, None]], 1)
        total = lengths + shared
    if window:
        visible &= positions >= (total - window)[:, None]  # the query's position is total - 1
    hidden = ~visible[:, None, :]
    keys = keys.to(dtype).masked_fill(hidden[..., None], 0)
    values = values.to(dtype).masked_fill(hidden[..., None], 0)
    num_kv_heads = key_cache.shape[1]
    grouped = query.to(dtype).reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = scale * (grouped @ keys.transpose(2, 3))  # [B, num_kv_heads, group, P + T]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(hidden[:, None], -torch.inf), -1)
    has_key = visible.any(-1)[:, None, None, None]
    out = torch.where(has_key, weights @ values, 0)
    return out.reshape(num_rows, num_heads, head_dim).to(query.dtype)

"""Attention over packed sequences, with gradients: each token sees its own sequence's past.

The choice, made by what is installed and where the tensors are: flash-attn (Dao, 2023) for
bf16 and fp16 on CUDA; else torch's variable-length attention there; else torch's scaled dot
product attention (SDPA), one sequence at a time, or on a CPU those of one length. SDPA on a CPU is
a fused kernel too, and at ragged lengths several times faster so than in one padded call.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fuserl.model.cpu_attention import cpu_attention
from fuserl.model.packing import Packing

_HALVES = (torch.bfloat16, torch.float16)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention within each sequence.

    query [N, num_heads, head_dim]; key, value [N, num_kv_heads, head_dim], heads shared in groups
    where there are fewer (Ainslie et al., 2023). window: a query sees that many tokens, itself
    included. softcap: scores become softcap * tanh(scores / softcap). Returns [N, num_heads,
    head_dim].
    """
    if window is not None and window >= packing.max_length:
        window = None
    name, _ = choice(query.device, query.dtype, softcap is not None, query.shape[2])
    attend = _IMPLEMENTATIONS[name]
    return attend(query, key, value, packing, scale, window, softcap)


def choice(
    device: torch.device, dtype: torch.dtype, softcap: bool = False, head_dim: int = 64
) -> tuple[str, str]:
    """Which implementation runs for tensors of this kind, and why: for `fuserl doctor` too."""
    if device.type != "cuda" and softcap:
        return "sdpa", "in plain operations: torch's fused kernel has no softcap"
    if device.type != "cuda":
        return "sdpa", "torch's fused kernel, the sequences of one length at a time"
    if dtype not in _HALVES:
        return "sdpa", f"the variable-length kernels take bf16 and fp16, not {dtype}"
    if _flash_attn() is not None:
        return "flash-attn", "installed"
    if softcap:
        return "sdpa", "torch's variable-length attention has no softcap; install flash-attn"
    if head_dim % 8:
        return "sdpa", f"torch's variable-length attention takes multiples of 8, not {head_dim}"
    return "varlen", "torch's variable-length attention; flash-attn is not installed"


@functools.cache
def _flash_attn() -> Callable[..., Any] | None:
    try:
        return importlib.import_module("flash_attn").flash_attn_varlen_func
    except ImportError:
        return None


def _by_flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    attend = _flash_attn()
    assert attend is not None
    return attend(
        query,
        key,
        value,
        cu_seqlens_q=packing.cu_seqlens,
        cu_seqlens_k=packing.cu_seqlens,
        max_seqlen_q=packing.max_length,
        max_seqlen_k=packing.max_length,
        softmax_scale=scale,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )


def _by_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if key.shape[1] != query.shape[1]:  # torch 2.11's takes as many key heads as query heads
        group = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(group, dim=1)
        value = value.repeat_interleave(group, dim=1)
    out = varlen_attn(
        query,
        key,
        value,
        packing.cu_seqlens,
        packing.cu_seqlens,
        packing.max_length,
        packing.max_length,
        scale=scale,
        window_size=(-1, 0) if window is None else (window - 1, 0),
    )
    assert isinstance(out, Tensor)  # a tuple only where more was asked for
    return out


def _by_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    if query.device.type == "cpu" and window is None and softcap is None:
        return cpu_attention(query, key, value, packing.lengths, scale)
    lengths = list(packing.lengths)
    grouped = query.shape[1] != key.shape[1]
    parts = []
    for q, k, v in zip(*(x.split(lengths) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, heads, S, head_dim]
        mask = None
        if window is not None and window < q.shape[2]:
            mask = _window_mask(q.shape[2], window, q.device)
        if softcap is not None:
            out = _capped(q, k, v, scale, mask, softcap)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
            )
        parts.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """[length, length] bool, True where the query (row) sees the key."""
    visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return visible.triu(1 - window)


def _capped(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, softcap: float
) -> Tensor:
    """The definition, for what no fused kernel of torch computes."""
    if mask is None:
        mask = _window_mask(query.shape[2], query.shape[2], query.device)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(2, 3)
    if scores.dtype in _HALVES:
        scores = scores.float()
    scores = softcap * torch.tanh(scores * (scale / softcap))
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return weights.to(value.dtype) @ value


_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "flash-attn": _by_flash_attn,
    "varlen": _by_varlen,
    "sdpa": _by_sdpa,
}

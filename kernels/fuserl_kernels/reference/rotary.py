"""Rotary position embedding (Su et al. 2021, "RoFormer") of the heads of a fused projection.

A token's row holds all query heads, all key heads, all value heads. In query and key heads the pair
(a, b) of dimensions i becomes (a cos_i - b sin_i, b cos_i + a sin_i), with the token's row of the
tables; pairs are (i, i + rotary_dim / 2), or (2 i, 2 i + 1) where interleaved. Dimensions from
rotary_dim on stay. With a norm (Zhang & Sennrich 2019), a head x is first
x * rsqrt(mean(x^2) + eps) * (weight_offset + weight).
"""

from collections.abc import Sequence

import torch

from fuserl_kernels.reference.sequences import compute_dtype


def head_dim_of(qkv: torch.Tensor, num_heads: int, num_kv_heads: int) -> int:
    return qkv.shape[1] // (num_heads + 2 * num_kv_heads)


def _heads(qkv: torch.Tensor, num_heads: int, num_kv_heads: int) -> Sequence[torch.Tensor]:
    """Query, key and value heads [N, heads, head_dim] of rows [N, row]."""
    head_dim = head_dim_of(qkv, num_heads, num_kv_heads)
    return qkv.unflatten(1, (-1, head_dim)).split((num_heads, num_kv_heads, num_kv_heads), 1)


def _angles(table: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[N, 1, rotary_dim / 2]; an empty table has no rows to look at."""
    if table.shape[1] == 0:
        return table.new_empty(positions.shape[0], 1, 0, dtype=dtype)
    return table[positions].to(dtype).unsqueeze(1)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [N, heads, head_dim] by cos and sin [N, 1, rotary_dim / 2]; with -sin it turns back."""
    half = cos.shape[-1]
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
    turned = (first * cos - second * sin, second * cos + first * sin)
    together = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((together, x[..., 2 * half :]), -1)


def _inverse_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rotary_fwd(
    qkv: torch.Tensor,  # [N, (num_heads + 2 num_kv_heads) head_dim]
    cos: torch.Tensor,  # [num_positions, rotary_dim / 2]
    sin: torch.Tensor,
    positions: torch.Tensor,  # [N]
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool,
    q_norm_weight: torch.Tensor | None,  # [head_dim]
    k_norm_weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns query, key and value [N, heads, head_dim], rounded once."""
    dtype = compute_dtype(qkv)
    query, key, value = _heads(qkv, num_heads, num_kv_heads)
    cos, sin = _angles(cos, positions, dtype), _angles(sin, positions, dtype)

    def finished(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        x = x.to(dtype)
        if weight is not None:
            x = x * _inverse_rms(x, eps) * (weight_offset + weight.to(dtype))
        return _turn(x, cos, sin, interleaved).to(qkv.dtype)

    value = value.clone(memory_format=torch.contiguous_format)
    return finished(query, q_norm_weight), finished(key, k_norm_weight), value


def rotary_kv_write_fwd(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    key_cache: torch.Tensor,  # [num_slots, num_kv_heads, T, head_dim]
    value_cache: torch.Tensor,
    slots: torch.Tensor,  # [N]; below 0: token n's key and value go nowhere
    offsets: torch.Tensor,  # [N]
    *options: int | bool | float | torch.Tensor | None,
) -> torch.Tensor:
    """Returns the query of rotary_fwd and writes its key and value into the caches."""
    query, key, value = rotary_fwd(qkv, cos, sin, positions, *options)  # type: ignore[arg-type]
    on = slots >= 0
    key_cache[slots[on], :, offsets[on]] = key[on]
    value_cache[slots[on], :, offsets[on]] = value[on]
    return query


def rotary_bwd(
    like: torch.Tensor,  # of the dtype and device of qkv
    grad_query: torch.Tensor | None,  # [N, heads, head_dim]; None for zero
    grad_key: torch.Tensor | None,
    grad_value: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    qkv: torch.Tensor | None,  # None without a norm
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of qkv and of the two norms' weights, empty for an absent norm."""
    dtype, num_tokens = compute_dtype(like), positions.shape[0]
    cos, sin = _angles(cos, positions, dtype), _angles(sin, positions, dtype)
    query = key = None
    if qkv is not None:
        query, key, _ = _heads(qkv, num_heads, num_kv_heads)

    def turned_back(
        grad: torch.Tensor | None, x: torch.Tensor | None, weight: torch.Tensor | None, heads: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grad_weight = like.new_zeros(0) if weight is None else weight.new_zeros(head_dim)
        if grad is None:
            return like.new_zeros(num_tokens, heads, head_dim), grad_weight
        grad = _turn(grad.to(dtype), cos, -sin, interleaved)
        if weight is not None and x is not None:
            scale = _inverse_rms(x.to(dtype), eps)
            normed = x.to(dtype) * scale
            grad_weight = (grad * normed).sum((0, 1)).to(weight.dtype)
            grad = grad * (weight_offset + weight.to(dtype))
            grad = scale * (grad - normed * (grad * normed).mean(-1, keepdim=True))
        return grad.to(like.dtype), grad_weight

    grad_query, grad_q_weight = turned_back(grad_query, query, q_norm_weight, num_heads)
    grad_key, grad_k_weight = turned_back(grad_key, key, k_norm_weight, num_kv_heads)
    if grad_value is None:
        grad_value = like.new_zeros(num_tokens, num_kv_heads, head_dim)
    grad_qkv = torch.cat((grad_query, grad_key, grad_value), 1).flatten(1)
    return grad_qkv, grad_q_weight, grad_k_weight

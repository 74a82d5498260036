"""rotary and rotary_kv_write on the CPU: float32, bf16 or fp16 rows in the compiled module."""

from typing import Any

import torch

from fuserl_kernels import native
from fuserl_kernels.reference.rotary import head_dim_of
from fuserl_kernels.row_layout import readable_vector

_NO_STRIDES = (0, 0, 0)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy whose last dimension lies together."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _tables(cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
    """Their arguments. The caller keeps the tensors."""
    return {
        "cos": cos.data_ptr(),
        "sin": sin.data_ptr(),
        "half": cos.shape[1],
        "cos_stride": cos.stride(0),
        "sin_stride": sin.stride(0),
        "positions": positions.data_ptr(),
    }


def _weights(
    q_norm_weight: torch.Tensor | None, k_norm_weight: torch.Tensor | None
) -> dict[str, Any]:
    """Their arguments. The caller keeps the tensors."""
    float32 = native.module().Dtype.float32
    return {
        "q_weight": native.address(q_norm_weight),
        "q_weight_dtype": float32 if q_norm_weight is None else native.dtype(q_norm_weight),
        "k_weight": native.address(k_norm_weight),
        "k_weight_dtype": float32 if k_norm_weight is None else native.dtype(k_norm_weight),
    }


def readable_weight(weight: torch.Tensor | None) -> torch.Tensor | None:
    """A norm's weight as kernels take it."""
    return None if weight is None else readable_vector(weight)


def _forward(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    options: tuple,  # from num_heads on those of rotary_fwd
    key: torch.Tensor,
    key_strides: tuple[int, ...],  # of tokens or slots, of heads, of a slot's tokens
    value: torch.Tensor,
    value_strides: tuple[int, ...],
    slots: torch.Tensor | None = None,
    offsets: torch.Tensor | None = None,
) -> torch.Tensor:
    """Fills key and value; returns the query."""
    num_heads, num_kv_heads, interleaved, q_norm_weight, k_norm_weight, eps, offset = options
    num_tokens, head_dim = qkv.shape[0], head_dim_of(qkv, num_heads, num_kv_heads)
    query = qkv.new_empty(num_tokens, num_heads, head_dim)
    qkv, cos, sin = unit_stride(qkv), unit_stride(cos), unit_stride(sin)
    positions = positions.contiguous()
    q_norm_weight, k_norm_weight = readable_weight(q_norm_weight), readable_weight(k_norm_weight)
    native.module().rotary_forward(
        dtype=native.dtype(qkv),
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        qkv=qkv.data_ptr(),
        qkv_stride=qkv.stride(0),
        **_tables(cos, sin, positions),
        interleaved=interleaved,
        **_weights(q_norm_weight, k_norm_weight),
        eps=eps,
        weight_offset=offset,
        query=query.data_ptr(),
        key=key.data_ptr(),
        key_row_stride=key_strides[0],
        key_head_stride=key_strides[1],
        key_offset_stride=key_strides[2],
        value=value.data_ptr(),
        value_row_stride=value_strides[0],
        value_head_stride=value_strides[1],
        value_offset_stride=value_strides[2],
        slots=native.address(slots),
        offsets=native.address(offsets),
        num_threads=torch.get_num_threads(),
    )
    return query


def forward_native(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rotary_fwd of the reference."""
    head_dim = head_dim_of(qkv, num_heads, num_kv_heads)
    key = qkv.new_empty(qkv.shape[0], num_kv_heads, head_dim)
    value = qkv.new_empty(qkv.shape[0], num_kv_heads, head_dim)
    strides = (num_kv_heads * head_dim, head_dim, 0)
    all_options = (num_heads, num_kv_heads, *options)
    query = _forward(qkv, cos, sin, positions, all_options, key, strides, value, strides)
    return query, key, value


def kv_write_native(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    *options: Any,
) -> torch.Tensor:
    """rotary_kv_write_fwd of the reference."""
    slots, offsets = slots.contiguous(), offsets.contiguous()
    caches = (key_cache, key_cache.stride(), value_cache, value_cache.stride())
    return _forward(qkv, cos, sin, positions, options, *caches, slots, offsets)


def backward_native(
    like: torch.Tensor,
    grad_query: torch.Tensor | None,
    grad_key: torch.Tensor | None,
    grad_value: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    qkv: torch.Tensor | None,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rotary_bwd of the reference."""
    num_tokens = positions.shape[0]
    grad_qkv = like.new_empty(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim)
    cos, sin, positions = unit_stride(cos), unit_stride(sin), positions.contiguous()
    q_weight, k_weight = readable_weight(q_norm_weight), readable_weight(k_norm_weight)
    grad_weights = None
    if qkv is not None:
        qkv = unit_stride(qkv)
        grad_weights = like.new_empty(2, head_dim, dtype=torch.float32)
    gradients = [
        None if grad is None else unit_stride(grad) for grad in (grad_query, grad_key, grad_value)
    ]
    strides = [_NO_STRIDES if grad is None else grad.stride() for grad in gradients]
    native.module().rotary_backward(
        dtype=native.dtype(like),
        num_tokens=num_tokens,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        qkv=native.address(qkv),
        qkv_stride=0 if qkv is None else qkv.stride(0),
        **_tables(cos, sin, positions),
        interleaved=interleaved,
        **_weights(q_weight, k_weight),
        eps=eps,
        weight_offset=weight_offset,
        grad_query=native.address(gradients[0]),
        query_token_stride=strides[0][0],
        query_head_stride=strides[0][1],
        grad_key=native.address(gradients[1]),
        key_token_stride=strides[1][0],
        key_head_stride=strides[1][1],
        grad_value=native.address(gradients[2]),
        value_token_stride=strides[2][0],
        value_head_stride=strides[2][1],
        grad_qkv=grad_qkv.data_ptr(),
        grad_weights=native.address(grad_weights),
        num_threads=torch.get_num_threads(),
    )
    return grad_qkv, *weight_gradients(like, grad_weights, q_norm_weight, k_norm_weight)


def weight_gradients(
    like: torch.Tensor, gradients: torch.Tensor | None, *weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of float32 gradients [2, head_dim] in the dtypes of both norms' weights, each in
    memory of its own; empty for an absent norm."""
    query, key = (
        like.new_empty(0)
        if weight is None or gradients is None
        else gradients[kind].to(weight.dtype, copy=True)
        for kind, weight in enumerate(weights)
    )
    return query, key

"""Rotary embedding of a fused query-key-value projection, with the norm before it and the write
into the cache after it.

qkv [N, (num_heads + 2 num_kv_heads) head_dim] -> query, key and value heads, in one pass over
memory: each element is read once and written once, where it belongs. Query and key heads are
normalised on request (Qwen3, Gemma 3) and turned by their position; everything between is float32
(float64 for float64) with one rounding at the end. Saved for backward: the tables and positions,
and qkv only where there is a norm. Formulas: reference/rotary.py.
"""

from typing import Any

import torch

from fuserl_kernels import checks
from fuserl_kernels.native_rotary import backward_native, forward_native, kv_write_native
from fuserl_kernels.reference.rotary import (
    head_dim_of,
    rotary_bwd,
    rotary_fwd,
    rotary_kv_write_fwd,
)
from fuserl_kernels.registration import not_twice, register
from fuserl_kernels.triton_rotary import backward_triton, forward_triton, kv_write_triton

MAX_HEAD_DIM = 256

FORWARD = {"reference": rotary_fwd, "triton": forward_triton, "native": forward_native}
BACKWARD = {"reference": rotary_bwd, "triton": backward_triton, "native": backward_native}


def _writing(implementation: Any) -> Any:
    def run(qkv: Any, cos: Any, sin: Any, positions: Any, *rest: Any) -> torch.Tensor:
        query = implementation(qkv, cos, sin, positions, *rest)
        # Whoever saved a cache for a backward of its own now gets autograd's error.
        for cache in rest[:2]:
            if not cache.is_inference():
                torch.autograd.graph.increment_version(cache)
        return query

    return run


KV_WRITE = {
    "reference": rotary_kv_write_fwd,
    "triton": _writing(kv_write_triton),
    "native": _writing(kv_write_native),
}


def _fake(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, head_dim = qkv.shape[0], head_dim_of(qkv, num_heads, num_kv_heads)
    return (
        qkv.new_empty(num_tokens, num_heads, head_dim),
        qkv.new_empty(num_tokens, num_kv_heads, head_dim),
        qkv.new_empty(num_tokens, num_kv_heads, head_dim),
    )


def _fake_kv_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    num_heads: int,
    *_: Any,
) -> torch.Tensor:
    return qkv.new_empty(qkv.shape[0], num_heads, key_cache.shape[3])


def _fake_bwd(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    like, positions, head_dim = arguments[0], arguments[6], arguments[8]
    num_heads, num_kv_heads, _, q, k = arguments[9:14]
    return (
        like.new_empty(positions.shape[0], (num_heads + 2 * num_kv_heads) * head_dim),
        like.new_empty(0) if q is None else q.new_empty(head_dim),
        like.new_empty(0) if k is None else k.new_empty(head_dim),
    )


def _check_positions(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, *_: Any
) -> None:
    if cos.shape[1]:
        checks.indices_data("positions", positions, 0, cos.shape[0])


def _check_kv_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    *_: Any,
) -> None:
    _check_positions(qkv, cos, sin, positions)
    lowest = checks.indices_data("slots", slots, None, key_cache.shape[0])
    if lowest is not None and lowest < 0:
        offsets = offsets[slots >= 0]
    checks.indices_data("offsets", offsets, 0, key_cache.shape[2])


def _setup_context(ctx: Any, inputs: tuple, _: tuple) -> None:
    qkv, cos, sin, positions, num_heads, num_kv_heads, interleaved, q, k, eps, offset = inputs
    ctx.sizes = (head_dim_of(qkv, num_heads, num_kv_heads), num_heads, num_kv_heads, interleaved)
    ctx.numbers = (eps, offset)
    ctx.set_materialize_grads(False)
    kept = None if q is None and k is None else qkv
    ctx.save_for_backward(cos, sin, positions, kept, q, k)


def _backward(
    ctx: Any,
    grad_query: torch.Tensor | None,
    grad_key: torch.Tensor | None,
    grad_value: torch.Tensor | None,
) -> tuple:
    cos, sin, positions, qkv, q, k = ctx.saved_tensors
    gradients = (grad_query, grad_key, grad_value)
    like = next((grad for grad in gradients if grad is not None), None)
    if like is None:
        return (None,) * 11
    grad_qkv, grad_q, grad_k = _op_bwd(
        like, *gradients, cos, sin, positions, qkv, *ctx.sizes, q, k, *ctx.numbers
    )
    grad_q, grad_k = None if q is None else grad_q, None if k is None else grad_k
    return grad_qkv, *[None] * 6, grad_q, grad_k, None, None


_OPTIONS = (
    "int num_heads, int num_kv_heads, bool interleaved, Tensor? q_norm_weight, "
    "Tensor? k_norm_weight, float eps, float weight_offset)"
)
_op = register(
    f"rotary(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, {_OPTIONS}"
    " -> (Tensor, Tensor, Tensor)",
    FORWARD,
    _fake,
    check=_check_positions,
    setup_context=_setup_context,
    backward=_backward,
)
_op_bwd = register(
    "rotary_bwd(Tensor like, Tensor? grad_query, Tensor? grad_key, Tensor? grad_value, Tensor cos, "
    f"Tensor sin, Tensor positions, Tensor? qkv, int head_dim, {_OPTIONS}"
    " -> (Tensor, Tensor, Tensor)",
    BACKWARD,
    _fake_bwd,
    backward=not_twice,
)
_op_kv_write = register(
    "rotary_kv_write(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor(a!) key_cache, "
    f"Tensor(b!) value_cache, Tensor slots, Tensor offsets, {_OPTIONS} -> Tensor",
    KV_WRITE,
    _fake_kv_write,
    check=_check_kv_write,
)


def _token_integers(name: str, tensor: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
    """int64 [N]"""
    checks.integer(name, tensor)
    checks.shape(name, tensor, qkv.shape[:1], "the rows of qkv")
    checks.device(name, tensor, "qkv", qkv)
    return tensor.long()


def _check_table(name: str, table: torch.Tensor, qkv: torch.Tensor) -> None:
    checks.floating(name, table)
    checks.device(name, table, "qkv", qkv)
    if table.dtype != torch.float32 and not table.dtype == qkv.dtype == torch.float64:
        raise ValueError(f"{name} must be float32, not {table.dtype}")
    if table.dim() != 2:
        raise ValueError(
            f"{name} must have shape [num_positions, rotary_dim / 2], not {list(table.shape)}"
        )


def _checked(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
    eps: float,
    weight_offset: float,
) -> int:
    """Raises ValueError for what both functions refuse; returns head_dim."""
    checks.floating("qkv", qkv)
    checks.whole("num_heads", num_heads, 1)
    checks.whole("num_kv_heads", num_kv_heads, 1)
    heads = num_heads + 2 * num_kv_heads
    if qkv.dim() != 2 or qkv.shape[1] % heads:
        raise ValueError(
            f"qkv must have shape [N, {heads} * head_dim] for num_heads {num_heads} and "
            f"num_kv_heads {num_kv_heads}, not {list(qkv.shape)}"
        )
    head_dim = qkv.shape[1] // heads
    if head_dim % 2 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"qkv must have an even head_dim of at most {MAX_HEAD_DIM}, not {head_dim}"
        )
    _check_table("cos", cos, qkv)
    _check_table("sin", sin, qkv)
    checks.shape("sin", sin, cos.shape, "that of cos")
    if 2 * cos.shape[1] > head_dim:
        raise ValueError(
            f"cos must have at most head_dim / 2 = {head_dim // 2} columns, not {cos.shape[1]}"
        )
    for name, weight in (("q_norm_weight", q_norm_weight), ("k_norm_weight", k_norm_weight)):
        if weight is not None:
            checks.floating(name, weight)
            checks.shape(name, weight, (head_dim,), "[head_dim]")
            checks.device(name, weight, "qkv", qkv)
    checks.at_least("eps", eps, 0.0)
    checks.finite("weight_offset", weight_offset)
    return head_dim


def rotary(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool = False,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value heads of a fused projection, the first two turned by their position.

    qkv: [N, (num_heads + 2 num_kv_heads) * head_dim] floating point, any strides: all query heads,
        then all key heads, then all value heads. head_dim is even and at most 256.
    cos, sin: [num_positions, rotary_dim / 2] float32 (float64 goes with float64 qkv), with any
        scaling of the attention inside; they get no gradient. rotary_dim may be smaller than
        head_dim (the other dimensions stay), or 0.
    positions: [N] integer, each token's row of the tables.
    interleaved: pairs are (2 i, 2 i + 1) as in GPT-J, else (i, i + rotary_dim / 2).
    q_norm_weight, k_norm_weight: [head_dim] floating point: query or key heads x become
        x * rsqrt(mean(x^2) + eps) * (weight_offset + weight) before they turn. Nothing is rounded
        between norm and rotation, where modules of transformers round twice.

    Returns query [N, num_heads, head_dim], key and value [N, num_kv_heads, head_dim], contiguous,
    of the dtype of qkv. Raises ValueError for wrong dtypes, shapes, devices or numbers and for a
    position outside the tables. On CUDA positions are not looked at, since that would wait for the
    device: such tokens get NaN.
    """
    _checked(
        qkv, cos, sin, num_heads, num_kv_heads, q_norm_weight, k_norm_weight, eps, weight_offset
    )
    return _op(
        qkv,
        checks.detached(cos),
        checks.detached(sin),
        _token_integers("positions", positions, qkv),
        num_heads,
        num_kv_heads,
        interleaved,
        q_norm_weight,
        k_norm_weight,
        eps,
        weight_offset,
    )


def rotary_kv_write(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    interleaved: bool = False,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> torch.Tensor:
    """`rotary` with key and value written into the caches of a decoder: the same bits, one launch.

    key_cache, value_cache: [num_slots, num_kv_heads, T, head_dim] of the dtype of qkv, with unit
        stride in the last dimension. Key and value of token n go to [slots[n], :, offsets[n]]; two
        tokens of one call must not meet there.
    slots, offsets: [N] integer. A token whose slot is below 0 writes nothing, whatever its offset.
    The other arguments are those of `rotary`.

    Returns query [N, num_heads, head_dim]. There is no gradient. Raises ValueError where one is
    wanted, as `rotary` does, and for a slot or an offset outside the caches. On CUDA these are not
    looked at: such tokens write nothing.
    """
    head_dim = _checked(
        qkv, cos, sin, num_heads, num_kv_heads, q_norm_weight, k_norm_weight, eps, weight_offset
    )
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        checks.floating(name, cache)
        if cache.dtype != qkv.dtype or cache.dim() != 4:
            raise ValueError(
                f"{name} must be {qkv.dtype} [num_slots, num_kv_heads, T, head_dim] as qkv, not "
                f"{cache.dtype} {list(cache.shape)}"
            )
        expected = (key_cache.shape[0], num_kv_heads, key_cache.shape[2], head_dim)
        checks.shape(name, cache, expected, "[num_slots, num_kv_heads, T, head_dim]")
        checks.device(name, cache, "qkv", qkv)
        if cache.stride(3) != 1:
            raise ValueError(f"{name} must have unit stride in its last dimension")
    for name, tensor in (
        ("qkv", qkv),
        ("key_cache", key_cache),
        ("value_cache", value_cache),
        ("q_norm_weight", q_norm_weight),
        ("k_norm_weight", k_norm_weight),
    ):
        if checks.wants_grad(tensor):
            raise ValueError(
                f"{name} wants a gradient, and rotary_kv_write has none: use torch.no_grad()"
            )
    return _op_kv_write(
        qkv,
        checks.detached(cos),
        checks.detached(sin),
        _token_integers("positions", positions, qkv),
        key_cache,
        value_cache,
        _token_integers("slots", slots, qkv),
        _token_integers("offsets", offsets, qkv),
        num_heads,
        num_kv_heads,
        interleaved,
        q_norm_weight,
        k_norm_weight,
        eps,
        weight_offset,
    )

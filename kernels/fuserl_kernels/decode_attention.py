"""Attention of one new token a row over cached keys and values, with prompts stored once.

Keys are taken in splits of SPLIT tokens, counted from the start of the prefix and from the start of
the slot; each split gives its largest score, the sum of its weights and their sum of values in
float32, and the splits are merged in ascending order, those of the prefix first. No size but the
row's own lengths enters, so a row's bits are the same in any batch, beside any row, in a cache of
any capacity and on any number of threads. Definition: reference/attention.py.
"""

from typing import Any

import torch

from fuserl_kernels import backend, checks
from fuserl_kernels.native_decode_attention import decode_attention_native
from fuserl_kernels.reference.attention import decode_attention_fwd
from fuserl_kernels.reference.attention_plan import plan_shape
from fuserl_kernels.registration import register
from fuserl_kernels.triton_decode_attention import MAX_HEAD_DIM, decode_attention_triton


def _reference(query: torch.Tensor, *arguments: Any) -> torch.Tensor:
    arguments = arguments[:11]  # a plan changes no result
    if query.device.type == "cpu":  # on CUDA looking at data would wait for the device
        _check_data(*arguments[:-3])
    return decode_attention_fwd(query, *arguments)


FORWARD: backend.Table = {
    "reference": _reference,
    "triton": decode_attention_triton,
    "native": decode_attention_native,
}


def _fake(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(query.shape)


_op = register(
    "decode_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lengths, "
    "Tensor? slots, Tensor? prefix_keys, Tensor? prefix_values, Tensor? prefix_ids, "
    "Tensor? prefix_lengths, float scale, int window, float softcap, Tensor? plan=None) -> Tensor",
    FORWARD,
    _fake,
)


def _check_data(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    lengths: torch.Tensor,
    slots: torch.Tensor | None,
    prefix_keys: torch.Tensor | None,
    prefix_values: torch.Tensor | None,
    prefix_ids: torch.Tensor | None,
    prefix_lengths: torch.Tensor | None,
) -> None:
    """As the native implementation checks: of rows that are on."""
    on = torch.ones_like(lengths, dtype=torch.bool) if slots is None else slots >= 0
    if slots is not None:
        _in_range("slots", slots[on], key_cache.shape[0] - 1)
    _in_range("lengths", lengths[on], key_cache.shape[2])
    if prefix_keys is not None and prefix_ids is not None and prefix_lengths is not None:
        used = prefix_ids[on & (prefix_ids >= 0)]
        _in_range("prefix_ids", used, prefix_keys.shape[0] - 1)
        _in_range("prefix_lengths", prefix_lengths[used], prefix_keys.shape[2])


def _in_range(name: str, numbers: torch.Tensor, most: int) -> None:
    bad = (numbers < 0) | (numbers > most)
    if bad.any():
        raise ValueError(
            f"{name} must be at most {most} and not negative where in use, "
            f"found {int(numbers[bad][0])}"
        )


def _cache(
    names: tuple[str, str],
    keys: torch.Tensor,
    values: torch.Tensor,
    query: torch.Tensor,
) -> None:
    """Keys and values [items, num_kv_heads, tokens, head_dim] that suit a query."""
    for name, tensor in zip(names, (keys, values), strict=True):
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != query.dtype:
            raise ValueError(f"{name} must be a {query.dtype} tensor like query")
        if tensor.dim() != 4 or tensor.shape[3] != query.shape[2]:
            raise ValueError(
                f"{name} must have shape [items, num_kv_heads, tokens, {query.shape[2]}], "
                f"not {list(tensor.shape)}"
            )
        if tensor.stride(3) != 1 and tensor.shape[3] > 1:
            raise ValueError(f"{name} must have a last stride of 1, not {tensor.stride(3)}")
        checks.device(name, tensor, "query", query)
    if keys.shape != values.shape:
        checks.shape(names[1], values, keys.shape, f"that of {names[0]}")
    if keys.shape[1] < 1 or query.shape[1] % keys.shape[1]:
        raise ValueError(
            f"{names[0]} must have a number of heads that divides the {query.shape[1]} of query, "
            f"not {keys.shape[1]}"
        )


def _row_numbers(name: str, numbers: torch.Tensor, count: int, query: torch.Tensor) -> None:
    if not isinstance(numbers, torch.Tensor) or numbers.dtype != torch.int64:
        raise ValueError(f"{name} must be an int64 tensor")
    if numbers.dim() != 1 or numbers.shape[0] != count:
        raise ValueError(f"{name} must have shape [{count}], not {list(numbers.shape)}")
    checks.device(name, numbers, "query", query)


def _check_plan(plan: torch.Tensor, query: torch.Tensor, prefix_keys: torch.Tensor | None) -> None:
    if prefix_keys is None:
        raise ValueError("prefix_keys must be given beside prefix_plan")
    if not isinstance(plan, torch.Tensor) or plan.dtype != torch.int32:
        raise ValueError("prefix_plan must be an int32 tensor")
    expected = plan_shape(prefix_keys, query.shape[0], query.shape[1])
    checks.shape("prefix_plan", plan, expected, "that of decode_attention_plan for these tensors")
    checks.device("prefix_plan", plan, "query", query)


def uses_plan(query: torch.Tensor) -> bool:
    """Whether decode_attention of such a query reads a plan: it is worth making one then."""
    implementation = backend.select("decode_attention", FORWARD, query)
    return implementation is decode_attention_triton


def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    lengths: torch.Tensor,
    *,
    slots: torch.Tensor | None = None,
    prefix_keys: torch.Tensor | None = None,
    prefix_values: torch.Tensor | None = None,
    prefix_ids: torch.Tensor | None = None,
    prefix_lengths: torch.Tensor | None = None,
    prefix_plan: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attend with query [B, num_heads, head_dim], one new token a row, to cached tokens.

    key_cache, value_cache: [num_slots, num_kv_heads, T, head_dim] of query's dtype, with any
        strides but a last one of 1; num_kv_heads divides num_heads (grouped-query attention).
    lengths: [B] int64, tokens of the row's slot in use, the one being decoded included. What the
        cache holds past them is never used.
    slots: [B] int64, the row's slot, default the row number; a negative one turns the row off.
    prefix_keys, prefix_values: [num_prefixes, num_kv_heads, P, head_dim], prompts stored once;
        prefix_ids: [B] int64, the row's prompt, negative for none; prefix_lengths: [num_prefixes]
        int64. All four or none. A row attends to its prefix's first prefix_lengths tokens, then to
        its slot's first lengths tokens. A prefix is read once for the rows that share it.
    prefix_plan: what decode_attention_plan made of these prefix_ids and slots, for whoever calls
        this several times with them, as the layers of a step do; default: made here. It must be
        of these very tensors: on CUDA nothing checks that it is. Only the kernel of Triton reads
        it (`uses_plan`).
    scale: of the scores, default head_dim ** -0.5.
    window: only keys at positions above query position - window, positions running through
        prefix and slot; the query's is the last. Where a window hides a prefix's token from some
        of the rows that share it, that token's value must be finite.
    softcap: scores become softcap * tanh(scores / softcap).

    Returns [B, num_heads, head_dim] of query's dtype; zeros for a row that is off or has no token.
    float32 inside (float64 for float64). No gradient: raises RuntimeError where one is wanted.
    Raises ValueError for what does not fit; a length, slot or prefix that does not exist raises it
    on the CPU and gives NaN on CUDA, where looking would wait for the device.
    """
    checks.floating("query", query)
    if query.dim() != 3 or not 1 <= query.shape[2] <= MAX_HEAD_DIM:
        raise ValueError(
            f"query must have shape [B, num_heads, head_dim] with a head_dim of 1 to "
            f"{MAX_HEAD_DIM}, not {list(query.shape)}"
        )
    num_rows, _, head_dim = query.shape
    _cache(("key_cache", "value_cache"), key_cache, value_cache, query)
    _row_numbers("lengths", lengths, num_rows, query)
    if slots is not None:
        _row_numbers("slots", slots, num_rows, query)
    elif key_cache.shape[0] < num_rows:
        raise ValueError(f"key_cache must have a slot for each of {num_rows} rows without slots")
    prefix = (prefix_keys, prefix_values, prefix_ids, prefix_lengths)
    if prefix_keys is not None:
        names = ("prefix_keys", "prefix_values", "prefix_ids", "prefix_lengths")
        for name, given in zip(names, prefix, strict=True):
            if given is None:
                raise ValueError(f"{name} must be given beside prefix_keys")
        assert prefix_values is not None
        assert prefix_ids is not None
        assert prefix_lengths is not None
        _cache(("prefix_keys", "prefix_values"), prefix_keys, prefix_values, query)
        if prefix_keys.shape[0] < 1:
            raise ValueError("prefix_keys must hold a prefix; give none where there is none")
        if prefix_keys.shape[1] != key_cache.shape[1]:
            raise ValueError(
                f"prefix_keys must have the {key_cache.shape[1]} heads of key_cache, "
                f"not {prefix_keys.shape[1]}"
            )
        _row_numbers("prefix_ids", prefix_ids, num_rows, query)
        _row_numbers("prefix_lengths", prefix_lengths, prefix_keys.shape[0], query)
    elif prefix != (None, None, None, None):
        raise ValueError("prefix_keys must be given beside the other tensors of the prefix")
    if prefix_plan is not None:
        _check_plan(prefix_plan, query, prefix_keys)
    if scale is None:
        scale = head_dim**-0.5
    else:
        checks.finite("scale", scale)
    if window is not None:
        checks.whole("window", window, 1)
    checks.softcap(softcap)
    if checks.wants_grad(query, key_cache, value_cache, prefix_keys, prefix_values):
        raise RuntimeError(
            "decode_attention has no gradient: call it under torch.no_grad() or detach its inputs"
        )
    return _op(
        query,
        key_cache,
        value_cache,
        lengths,
        slots,
        *prefix,
        float(scale),
        window or 0,
        softcap or 0.0,
        prefix_plan,
    )

"""The plan of decode attention: which rows of a batch read a prefix together.

It depends on which row has which prefix and which rows are on, and not on a layer's numbers: made
once a step, it serves all layers. Definition: reference/attention_plan.py.
"""

from typing import Any

import torch

from fuserl_kernels import backend, checks
from fuserl_kernels.reference.attention_plan import decode_attention_plan_fwd, plan_shape
from fuserl_kernels.registration import register
from fuserl_kernels.triton_attention_plan import plan_triton

FORWARD: backend.Table = {
    "reference": decode_attention_plan_fwd,
    "triton": plan_triton,
    "native": decode_attention_plan_fwd,  # C++ reads no plan: nothing waits for one
}


def _fake(
    prefix_keys: torch.Tensor, prefix_ids: torch.Tensor, _: Any, num_heads: int
) -> torch.Tensor:
    shape = plan_shape(prefix_keys, prefix_ids.shape[0], num_heads)
    return prefix_ids.new_empty(shape, dtype=torch.int32)


_op = register(
    "decode_attention_plan(Tensor prefix_keys, Tensor prefix_ids, Tensor? slots, int num_heads)"
    " -> Tensor",
    FORWARD,
    _fake,
)


def decode_attention_plan(
    prefix_keys: torch.Tensor,
    prefix_ids: torch.Tensor,
    *,
    num_heads: int,
    slots: torch.Tensor | None = None,
) -> torch.Tensor:
    """`prefix_plan` of `decode_attention` for all calls with these prefix_ids and slots.

    prefix_keys: [num_prefixes, num_kv_heads, P, head_dim], of which shape and dtype count.
    prefix_ids, slots: [B] int64, as decode_attention takes them. num_heads: of the query.

    Returns [num_tiles, rows] int32, for nothing but that argument: row numbers, -1 where a tile has
    no more. Raises ValueError for what does not fit.
    """
    checks.floating("prefix_keys", prefix_keys)
    if prefix_keys.dim() != 4 or prefix_keys.shape[0] < 1:
        raise ValueError(
            "prefix_keys must have shape [num_prefixes, num_kv_heads, P, head_dim] with a prefix, "
            f"not {list(prefix_keys.shape)}"
        )
    checks.whole("num_heads", num_heads, 1)
    if prefix_keys.shape[1] < 1 or num_heads % prefix_keys.shape[1]:
        raise ValueError(
            f"num_heads must be a multiple of the {prefix_keys.shape[1]} heads of prefix_keys, "
            f"not {num_heads}"
        )
    for name, numbers in (("prefix_ids", prefix_ids), ("slots", slots)):
        if numbers is None and name == "slots":
            continue
        if not isinstance(numbers, torch.Tensor) or numbers.dtype != torch.int64:
            raise ValueError(f"{name} must be an int64 tensor")
        if numbers.shape != prefix_ids.shape or numbers.dim() != 1:
            raise ValueError(f"{name} must have shape [B], not {list(numbers.shape)}")
        checks.device(name, numbers, "prefix_keys", prefix_keys)
    return _op(checks.detached(prefix_keys), prefix_ids, slots, num_heads)

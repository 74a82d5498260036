"""The plan of decode attention on a GPU: a fill and one launch. Definition: attention_plan.py."""

import torch

from fuserl_kernels.reference.attention_plan import plan_shape
from fuserl_kernels.triton_runtime import Configuration, tl, triton


@triton.jit(do_not_specialize=["num_rows", "num_prefixes"])
def _plan_kernel(  # type: ignore[no-untyped-def]
    prefix_ids_ptr,
    slots_ptr,
    members_ptr,
    num_rows,
    num_prefixes,
    ROWS: tl.constexpr,  # of a tile
    BLOCK: tl.constexpr,
):
    """Writes each row that has a prefix into a tile of rows with that prefix, in ascending order.

    Prefix p begins at tile (rows with a smaller prefix) // ROWS + p: far enough from the one before
    for any numbers of rows, and without a sum over tiles."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    prefix = _prefix_of(prefix_ids_ptr, slots_ptr, row, num_rows, num_prefixes)
    before = tl.zeros((BLOCK,), tl.int32)
    rank = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_rows, BLOCK):
        other = start + tl.arange(0, BLOCK)
        others = _prefix_of(prefix_ids_ptr, slots_ptr, other, num_rows, num_prefixes)
        smaller = (others[None, :] >= 0) & (others[None, :] < prefix[:, None])
        same = (others[None, :] == prefix[:, None]) & (other[None, :] < row[:, None])
        before += tl.sum(smaller.to(tl.int32), axis=1)
        rank += tl.sum(same.to(tl.int32), axis=1)
    tile = before // ROWS + prefix + rank // ROWS
    tl.store(members_ptr + tile * ROWS + rank % ROWS, row, mask=prefix >= 0)


@triton.jit
def _prefix_of(prefix_ids_ptr, slots_ptr, row, num_rows, num_prefixes):  # type: ignore[no-untyped-def]
    """A row's prefix; -1 for none, for one that does not exist and for a row that is off."""
    prefix = tl.load(prefix_ids_ptr + row, mask=row < num_rows, other=-1)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row, mask=row < num_rows, other=-1)
        prefix = tl.where(slot >= 0, prefix, -1)
    return tl.where((prefix >= 0) & (prefix < num_prefixes), prefix, -1)


PLAN_CONFIGURATION = Configuration(4, 1, {"BLOCK": 64})


def plan_triton(
    prefix_keys: torch.Tensor,  # [num_prefixes, num_kv_heads, P, head_dim]
    prefix_ids: torch.Tensor,  # [B] int64
    slots: torch.Tensor | None,
    num_heads: int,
) -> torch.Tensor:
    """Returns [num_tiles, rows] int32 in a fill and a launch."""
    prefix_ids = prefix_ids.contiguous()
    slots = None if slots is None else slots.contiguous()
    shape = plan_shape(prefix_keys, len(prefix_ids), num_heads)
    members = torch.full(shape, -1, dtype=torch.int32, device=prefix_ids.device)
    if len(prefix_ids):
        blocks = -(-len(prefix_ids) // PLAN_CONFIGURATION.constants["BLOCK"])
        _plan_kernel[(blocks,)](
            prefix_ids,
            slots,
            members,
            len(prefix_ids),
            prefix_keys.shape[0],
            shape[1],
            **PLAN_CONFIGURATION.arguments(),
        )
    return members

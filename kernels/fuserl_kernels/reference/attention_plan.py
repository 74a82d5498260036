"""Which rows read a prefix together: tiles of rows that share one."""

import torch

_QUERIES = {2: 64}  # of a tile, by bytes of an element
_WIDE_QUERIES = 16


def prefix_tile(group: int, item_bytes: int) -> tuple[int, int]:
    """(heads, rows) of a tile of queries; group: the heads that share a kv head."""
    queries = _QUERIES.get(item_bytes, _WIDE_QUERIES)
    heads = min(queries, 1 << (group - 1).bit_length())
    return heads, queries // heads


def plan_shape(prefix_keys: torch.Tensor, num_rows: int, num_heads: int) -> tuple[int, int]:
    """(tiles, rows of a tile) of a plan."""
    num_prefixes, num_kv_heads = prefix_keys.shape[:2]
    _, rows = prefix_tile(num_heads // num_kv_heads, prefix_keys.element_size())
    return num_rows // rows + num_prefixes, rows


def decode_attention_plan_fwd(
    prefix_keys: torch.Tensor,  # [num_prefixes, num_kv_heads, P, head_dim]
    prefix_ids: torch.Tensor,  # [B] int64
    slots: torch.Tensor | None,  # [B] int64
    num_heads: int,
) -> torch.Tensor:
    """Returns [num_tiles, rows] int32: row numbers, ascending in a tile, -1 where there is none.

    Prefix p begins at tile (rows with a smaller prefix) // rows + p: far enough from the one before
    for any numbers of rows, and without a sum over tiles. A row that is off, or has no prefix or
    one that does not exist, is in no tile."""
    num_tiles, rows = plan_shape(prefix_keys, len(prefix_ids), num_heads)
    planned = (prefix_ids >= 0) & (prefix_ids < prefix_keys.shape[0])
    if slots is not None:
        planned &= slots >= 0
    smaller = planned & (prefix_ids < prefix_ids[:, None])  # [row, other]
    numbers = torch.arange(len(prefix_ids), device=prefix_ids.device)
    same = planned & (prefix_ids == prefix_ids[:, None]) & (numbers < numbers[:, None])
    before, rank = smaller.sum(1), same.sum(1)
    tile = before // rows + prefix_ids + rank // rows
    nowhere = num_tiles * rows
    place = torch.where(planned, tile * rows + rank % rows, nowhere)
    members = torch.full((nowhere + 1,), -1, dtype=torch.int32, device=prefix_ids.device)
    members.scatter_(0, place, numbers.to(torch.int32))
    return members[:-1].view(num_tiles, rows).clone()

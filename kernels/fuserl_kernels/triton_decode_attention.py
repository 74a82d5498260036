"""decode_attention on a GPU: split-KV with splits of one size, and prompts read once.

Three kernels. The slot kernel has a program for each (row, kv head, split), whose tile of queries
are the heads that share the kv head. The prefix kernel has one for each (tile of rows that share a
prefix, kv head, split). Both leave for each query and split the largest score, the sum of weights
and the weighted sum of values; the merge kernel folds them in ascending order. The grids follow the
capacities, and programs past a row's length return at once: lengths are never looked at on the
host, so a captured graph serves every step. Which rows share a prefix is found on the device too,
by the plan: once a step for all layers, where the caller keeps it (triton_attention_plan.py).
"""

import torch

from fuserl_kernels.reference.attention_plan import prefix_tile
from fuserl_kernels.triton_attention_plan import plan_triton
from fuserl_kernels.triton_helpers import LOG2E, _cap, _cast
from fuserl_kernels.triton_runtime import INTERPRETING, Configuration, tl, triton

MAX_HEAD_DIM = 256
_SPLIT_TOKENS = 256
SPLIT = tl.constexpr(_SPLIT_TOKENS)
_MAX_TILE = 64  # queries of a program, at most
_BY_HAND = tl.constexpr(INTERPRETING)


@triton.jit
def _product(a, b, sums):  # type: ignore[no-untyped-def]
    """a @ b + sums. The interpreter would multiply the bit patterns of bf16, and its product of a
    row depends on where in the tile the row is."""
    if _BY_HAND:
        terms = a.to(tl.float32)[:, :, None] * b.to(tl.float32)[None, :, :]
        return sums + tl.sum(terms, axis=1)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _visible(  # type: ignore[no-untyped-def]
    row,
    lengths_ptr,
    slots_ptr,
    prefix_ids_ptr,
    prefix_lengths_ptr,
    num_slots,
    capacity,
    num_prefixes,
    prefix_capacity,
    window,
    WINDOW: tl.constexpr,
):
    """(slot, prefix_first, prefix_last, slot_first, slot_last, broken) of one row or of several.

    A row that is off sees nothing; one whose numbers do not exist neither, and is broken."""
    length = tl.load(lengths_ptr + row)
    slot = row.to(tl.int64)
    if slots_ptr is not None:
        slot = tl.load(slots_ptr + row)
    exists = (slot < num_slots) & (length >= 0) & (length <= capacity)
    shared = length * 0
    if prefix_ids_ptr is not None:
        prefix = tl.load(prefix_ids_ptr + row)
        known = prefix < num_prefixes
        shared = tl.load(prefix_lengths_ptr + prefix, mask=known & (prefix >= 0), other=0)
        exists = exists & known & (shared >= 0) & (shared <= prefix_capacity)
    on = exists & (slot >= 0)
    slot_last = tl.where(on, length, 0)
    prefix_last = tl.where(on, shared, 0)
    prefix_first = prefix_last * 0
    slot_first = prefix_first
    if WINDOW:
        hidden = prefix_last + slot_last - window
        prefix_first = tl.maximum(hidden, 0)
        slot_first = tl.maximum(hidden - prefix_last, 0)
    return slot, prefix_first, prefix_last, slot_first, slot_last, (slot >= 0) & (exists == 0)


@triton.jit
def _attend_split(  # type: ignore[no-untyped-def]
    query,  # [M, BLOCK_D]
    key_ptr,  # of the item and head
    value_ptr,
    key_token_stride,
    value_token_stride,
    split,
    first,  # [M], the first key that each query sees
    earliest,  # the smallest of them
    last,
    head_dim,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """(largest score [M], sum of weights [M], weighted sum of values [M, BLOCK_D]) of one split, by
    powers of 2. Keys that no query sees are not read."""
    columns = tl.arange(0, BLOCK_D)
    largest = tl.full((query.shape[0],), -float("inf"), tl.float32)
    total = tl.zeros((query.shape[0],), tl.float32)
    sums = tl.zeros((query.shape[0], BLOCK_D), tl.float32)
    start = split * SPLIT
    begin = tl.maximum(earliest - start, 0) // BLOCK_N * BLOCK_N
    end = tl.minimum(last - start, SPLIT)
    for offset in range(begin, end, BLOCK_N):
        tokens = start + offset + tl.arange(0, BLOCK_N)
        inside = (tokens >= earliest) & (tokens < last)
        mask = inside[:, None]
        if not EVEN_D:
            mask = mask & (columns[None, :] < head_dim)
        keys = tl.load(
            key_ptr + tokens[:, None] * key_token_stride + columns[None, :], mask=mask, other=0.0
        )
        scores = tl.zeros((query.shape[0], BLOCK_N), tl.float32)
        scores = _product(query, tl.trans(keys), scores) * scale
        scores = _cap(scores, softcap, SOFTCAP) * LOG2E
        seen = inside[None, :] & (tokens[None, :] >= first[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        raised = tl.maximum(largest, tl.max(scores, axis=1))
        reference = tl.where(raised == -float("inf"), 0.0, raised)
        weights = tl.exp2(scores - reference[:, None])
        keep = tl.exp2(largest - reference)
        total = total * keep + tl.sum(weights, axis=1)
        values = tl.load(
            value_ptr + tokens[:, None] * value_token_stride + columns[None, :],
            mask=mask,
            other=0.0,
        )
        sums = _product(_cast(weights, values.dtype), values, sums * keep[:, None])
        largest = raised
    return largest, total, sums


@triton.jit
def _store_part(  # type: ignore[no-untyped-def]
    stats_ptr, sums_ptr, part, valid, largest, total, sums, head_dim, BLOCK_D: tl.constexpr
):
    columns = tl.arange(0, BLOCK_D)
    tl.store(stats_ptr + 2 * part, largest, mask=valid)
    tl.store(stats_ptr + 2 * part + 1, total, mask=valid)
    target = sums_ptr + part[:, None] * head_dim + columns[None, :]
    tl.store(target, sums, mask=valid[:, None] & (columns[None, :] < head_dim))


@triton.jit
def _load_query(  # type: ignore[no-untyped-def]
    query_ptr, row, head, valid, row_stride, head_stride, head_dim, BLOCK_D: tl.constexpr
):
    columns = tl.arange(0, BLOCK_D)
    source = query_ptr + row * row_stride + head * head_stride
    mask = valid[:, None] & (columns[None, :] < head_dim)
    return tl.load(source[:, None] + columns[None, :], mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=["num_slots", "capacity", "num_prefixes", "prefix_capacity", "window"]
)
def _slot_kernel(  # type: ignore[no-untyped-def]
    query_ptr,
    key_ptr,
    value_ptr,
    lengths_ptr,
    slots_ptr,
    prefix_ids_ptr,
    prefix_lengths_ptr,
    stats_ptr,
    sums_ptr,
    out_ptr,
    num_heads,
    num_kv_heads,
    head_dim,
    query_row_stride,
    query_head_stride,
    num_slots,
    capacity,
    key_slot_stride,
    key_head_stride,
    key_token_stride,
    value_slot_stride,
    value_head_stride,
    value_token_stride,
    num_prefixes,
    prefix_capacity,
    first_part,  # splits of the prefix before
    num_parts,
    scale,
    window,
    softcap,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr,  # there is no other split: write what a merge would
    EVEN_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    group = num_heads // num_kv_heads
    num_tiles = tl.cdiv(group, BLOCK_G)
    row = program // (num_kv_heads * num_tiles)
    kv_head = program // num_tiles % num_kv_heads
    in_group = program % num_tiles * BLOCK_G + tl.arange(0, BLOCK_G)
    valid = in_group < group
    head = kv_head * group + in_group
    slot, _, _, first, last, broken = _visible(
        row, lengths_ptr, slots_ptr, prefix_ids_ptr, prefix_lengths_ptr,
        num_slots, capacity, num_prefixes, prefix_capacity, window, WINDOW,
    )  # fmt: skip
    begin = tl.maximum(first, split * SPLIT)
    if not WHOLE:  # noqa: SIM102 (known to the compiler)
        if begin >= tl.minimum(last, (split + 1) * SPLIT):
            return
    query = _load_query(
        query_ptr, row, head, valid, query_row_stride, query_head_stride, head_dim, BLOCK_D
    )
    slot = tl.maximum(slot, 0)
    largest, total, sums = _attend_split(
        query,
        key_ptr + slot * key_slot_stride + kv_head * key_head_stride,
        value_ptr + slot * value_slot_stride + kv_head * value_head_stride,
        key_token_stride,
        value_token_stride,
        split,
        in_group * 0 + first,
        first,
        last,
        head_dim, scale, softcap, SOFTCAP, EVEN_D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    if WHOLE:
        columns = tl.arange(0, BLOCK_D)
        empty = tl.where(broken, float("nan"), 0.0)
        out = tl.where(last > first, sums / total[:, None], empty)
        target = out_ptr + (row * num_heads + head[:, None]) * head_dim + columns[None, :]
        mask = valid[:, None] & (columns[None, :] < head_dim)
        tl.store(target, _cast(out, out_ptr.dtype.element_ty), mask=mask)
    else:
        part = (row * num_heads + head) * num_parts + first_part + split
        _store_part(stats_ptr, sums_ptr, part, valid, largest, total, sums, head_dim, BLOCK_D)


@triton.jit(
    do_not_specialize=["num_slots", "capacity", "num_prefixes", "prefix_capacity", "window"]
)
def _prefix_kernel(  # type: ignore[no-untyped-def]
    query_ptr,
    key_ptr,
    value_ptr,
    lengths_ptr,
    slots_ptr,
    prefix_ids_ptr,
    prefix_lengths_ptr,
    members_ptr,
    stats_ptr,
    sums_ptr,
    num_heads,
    num_kv_heads,
    head_dim,
    query_row_stride,
    query_head_stride,
    num_slots,
    capacity,
    num_prefixes,
    prefix_capacity,
    key_prefix_stride,
    key_head_stride,
    key_token_stride,
    value_prefix_stride,
    value_head_stride,
    value_token_stride,
    num_parts,
    scale,
    window,
    softcap,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    group = num_heads // num_kv_heads
    num_tiles = tl.cdiv(group, BLOCK_G)
    tile = program // (num_kv_heads * num_tiles)
    kv_head = program // num_tiles % num_kv_heads
    leader = tl.load(members_ptr + tile * ROWS)
    if leader < 0:
        return
    query_number = tl.arange(0, ROWS * BLOCK_G)
    row = tl.load(members_ptr + tile * ROWS + query_number // BLOCK_G).to(tl.int64)
    in_group = program % num_tiles * BLOCK_G + query_number % BLOCK_G
    valid = (row >= 0) & (in_group < group)
    row = tl.maximum(row, 0)
    head = kv_head * group + in_group
    prefix = tl.load(prefix_ids_ptr + leader)
    _, first, last, _, _, _ = _visible(
        row, lengths_ptr, slots_ptr, prefix_ids_ptr, prefix_lengths_ptr,
        num_slots, capacity, num_prefixes, prefix_capacity, window, WINDOW,
    )  # fmt: skip
    first = tl.where(valid & (last > 0), first, prefix_capacity)
    last = tl.max(tl.where(valid, last, 0), axis=0)
    earliest = tl.min(first, axis=0)
    if tl.maximum(earliest, split * SPLIT) >= tl.minimum(last, (split + 1) * SPLIT):
        return
    query = _load_query(
        query_ptr, row, head, valid, query_row_stride, query_head_stride, head_dim, BLOCK_D
    )
    largest, total, sums = _attend_split(
        query,
        key_ptr + prefix * key_prefix_stride + kv_head * key_head_stride,
        value_ptr + prefix * value_prefix_stride + kv_head * value_head_stride,
        key_token_stride,
        value_token_stride,
        split,
        first,
        earliest,
        last,
        head_dim, scale, softcap, SOFTCAP, EVEN_D, BLOCK_D, BLOCK_N,
    )  # fmt: skip
    part = (row * num_heads + head) * num_parts + split
    _store_part(stats_ptr, sums_ptr, part, valid, largest, total, sums, head_dim, BLOCK_D)


@triton.jit
def _fold(largest, total, sums, stats_ptr, sums_ptr, part, head_dim, columns):  # type: ignore[no-untyped-def]
    """The statistics with those of one more split."""
    part_largest = tl.load(stats_ptr + 2 * part)
    part_total = tl.load(stats_ptr + 2 * part + 1)
    part_sums = tl.load(sums_ptr + part * head_dim + columns, mask=columns < head_dim, other=0.0)
    raised = tl.maximum(largest, part_largest)
    reference = tl.where(raised == -float("inf"), 0.0, raised)
    keep, take = tl.exp2(largest - reference), tl.exp2(part_largest - reference)
    return raised, total * keep + part_total * take, sums * keep + part_sums * take


@triton.jit(
    do_not_specialize=["num_slots", "capacity", "num_prefixes", "prefix_capacity", "window"]
)
def _merge_kernel(  # type: ignore[no-untyped-def]
    lengths_ptr,
    slots_ptr,
    prefix_ids_ptr,
    prefix_lengths_ptr,
    stats_ptr,
    sums_ptr,
    out_ptr,
    num_heads,
    head_dim,
    num_slots,
    capacity,
    num_prefixes,
    prefix_capacity,
    first_part,
    num_parts,
    window,
    WINDOW: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // num_heads
    columns = tl.arange(0, BLOCK_D)
    _, prefix_first, prefix_last, slot_first, slot_last, broken = _visible(
        row, lengths_ptr, slots_ptr, prefix_ids_ptr, prefix_lengths_ptr,
        num_slots, capacity, num_prefixes, prefix_capacity, window, WINDOW,
    )  # fmt: skip
    largest = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    sums = tl.zeros((BLOCK_D,), tl.float32)
    part = program * num_parts
    if prefix_last > prefix_first:
        for split in range(prefix_first // SPLIT, tl.cdiv(prefix_last, SPLIT)):
            largest, total, sums = _fold(
                largest, total, sums, stats_ptr, sums_ptr, part + split, head_dim, columns
            )
    if slot_last > slot_first:
        for split in range(slot_first // SPLIT, tl.cdiv(slot_last, SPLIT)):
            largest, total, sums = _fold(
                largest, total, sums, stats_ptr, sums_ptr, part + first_part + split, head_dim,
                columns,
            )  # fmt: skip
    seen = (prefix_last > prefix_first) | (slot_last > slot_first)
    empty = tl.where(broken, float("nan"), 0.0)
    out = tl.where(seen, sums / total, empty)
    target = out_ptr + program * head_dim + columns
    tl.store(target, _cast(out, out_ptr.dtype.element_ty), mask=columns < head_dim)


def slot_configuration(item_bytes: int, block_d: int) -> Configuration:
    """One for each shape: another would give other bits."""
    if item_bytes == 4:
        return Configuration(4, 1, {"BLOCK_N": 32 if block_d <= 128 else 16})
    return Configuration(4, 2, {"BLOCK_N": 64 if block_d <= 128 else 32})


def prefix_configuration(item_bytes: int, block_d: int) -> Configuration:
    if item_bytes == 4:
        return Configuration(4, 1, {"BLOCK_N": 16})
    return Configuration(4 if block_d <= 128 else 8, 2, {"BLOCK_N": 64 if block_d <= 128 else 32})


MERGE_CONFIGURATION = Configuration(1, 1)


def block_columns(head_dim: int) -> int:
    """Columns of a tile: a power of 2, and 16 at least for a product."""
    return max(16, 1 << (head_dim - 1).bit_length())


def slot_tile(group: int) -> int:
    """Queries of a slot program: the heads that share a kv head, 16 at least for a product."""
    return min(_MAX_TILE, max(16, 1 << (group - 1).bit_length()))


def decode_attention_triton(
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
    plan: torch.Tensor | None = None,  # [num_tiles, rows] int32
) -> torch.Tensor:
    """Returns [B, num_heads, head_dim] of query's dtype: one launch for a cache of one split
    without a prefix, two without a prefix, three with one; a fill and a launch more without its
    plan."""
    num_rows, num_heads, head_dim = query.shape
    num_slots, num_kv_heads, capacity, _ = key_cache.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    if query.stride(2) != 1 and head_dim > 1:
        query = query.contiguous()
    lengths = lengths.contiguous()
    slots = None if slots is None else slots.contiguous()
    item_bytes, group = query.element_size(), num_heads // num_kv_heads
    block_d = block_columns(head_dim)
    num_prefixes = prefix_capacity = 0
    if prefix_keys is not None:
        assert prefix_ids is not None
        assert prefix_lengths is not None
        prefix_ids, prefix_lengths = prefix_ids.contiguous(), prefix_lengths.contiguous()
        num_prefixes, _, prefix_capacity, _ = prefix_keys.shape
    slot_parts = max(1, -(-capacity // _SPLIT_TOKENS))
    prefix_parts = -(-prefix_capacity // _SPLIT_TOKENS) if num_prefixes else 0
    num_parts = slot_parts + prefix_parts
    whole = num_parts == 1 and prefix_ids is None
    stats = sums = None
    if not whole:
        stats = query.new_empty((num_rows, num_heads, num_parts, 2), dtype=torch.float32)
        sums = query.new_empty((num_rows, num_heads, num_parts, head_dim), dtype=torch.float32)
    flags = {"WINDOW": window > 0, "BLOCK_D": block_d}
    tile = {**flags, "SOFTCAP": softcap > 0, "EVEN_D": head_dim == block_d}
    if prefix_parts:
        assert prefix_keys is not None
        assert prefix_values is not None
        assert prefix_ids is not None
        heads, rows = prefix_tile(group, item_bytes)
        if plan is None:
            plan = plan_triton(prefix_keys, prefix_ids, slots, num_heads)
        plan = plan.contiguous()
        _prefix_kernel[(len(plan) * num_kv_heads * -(-group // heads), prefix_parts)](
            query,
            prefix_keys,
            prefix_values,
            lengths,
            slots,
            prefix_ids,
            prefix_lengths,
            plan,
            stats,
            sums,
            num_heads,
            num_kv_heads,
            head_dim,
            *query.stride()[:2],
            num_slots,
            capacity,
            num_prefixes,
            prefix_capacity,
            *prefix_keys.stride()[:3],
            *prefix_values.stride()[:3],
            num_parts,
            scale,
            window,
            softcap,
            BLOCK_G=heads,
            ROWS=rows,
            **tile,
            **prefix_configuration(item_bytes, block_d).arguments(),
        )
    block_g = slot_tile(group)
    _slot_kernel[(num_rows * num_kv_heads * -(-group // block_g), slot_parts)](
        query,
        key_cache,
        value_cache,
        lengths,
        slots,
        prefix_ids,
        prefix_lengths,
        stats,
        sums,
        out,
        num_heads,
        num_kv_heads,
        head_dim,
        *query.stride()[:2],
        num_slots,
        capacity,
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        num_prefixes,
        prefix_capacity,
        prefix_parts,
        num_parts,
        scale,
        window,
        softcap,
        WHOLE=whole,
        BLOCK_G=block_g,
        **tile,
        **slot_configuration(item_bytes, block_d).arguments(),
    )
    if not whole:
        _merge_kernel[(num_rows * num_heads,)](
            lengths,
            slots,
            prefix_ids,
            prefix_lengths,
            stats,
            sums,
            out,
            num_heads,
            head_dim,
            num_slots,
            capacity,
            num_prefixes,
            prefix_capacity,
            prefix_parts,
            num_parts,
            window,
            **flags,
            **MERGE_CONFIGURATION.arguments(),
        )
    return out

"""advance_rows on a GPU: one launch for what is some thirty small ones in torch. Definition:
reference/advance_rows.py."""

import torch

from fuserl_kernels.reference import advance_rows as reference
from fuserl_kernels.triton_runtime import Configuration, tl, triton

STOP = tl.constexpr(reference.STOP)
LIMIT = tl.constexpr(reference.LIMIT)
BROKEN = tl.constexpr(reference.BROKEN)


@triton.jit(do_not_specialize=["num_rows", "num_slots", "capacity", "num_positions"])
def _advance_kernel(  # type: ignore[no-untyped-def]
    drawn_ptr,
    logprobs_ptr,
    truncated_ptr,
    slots_ptr,
    lengths_ptr,
    limits_ptr,
    prompt_ids_ptr,
    prompt_lengths_ptr,
    token_rows_ptr,
    logprob_rows_ptr,
    truncated_rows_ptr,
    endings_ptr,
    counts_ptr,
    is_stop_ptr,  # or None
    is_flag_ptr,  # or None
    token_ids_ptr,
    at_ptr,
    places_ptr,
    used_ptr,
    positions_ptr,
    before_ptr,
    num_rows,
    num_slots,
    capacity,
    num_positions,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < num_rows
    slot = tl.load(slots_ptr + row, mask=inside, other=-1)
    length = tl.load(lengths_ptr + row, mask=inside, other=0)
    limit = tl.load(limits_ptr + row, mask=inside, other=0)
    drawn = tl.load(drawn_ptr + row, mask=inside, other=0)
    prompt = tl.load(prompt_ids_ptr + row, mask=inside, other=0)
    prompt_length = tl.load(prompt_lengths_ptr + prompt, mask=inside, other=0)
    live = slot >= 0
    place = tl.minimum(length, capacity - 1)
    # A row that is off writes nothing by slot.
    target = slot * capacity + place
    tl.store(token_rows_ptr + target, drawn, mask=live)
    logprob = tl.load(logprobs_ptr + row, mask=live, other=0.0)
    tl.store(logprob_rows_ptr + target, logprob.to(tl.float32), mask=live)
    truncated = tl.load(truncated_ptr + row, mask=live, other=0.0)
    tl.store(truncated_rows_ptr + target, truncated.to(tl.float32), mask=live)

    token_id = tl.maximum(drawn, 0)
    longer = length + live.to(tl.int64)
    end = tl.where(longer >= limit, LIMIT, 0)
    if is_stop_ptr is not None:
        stops = tl.load(is_stop_ptr + token_id, mask=live, other=0)
        end = tl.where(stops != 0, STOP, end)
    end = tl.where(drawn < 0, BROKEN, end)
    ended = live & (end > 0)
    tl.store(endings_ptr + slot, longer, mask=live)
    tl.store(endings_ptr + num_slots + 1 + slot, end.to(tl.int64), mask=live)
    tl.atomic_add(counts_ptr, tl.sum(ended.to(tl.int64), axis=0))
    if is_flag_ptr is not None:
        flags = tl.load(is_flag_ptr + token_id, mask=live & (end == 0), other=0)
        tl.atomic_add(counts_ptr + 1, tl.sum((flags != 0).to(tl.int64), axis=0))

    tl.store(token_ids_ptr + row, token_id, mask=inside)
    tl.store(at_ptr + row, tl.where(live, slot, num_slots), mask=inside)
    tl.store(places_ptr + row, place, mask=inside)
    tl.store(used_ptr + row, place + 1, mask=inside)
    position = tl.minimum(prompt_length + place, num_positions - 1)
    tl.store(positions_ptr + row, position, mask=inside)
    tl.store(before_ptr + row, slot, mask=inside)
    tl.store(lengths_ptr + row, longer, mask=inside)
    tl.store(slots_ptr + row, tl.where(ended, -1, slot), mask=inside)


CONFIGURATION = Configuration(4, 1, {"BLOCK": 128})


def advance_rows_triton(
    drawn: torch.Tensor,
    logprobs: torch.Tensor,
    truncated: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    limits: torch.Tensor,
    prompt_ids: torch.Tensor,
    prompt_lengths: torch.Tensor,
    token_rows: torch.Tensor,
    logprob_rows: torch.Tensor,
    truncated_rows: torch.Tensor,
    endings: torch.Tensor,
    counts: torch.Tensor,
    is_stop: torch.Tensor | None,
    is_flag: torch.Tensor | None,
    num_positions: int,
) -> reference.Columns:
    """Arguments and result as in the reference; a row that is off writes nothing by slot."""
    num_rows = len(slots)
    # One tensor each: what begins within a tensor may not be aligned.
    token_ids, at, places = (torch.empty_like(slots) for _ in range(3))
    used, positions, before = (torch.empty_like(slots) for _ in range(3))
    columns = (token_ids, at, places, used, positions, before)
    if num_rows:
        _advance_kernel[(-(-num_rows // CONFIGURATION.constants["BLOCK"]),)](
            drawn,
            logprobs,
            truncated,
            slots,
            lengths,
            limits,
            prompt_ids,
            prompt_lengths,
            token_rows,
            logprob_rows,
            truncated_rows,
            endings,
            counts,
            is_stop,
            is_flag,
            *columns,
            num_rows,
            token_rows.shape[0] - 1,
            token_rows.shape[1],
            num_positions,
            **CONFIGURATION.arguments(),
        )
    return columns

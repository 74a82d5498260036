"""The bookkeeping of a decode step: what was drawn is written down, and rows go on or end."""

import torch

STOP, LIMIT, BROKEN = 1, 2, 3
"""What ended a row: a stop id, its limit, logits that held no distribution."""

Columns = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def advance_rows_fwd(
    drawn: torch.Tensor,  # [B] int64, below 0 where nothing could be drawn
    logprobs: torch.Tensor,  # [B] floating
    truncated: torch.Tensor,  # [B] floating
    slots: torch.Tensor,  # [B] int64, below 0 for a row that is off
    lengths: torch.Tensor,  # [B] int64
    limits: torch.Tensor,  # [B] int64
    prompt_ids: torch.Tensor,  # [B] int64
    prompt_lengths: torch.Tensor,  # [num_prompts] int64
    token_rows: torch.Tensor,  # [num_slots + 1, T] int64
    logprob_rows: torch.Tensor,  # [num_slots + 1, T] fp32
    truncated_rows: torch.Tensor,  # [num_slots + 1, T] fp32
    endings: torch.Tensor,  # [2, num_slots + 1] int64: final lengths, and what ended them
    counts: torch.Tensor,  # [2] int64: ended, flagged
    is_stop: torch.Tensor | None,  # [V] bool
    is_flag: torch.Tensor | None,  # [V] bool
    num_positions: int,
) -> Columns:
    """Changes slots, lengths, the rows by slot, endings and counts; returns six times [B] int64:
    token ids, slots with num_slots for a row that is off, places, places + 1, positions, and slots
    as they were."""
    live = slots >= 0
    at = slots.masked_fill(~live, len(token_rows) - 1)  # there is one more, for what is off
    places = lengths.clamp(max=token_rows.shape[1] - 1)
    token_rows.index_put_((at, places), drawn)
    logprob_rows.index_put_((at, places), logprobs.float())
    truncated_rows.index_put_((at, places), truncated.float())
    token_ids = drawn.clamp(min=0)
    longer = lengths + live
    end = torch.zeros_like(slots).masked_fill_(longer >= limits, LIMIT)
    if is_stop is not None:
        end.masked_fill_(is_stop[token_ids], STOP)
    end.masked_fill_(drawn < 0, BROKEN).masked_fill_(~live, 0)
    ended = end > 0
    # A row is on until it ends: what is written for it last stays.
    endings[0].index_put_((at,), longer)
    endings[1].index_put_((at,), end)
    counts[0].add_(ended.sum())
    if is_flag is not None:
        counts[1].add_((live & ~ended & is_flag[token_ids]).sum())
    positions = (prompt_lengths[prompt_ids] + places).clamp(max=num_positions - 1)
    before = slots.clone()
    lengths.copy_(longer)
    slots.masked_fill_(ended, -1)
    return token_ids, at, places, places + 1, positions, before

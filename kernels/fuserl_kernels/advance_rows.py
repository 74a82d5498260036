"""The bookkeeping of a decode step, in place: what was drawn is written where its slot is, limits
and stop ids end rows, and the next step's numbers come out. Nothing waits for the device, and
nothing moves. Definition: reference/advance_rows.py.
"""

from typing import Any, NamedTuple

import torch

from fuserl_kernels import backend, checks
from fuserl_kernels.reference.advance_rows import Columns, advance_rows_fwd
from fuserl_kernels.registration import register
from fuserl_kernels.triton_advance_rows import advance_rows_triton


def _on_logprobs(implementation: Any) -> Any:
    """The op's first tensor is a floating one, by whose dtype an implementation is chosen."""

    def run(logprobs: torch.Tensor, drawn: torch.Tensor, *rest: Any) -> Columns:
        return implementation(drawn, logprobs, *rest)

    return run


FORWARD: backend.Table = {
    "reference": _on_logprobs(advance_rows_fwd),
    "triton": _on_logprobs(advance_rows_triton),
    # A number a row: on a CPU torch's own ops are no part of a step's time.
    "native": _on_logprobs(advance_rows_fwd),
}


def _fake(logprobs: torch.Tensor, drawn: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(drawn) for _ in Advanced._fields)


_op = register(
    "advance_rows(Tensor logprobs, Tensor drawn, Tensor truncated, Tensor(a!) slots, "
    "Tensor(b!) lengths, Tensor limits, Tensor prompt_ids, Tensor prompt_lengths, "
    "Tensor(c!) token_rows, Tensor(d!) logprob_rows, Tensor(e!) truncated_rows, "
    "Tensor(f!) endings, Tensor(g!) counts, Tensor? is_stop, Tensor? is_flag, int num_positions)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    FORWARD,
    _fake,
)


class Advanced(NamedTuple):
    """[B] int64 each, of the rows in the step that has been drawn for."""

    token_ids: torch.Tensor  # 0 where nothing could be drawn
    at: torch.Tensor  # the slot; for a row that is off the one past the last
    places: torch.Tensor  # of the token in its slot
    used: torch.Tensor  # tokens in the slot with it
    positions: torch.Tensor  # of the token in its sequence
    slots: torch.Tensor  # as they were


def advance_rows(
    drawn: torch.Tensor,
    logprobs: torch.Tensor,
    truncated_logprobs: torch.Tensor,
    *,
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
    is_stop: torch.Tensor | None = None,
    is_flag: torch.Tensor | None = None,
    num_positions: int,
) -> Advanced:
    """Take in what sample_tokens drew for each of B rows, drawn [B] with its log-probabilities.

    slots: [B] int64, below 0 for a row that is off; becomes -1 for a row that ends. No two rows
        have the same. lengths: [B] int64, tokens in the slot; one more for each row that is on.
    limits: [B] int64, of lengths. prompt_ids: [B] int64 into prompt_lengths [num_prompts] int64.
    token_rows, logprob_rows, truncated_rows: [num_slots + 1, T] int64, float32, float32: a row that
        is on gets its token at [slot, length]. The last one is for what rows that are off draw.
    endings: [2, num_slots + 1] int64: the row's length, and what ended it: 0 nothing, 1 a stop id,
        2 the limit, 3 a draw below 0. counts: [2] int64: the rows that end are added, and the rows
        that go on after a flagged token.
    is_stop, is_flag: [V] bool, tokens that end a row, and flagged ones; None where there are none.
    num_positions: positions of rows that are off stay below.

    All but the log-probabilities are contiguous, as arrays that stay in place are. What the
    last of the rows by slot holds is not defined. No gradient. Raises ValueError for wrong shapes
    and dtypes; numbers out of range are not looked at.
    """
    num_rows, (num_slots, capacity) = slots.shape[0], token_rows.shape
    by_row, by_slot = (num_rows,), (num_slots, capacity)
    expected = {
        "drawn": (drawn, torch.int64, by_row),
        "slots": (slots, torch.int64, by_row),
        "lengths": (lengths, torch.int64, by_row),
        "limits": (limits, torch.int64, by_row),
        "prompt_ids": (prompt_ids, torch.int64, by_row),
        "prompt_lengths": (prompt_lengths, torch.int64, prompt_lengths.shape[:1]),
        "token_rows": (token_rows, torch.int64, by_slot),
        "logprob_rows": (logprob_rows, torch.float32, by_slot),
        "truncated_rows": (truncated_rows, torch.float32, by_slot),
        "endings": (endings, torch.int64, (2, num_slots)),
        "counts": (counts, torch.int64, (2,)),
        "is_stop": (is_stop, torch.bool, None if is_stop is None else is_stop.shape[:1]),
        "is_flag": (is_flag, torch.bool, None if is_flag is None else is_flag.shape[:1]),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is None or shape is None:
            continue
        if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be {dtype} of shape {list(shape)} and contiguous, not "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
        checks.device(name, tensor, "logprobs", logprobs)
    for name, tensor in (("logprobs", logprobs), ("truncated_logprobs", truncated_logprobs)):
        checks.floating(name, tensor)
        checks.shape(name, tensor, by_row, "one for each row")
        checks.device(name, tensor, "drawn", drawn)
    checks.whole("num_positions", num_positions, 1)
    columns = _op(
        checks.detached(logprobs).contiguous(),
        drawn,
        checks.detached(truncated_logprobs).contiguous(),
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
        num_positions,
    )
    return Advanced(*columns)

"""KL penalties and shaped rewards on a GPU, one launch each. Formulas: reference/rewards.py.

Arithmetic is in the dtype of the output: float32, or float64 where one of the inputs is.
A block is ROWS rows of BLOCK_T slots and is counted from the end of its rows: lane j of step 0
holds the last slot but j. So scans that run backwards in time run forwards over the lanes.
"""

import math
from collections.abc import Sequence

import torch

from fuserl_kernels.reference.sequences import compute_dtype
from fuserl_kernels.triton_helpers import _cast
from fuserl_kernels.triton_kl import _clamp, _kl, _kl_slope
from fuserl_kernels.triton_runtime import INTERPRETING, Configuration, tl, triton
from fuserl_kernels.triton_whitening import new_like

# --- kl_penalty


@triton.jit
def _narrowed(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """x to dtype, from float32 or float64."""
    if dtype == tl.float64:
        return x.to(dtype)
    return _cast(x.to(tl.float32), dtype)


@triton.jit
def _kl_kernel(  # type: ignore[no-untyped-def]
    logprobs_ptr,
    ref_logprobs_ptr,
    kl_ptr,
    num_tokens,
    kl_clip,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = kl_ptr.dtype.element_ty
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_tokens
    new = tl.load(logprobs_ptr + offsets, mask=inside, other=0.0).to(dtype)
    ref = tl.load(ref_logprobs_ptr + offsets, mask=inside, other=0.0).to(dtype)
    tl.store(kl_ptr + offsets, _kl(new - ref, kl_clip, ESTIMATOR), mask=inside)


@triton.jit
def _kl_bwd_kernel(  # type: ignore[no-untyped-def]
    logprobs_ptr,
    ref_logprobs_ptr,
    grad_ptr,
    grad_logprobs_ptr,
    grad_ref_logprobs_ptr,
    num_tokens,
    grad_step,
    kl_clip,
    ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < num_tokens
    new = tl.load(logprobs_ptr + offsets, mask=inside, other=0.0).to(dtype)
    ref = tl.load(ref_logprobs_ptr + offsets, mask=inside, other=0.0).to(dtype)
    grad = tl.load(grad_ptr + offsets * grad_step, mask=inside, other=0.0)
    slope = grad * _kl_slope(new - ref, kl_clip, ESTIMATOR)
    new_dtype: tl.constexpr = grad_logprobs_ptr.dtype.element_ty
    ref_dtype: tl.constexpr = grad_ref_logprobs_ptr.dtype.element_ty
    tl.store(grad_logprobs_ptr + offsets, _narrowed(slope, new_dtype), mask=inside)
    tl.store(grad_ref_logprobs_ptr + offsets, _narrowed(-slope, ref_dtype), mask=inside)


KL_CONFIGURATION = Configuration(4, 1, {"BLOCK": 1024})


def _kl_launch(num_tokens: int) -> tuple[int]:
    return (-(-num_tokens // KL_CONFIGURATION.constants["BLOCK"]),)


def kl_penalty_triton(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str, kl_clip: float
) -> torch.Tensor:
    """kl_penalty_fwd of the reference."""
    kl = new_like(logprobs, compute_dtype(logprobs, ref_logprobs))
    if num_tokens := kl.numel():
        _kl_kernel[_kl_launch(num_tokens)](
            logprobs.contiguous(),
            ref_logprobs.contiguous(),
            kl,
            num_tokens,
            kl_clip or math.inf,
            estimator,
            **KL_CONFIGURATION.arguments(),
        )
    return kl


def kl_penalty_bwd_triton(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    estimator: str,
    kl_clip: float,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """kl_penalty_bwd of the reference. A gradient that is one number everywhere, as sums give it,
    is read as that."""
    gradients = (logprobs.new_empty(logprobs.shape), ref_logprobs.new_empty(logprobs.shape))
    if num_tokens := logprobs.numel():
        constant = not any(grad.stride())
        _kl_bwd_kernel[_kl_launch(num_tokens)](
            logprobs.contiguous(),
            ref_logprobs.contiguous(),
            grad if constant else grad.contiguous(),
            *gradients,
            num_tokens,
            int(not constant),
            kl_clip or math.inf,
            estimator,
            **KL_CONFIGURATION.arguments(),
        )
    return gradients


# --- shape_rewards


@triton.jit
def _padded_rows(rows, num_rows, row_length):  # type: ignore[no-untyped-def]
    """Where rows [ROWS] of a padded tensor start in memory, and their lengths: 0 past the last."""
    return rows * row_length, tl.where(rows < num_rows, row_length, 0)


@triton.jit
def _block(starts, lengths, step, BLOCK_T: tl.constexpr):  # type: ignore[no-untyped-def]
    """(slots, their offsets in memory, which of them exist) [ROWS, BLOCK_T] of one step."""
    slots = (lengths - 1 - step)[:, None] - tl.arange(0, BLOCK_T)[None, :]
    return slots, starts[:, None] + slots, slots >= 0


@triton.jit
def _score_slot(  # type: ignore[no-untyped-def]
    loss_mask_ptr,
    starts,
    lengths,
    row_length,
    max_slot,
    AFTER: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Slot [ROWS] of the score: the last trained token of each row, or with AFTER the one behind it
    but at most max_slot; -1 for rows without a trained token."""
    last = tl.full((starts.shape[0], BLOCK_T), -1, tl.int32)
    for step in range(0, row_length, BLOCK_T):
        slots, offsets, inside = _block(starts, lengths, step, BLOCK_T)
        trained = tl.load(loss_mask_ptr + offsets, mask=inside, other=0) != 0
        last = tl.maximum(last, tl.where(trained, slots, -1))
    last = tl.max(last, axis=1)
    if AFTER:
        return tl.where(last < 0, last, tl.minimum(last + 1, max_slot))
    return last


@triton.jit
def _coefficient(tensor_ptr, number, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """A coefficient given as a 0-d tensor, or as a number where there is none."""
    if tensor_ptr is not None:
        value = tl.load(tensor_ptr).to(dtype)
    else:
        value = tl.full((), number, dtype)
    return value


@triton.jit
def _adjusted(score, score_clip, score_scale):  # type: ignore[no-untyped-def]
    return _clamp(score, score_clip) * score_scale


@triton.jit
def _row_scores(  # type: ignore[no-untyped-def]
    scores_ptr,
    has_eos_ptr,
    loss_mask_ptr,
    rows,
    starts,
    lengths,
    row_length,
    max_slot,
    score_clip,
    score_scale,
    penalty,
    SCORE_SLOT: tl.constexpr,
    MISSING_EOS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    dtype: tl.constexpr,
):
    """(slot, score) [ROWS, 1] of the score of each row: clipped, then scaled, then by the rule
    where it has no EOS. Slot -1 and 0 where each token has a score of its own."""
    slot, score = tl.full(rows.shape, -1, tl.int32), tl.zeros(rows.shape, dtype)
    if SCORE_SLOT != "token":
        present = lengths > 0
        slot = _score_slot(
            loss_mask_ptr, starts, lengths, row_length, max_slot, SCORE_SLOT == "after", BLOCK_T
        )
        score = tl.load(scores_ptr + rows, mask=present, other=0.0).to(dtype)
        score = _adjusted(score, score_clip, score_scale)
        if MISSING_EOS != "":
            has_eos = tl.load(has_eos_ptr + rows, mask=present, other=0) != 0
            if MISSING_EOS == "subtract":
                score = tl.where(has_eos, score, score - penalty)
            else:
                score = tl.where(has_eos, score, -penalty)
    return slot[:, None], score[:, None]


@triton.jit
def _shaped(  # type: ignore[no-untyped-def]
    scores_ptr,
    logprobs_ptr,
    ref_logprobs_ptr,
    offsets,
    trained,
    is_score_slot,
    score,
    kl_coef,
    kl_clip,
    score_clip,
    score_scale,
    ESTIMATOR: tl.constexpr,
    SCORE_SLOT: tl.constexpr,
    dtype: tl.constexpr,
):
    """(reward, kl) of a block. A score of each token needs no slot and no rule for EOS."""
    new = tl.load(logprobs_ptr + offsets, mask=trained, other=0.0).to(dtype)
    ref = tl.load(ref_logprobs_ptr + offsets, mask=trained, other=0.0).to(dtype)
    kl = _kl(new - ref, kl_clip, ESTIMATOR)
    if SCORE_SLOT == "token":
        score = tl.load(scores_ptr + offsets, mask=trained, other=0.0).to(dtype)
        placed = _adjusted(score, score_clip, score_scale)
    else:
        placed = tl.where(is_score_slot, score, 0.0)
    return placed - kl_coef * kl, kl


@triton.jit(do_not_specialize=["num_rows", "max_slot"])
def _shape_kernel(  # type: ignore[no-untyped-def]
    scores_ptr,
    logprobs_ptr,
    ref_logprobs_ptr,
    loss_mask_ptr,
    has_eos_ptr,  # or None
    kl_coefs_ptr,  # or None for the number
    kl_coef_number: tl.float64,
    rewards_ptr,
    kl_ptr,
    num_rows,
    row_length,
    max_slot,
    kl_clip,
    score_clip,
    score_scale,
    penalty,
    ESTIMATOR: tl.constexpr,
    SCORE_SLOT: tl.constexpr,
    MISSING_EOS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    dtype: tl.constexpr = rewards_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    starts, lengths = _padded_rows(rows, num_rows, row_length)
    kl_coef = _coefficient(kl_coefs_ptr, kl_coef_number, dtype)
    score_slot, score = _row_scores(
        scores_ptr, has_eos_ptr, loss_mask_ptr, rows, starts, lengths, row_length, max_slot,
        score_clip, score_scale, penalty, SCORE_SLOT, MISSING_EOS, BLOCK_T, dtype,
    )  # fmt: skip
    for step in range(0, row_length, BLOCK_T):
        slots, offsets, inside = _block(starts, lengths, step, BLOCK_T)
        trained = tl.load(loss_mask_ptr + offsets, mask=inside, other=0) != 0
        reward, kl = _shaped(
            scores_ptr, logprobs_ptr, ref_logprobs_ptr, offsets, trained, slots == score_slot,
            score, kl_coef, kl_clip, score_clip, score_scale, ESTIMATOR, SCORE_SLOT, dtype,
        )  # fmt: skip
        tl.store(rewards_ptr + offsets, reward, mask=inside)
        tl.store(kl_ptr + offsets, kl, mask=inside)


# BLOCK_T is the first that holds a whole row, else the largest: a handful of kernels for all
# lengths. It does not depend on the number of rows, so a row has the same bits in any batch.
def _configurations(*sizes: tuple[int, int, int]) -> tuple[Configuration, ...]:
    return tuple(
        Configuration(warps, 1, {"ROWS": rows, "BLOCK_T": block}) for block, rows, warps in sizes
    )


BLOCKS = _configurations((16, 16, 4), (128, 2, 4), (1024, 1, 8), (2048, 1, 16))
# Where three fields are scanned at once, the longest block would not fit the registers.
FIELD_BLOCKS = _configurations((16, 16, 4), (128, 2, 4), (1024, 1, 16))
if INTERPRETING:  # which walks a scan lane by lane: small blocks, and rows that have several
    BLOCKS = FIELD_BLOCKS = _configurations((4, 16, 4), (32, 2, 4), (128, 1, 4))


def blocks(
    num_rows: int, row_length: int, choices: Sequence[Configuration] = BLOCKS
) -> tuple[int, Configuration]:
    """(number of blocks side by side, configuration) for rows of this length."""
    fitting = (c for c in choices if c.constants["BLOCK_T"] >= row_length)
    configuration = next(fitting, choices[-1])
    return -(-num_rows // configuration.constants["ROWS"]), configuration


def max_slot(max_length: int, num_slots: int) -> int:
    """The last slot that a score may take, where max_length is 0 for none."""
    return (min(max_length, num_slots) if max_length else num_slots) - 1


def shape_rewards_triton(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    has_eos: torch.Tensor | None,
    kl_coefs: torch.Tensor | None,
    kl_coef: float,
    estimator: str,
    kl_clip: float,
    score_slot: str,
    score_clip: float,
    score_scale: float,
    missing_eos: str,
    missing_eos_penalty: float,
    max_length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """shape_rewards_fwd of the reference."""
    num_rows, row_length = logprobs.shape
    dtype = compute_dtype(scores, logprobs)
    rewards, kl = (new_like(logprobs, dtype) for _ in range(2))
    if rewards.numel() == 0:
        return rewards, kl
    num_programs, configuration = blocks(num_rows, row_length)
    _shape_kernel[(num_programs,)](
        scores.contiguous(),
        logprobs.contiguous(),
        ref_logprobs.contiguous(),
        loss_mask.contiguous(),
        None if has_eos is None else has_eos.contiguous(),
        kl_coefs,
        kl_coef,
        rewards,
        kl,
        num_rows,
        row_length,
        max_slot(max_length, row_length),
        kl_clip or math.inf,
        score_clip,
        score_scale,
        missing_eos_penalty,
        estimator,
        score_slot if scores.dim() == 1 else "token",
        missing_eos if has_eos is not None else "",
        **configuration.arguments(),
    )
    return rewards, kl

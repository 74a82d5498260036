"""Per-token KL estimates, and rewards made of them and the score.

Formulas: reference/rewards.py.
"""

import math
from typing import Any

import torch

from fuserl_kernels import checks, native_advantages
from fuserl_kernels.reference.rewards import (
    ESTIMATORS,
    MISSING_EOS,
    SCORE_SLOTS,
    kl_penalty_bwd,
    kl_penalty_fwd,
    shape_rewards_fwd,
)
from fuserl_kernels.reference.sequences import compute_dtype
from fuserl_kernels.registration import not_twice, register
from fuserl_kernels.scalars import tensor_or_number
from fuserl_kernels.triton_rewards import (
    kl_penalty_bwd_triton,
    kl_penalty_triton,
    shape_rewards_triton,
)

KL_FORWARD = {
    "reference": kl_penalty_fwd,
    "triton": kl_penalty_triton,
    "native": native_advantages.kl_penalty_fwd,
}
KL_BACKWARD = {
    "reference": kl_penalty_bwd,
    "triton": kl_penalty_bwd_triton,
    "native": native_advantages.kl_penalty_bwd,
}
SHAPE_FORWARD = {
    "reference": shape_rewards_fwd,
    "triton": shape_rewards_triton,
    "native": native_advantages.shape_rewards_fwd,
}

# --- kl_penalty


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    logprobs, ref_logprobs, *ctx.options = inputs
    ctx.save_for_backward(logprobs, ref_logprobs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    logprobs, ref_logprobs = ctx.saved_tensors
    return (*_kl_op_bwd(logprobs, ref_logprobs, *ctx.options, grad), None, None)


_kl_op = register(
    "kl_penalty(Tensor logprobs, Tensor ref_logprobs, str estimator, float kl_clip) -> Tensor",
    KL_FORWARD,
    lambda logprobs, ref_logprobs, *_: logprobs.new_empty(
        logprobs.shape, dtype=compute_dtype(logprobs, ref_logprobs)
    ),
    setup_context=_setup_context,
    backward=_backward,
)
_kl_op_bwd = register(
    "kl_penalty_bwd(Tensor logprobs, Tensor ref_logprobs, str estimator, float kl_clip, "
    "Tensor grad) -> (Tensor, Tensor)",
    KL_BACKWARD,
    lambda logprobs, ref_logprobs, *_: (
        logprobs.new_empty(logprobs.shape),
        ref_logprobs.new_empty(ref_logprobs.shape),
    ),
    backward=not_twice,
)


def kl_penalty(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    estimator: str = "k1",
    *,
    kl_clip: float | None = None,
) -> torch.Tensor:
    """Estimate of KL(policy || reference) from the log-probability of each sampled token.

    With d = logprobs - ref_logprobs: "k1" d; "k2" d^2 / 2; "k3" exp(-d) - 1 + d; "abs" |d|.
    kl_clip holds the estimate within +-kl_clip, with no gradient beyond; None clamps nothing.
    Any one shape; float32 out (float64 if either input is; the native kernels
    refuse a float64 beside a narrower one); gradients reach both inputs.
    """
    checks.floating("logprobs", logprobs)
    checks.like("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    checks.choice("estimator", estimator, ESTIMATORS)
    return _kl_op(logprobs, ref_logprobs, estimator, _checked_kl_clip(kl_clip))


def _checked_kl_clip(kl_clip: float | None) -> float:
    """None, for no bound, becomes 0."""
    if kl_clip is None:
        return 0.0
    checks.above("kl_clip", kl_clip, 0.0)
    return float(kl_clip)


# --- shape_rewards


SHAPING_SCHEMA = (
    "Tensor? has_eos, Tensor? kl_coefs, float kl_coef, str estimator, float kl_clip, "
    "str score_slot, float score_clip, float score_scale, str missing_eos, "
    "float missing_eos_penalty, int max_length"
)


def _fake(scores: torch.Tensor, logprobs: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    dtype = compute_dtype(scores, logprobs)
    return tuple(logprobs.new_empty(logprobs.shape, dtype=dtype) for _ in range(2))


def check_room(loss_mask: torch.Tensor, score_slot: str, max_length: int) -> None:
    """A row shorter than max_length needs its extra slot inside T, or padding would move it."""
    num_slots = loss_mask.shape[1]
    if score_slot == "after" and num_slots < max_length and bool(loss_mask[:, -1:].any()):
        raise ValueError(
            f"loss_mask has T = {num_slots} and trains its last slot, so score_slot 'after' has no "
            f"room behind it although max_length is {max_length}: pad T by one"
        )
    if score_slot == "after" and max_length and bool(loss_mask[:, max_length:].any()):
        raise ValueError(f"loss_mask trains a slot past max_length, which is {max_length}")


def _check_data(*inputs: Any) -> None:
    if inputs[0].dim() == 1:
        check_room(inputs[3], inputs[9], inputs[14])


_shape_op = register(
    "shape_rewards(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor loss_mask, "
    f"{SHAPING_SCHEMA}) -> (Tensor, Tensor)",
    SHAPE_FORWARD,
    _fake,
    check=_check_data,
)


def shaping_arguments(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    kl_coef: float | torch.Tensor,
    estimator: str,
    kl_clip: float | None,
    score_slot: str,
    score_clip: float | None,
    score_scale: float,
    missing_eos: str | None,
    missing_eos_penalty: float,
    has_eos: torch.Tensor | None,
    max_length: int | None,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple]:
    """Checked (tensors, options) in the order of the ops' schemas."""
    checks.floating("logprobs", logprobs)
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs must have shape [B, T], not {list(logprobs.shape)}")
    checks.mask("loss_mask", loss_mask, "logprobs", logprobs)
    checks.like("ref_logprobs", ref_logprobs, "logprobs", logprobs)
    checks.floating("scores", scores)
    checks.device("scores", scores, "logprobs", logprobs)
    if scores.dim() == 2:
        checks.shape("scores", scores, logprobs.shape, "that of logprobs")
    else:
        checks.shape("scores", scores, logprobs.shape[:1], "one for each sequence")
    checks.choice("estimator", estimator, ESTIMATORS)
    checks.choice("score_slot", score_slot, SCORE_SLOTS)
    checks.finite("score_scale", score_scale)
    checks.finite("missing_eos_penalty", missing_eos_penalty)
    if score_clip is not None:
        checks.above("score_clip", score_clip, 0.0)
    if max_length is not None:
        checks.whole("max_length", max_length, 1)
    if missing_eos is not None:
        checks.choice("missing_eos", missing_eos, MISSING_EOS)
        if has_eos is None:
            raise ValueError(f"has_eos is needed with missing_eos {missing_eos!r}")
        if scores.dim() == 2:
            raise ValueError("missing_eos goes with one score a sequence, but scores are [B, T]")
        checks.boolean("has_eos", has_eos)
        checks.shape("has_eos", has_eos, scores.shape, "that of scores")
        checks.device("has_eos", has_eos, "scores", scores)
    tensors = (
        checks.detached(scores),
        checks.detached(logprobs),
        checks.detached(ref_logprobs),
        loss_mask,
    )
    options = (
        has_eos,
        *tensor_or_number("kl_coef", kl_coef, logprobs),
        estimator,
        _checked_kl_clip(kl_clip),
        score_slot,
        math.inf if score_clip is None else float(score_clip),
        float(score_scale),
        missing_eos or "",
        float(missing_eos_penalty),
        max_length or 0,
    )
    return tensors, options


def shape_rewards(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    kl_coef: float | torch.Tensor,
    estimator: str = "k1",
    kl_clip: float | None = None,
    score_slot: str = "last",
    score_clip: float | None = None,
    score_scale: float = 1.0,
    missing_eos: str | None = None,
    missing_eos_penalty: float = 1.0,
    has_eos: torch.Tensor | None = None,
    max_length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """rewards = -kl_coef * kl_penalty on trained tokens, plus the score at its slot.

    scores: [B], or [B, T] for a score at each trained token (score_slot then does not apply).
    logprobs, ref_logprobs: [B, T]; loss_mask: [B, T] bool, may have holes. kl_coef: number or 0-d.
    estimator, kl_clip: as in kl_penalty.
    score_slot: "last", the last trained token; "after", the slot behind it.
    max_length: the completion budget. With "after", a row that used it up has its score on its last
        token. Without it T is the budget; pass it where T is trimmed to the batch, so that the slot
        does not depend on padding.
    score_clip, score_scale: the score is clipped to +-score_clip, then multiplied by score_scale.
    missing_eos: after that, where has_eos [B] is False, "replace" makes the score
        -missing_eos_penalty and "subtract" takes missing_eos_penalty off it.

    Returns rewards [B, T] and kl [B, T], float32 (float64 for float64), zero elsewhere and in rows
    without a trained token; no gradients. Raises ValueError for arguments that do not fit, and on
    the CPU where a row shorter than max_length has no slot behind its last token, or one is longer.
    """
    tensors, options = shaping_arguments(
        scores,
        logprobs,
        ref_logprobs,
        loss_mask,
        kl_coef,
        estimator,
        kl_clip,
        score_slot,
        score_clip,
        score_scale,
        missing_eos,
        missing_eos_penalty,
        has_eos,
        max_length,
    )
    rewards, kl = _shape_op(*tensors, *options)
    return rewards, kl

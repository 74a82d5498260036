"""Policy-gradient loss over trained tokens: clips and gates, token or sequence ratios, corrections.

Formulas: reference/policy.py. The forward pass makes the gradients and saves nothing else;
backward scales them by the incoming gradient of the loss.
"""

from typing import Any

import torch

from fuserl_kernels import checks
from fuserl_kernels.loss_gradients import fake_gradient, fake_loss, save_gradients, scaled_gradients
from fuserl_kernels.native_losses import policy_loss_native
from fuserl_kernels.policy_options import (
    CORRECTION_SCHEMA,
    OPTIONS_SCHEMA,
    SAPO_TEMPERATURES,
    VESPO_GAMMA,
    check_entropy,
    check_layout,
    check_reference,
    checked_advantages,
    correction_options,
    policy_metrics,
    policy_options,
)
from fuserl_kernels.reference.policy import (
    METRICS,
    CorrectionOptions,
    PolicyOptions,
    policy_loss_fwd,
)
from fuserl_kernels.registration import register
from fuserl_kernels.scalars import constant_like, denominator_tensor
from fuserl_kernels.triton_losses import policy_loss_triton

FORWARD = {"reference": policy_loss_fwd, "native": policy_loss_native, "triton": policy_loss_triton}

_NUM_INPUTS = 9 + len(PolicyOptions._fields) + len(CorrectionOptions._fields) + 1


def _fake(new_logprobs: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    entropy, needs_grad = rest[6], rest[-1]
    loss, metrics = fake_loss(new_logprobs, len(METRICS))
    return (
        loss,
        metrics,
        loss.new_empty(1),
        fake_gradient(new_logprobs, needs_grad, new_logprobs),
        fake_gradient(entropy, needs_grad, new_logprobs),
    )


def _check_data(new_logprobs: torch.Tensor, *rest: Any) -> None:
    checks.cu_seqlens_data(rest[4], new_logprobs.numel())


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    save_gradients(ctx, output, (inputs[-1], inputs[-1] and inputs[7] is not None))


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple:
    gradients: list[torch.Tensor | None] = [None] * _NUM_INPUTS
    gradients[0], gradients[7] = scaled_gradients(ctx, grad_loss, (0, 0))
    return tuple(gradients)


_op = register(
    "policy_loss(Tensor new_logprobs, Tensor logprobs, Tensor advantages, Tensor loss_mask, "
    "Tensor? denominator, Tensor? cu_seqlens, Tensor? ref_logprobs, Tensor? entropy, "
    f"Tensor? rollout_logprobs, {OPTIONS_SCHEMA}, {CORRECTION_SCHEMA}, bool needs_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    FORWARD,
    _fake,
    check=_check_data,
    setup_context=_setup_context,
    backward=_backward,
)


def policy_loss(
    new_logprobs: torch.Tensor,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    denominator: float | torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    rollout_logprobs: torch.Tensor | None = None,
    ratio_level: str = "token",
    clip: str = "ppo",
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    sapo_temperatures: tuple[float, float] = SAPO_TEMPERATURES,
    vespo_gamma: tuple[tuple[float, float], tuple[float, float]] = VESPO_GAMMA,
    log_ratio_clip: float | None = None,
    aggregation: str = "token_mean",
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_clip: float | None = None,
    entropy_coef: float = 0.0,
    correction: str = "none",
    correction_level: str = "token",
    correction_range: tuple[float, float] = (0.0, 3.0),
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Policy loss of one microbatch; gradients reach new_logprobs and entropy, nothing else.

    new_logprobs, logprobs: [B, T], or packed [N] (with cu_seqlens int32/int64 [B + 1] where a
        sequence-level option needs it): of the policy being updated, and of the sampling policy.
    advantages: of the same shape, or [B].
    loss_mask: bool; what the other tensors hold where it is False is never read.
    denominator: a number or 0-d tensor, the count of the whole optimizer step, so that the losses
        of its microbatches add up. Default: this call's count. It counts trained tokens for
        aggregation "token_mean", and sequences with a trained token for "sequence_mean" (the mean
        of per-sequence means) and "sequence_sum" (Dr. GRPO passes B * max_length there).
    ratio_level: "token"; "sequence_sum" and "sequence_mean" (GSPO; LUSPO with aggregation
        "sequence_sum") give every token of a sequence the exp of the sum or mean of its log-ratios;
        "sequence_mean_token" has the value of the mean and the gradient of the token's own.
    clip: "ppo" clips the ratio to [1 - clip_range, 1 + clip_range_high] (default: the same) and,
        with dual_clip c > 1, bounds the loss of a negative advantage A by c * |A|. "cispo" weighs
        the logprob by the clipped ratio, held constant. "sapo" puts the ratio through a smooth gate
        with sapo_temperatures for positive and negative advantages. "vespo" weighs the logprob by
        phi(w) = exp(l + k log w - l w) of the sequence's ratio w, held constant, with vespo_gamma
        (k, l) for positive and negative advantages. "none" leaves the ratio as it is.
    log_ratio_clip: holds the log-ratio within +-log_ratio_clip, without a gradient beyond.
    kl_coef, kl_estimator, kl_clip, ref_logprobs: adds kl_coef times the aggregated kl_penalty.
    correction: multiplies each advantage by a constant made of the ratio exp(logprobs -
        rollout_logprobs) of the token or (correction_level "sequence_sum", "sequence_mean") its
        sequence, for rollouts sampled by another policy or engine: "truncate" holds the ratio
        within correction_range, "mask" replaces one outside it by 0 (IcePop), "reject" is 1 inside
        and 0 outside. The denominator stays.
    entropy_coef, entropy: takes off entropy_coef times the aggregated entropy.

    Returns the 0-d loss, float32 (float64 for float64), and 0-d metrics: "policy/loss" (the clipped
    term), "policy/approxkl" (mean of half the squared log-ratio), "policy/clipfrac", "val/ratio",
    "val/ratio_var", "kl" with ref_logprobs, "entropy" with entropy, "correction/weight" and
    "correction/clipfrac" with a correction: each a mean over this call's trained tokens;
    "num_tokens" is their number, the weight to merge microbatches by.
    Without a trained token everything is zero. Raises ValueError for arguments that do not fit.
    """
    checks.floating("new_logprobs", new_logprobs)
    checks.mask("loss_mask", loss_mask, "new_logprobs", new_logprobs)
    checks.like("logprobs", logprobs, "new_logprobs", new_logprobs)
    options = policy_options(
        ratio_level,
        clip,
        clip_range,
        clip_range_high,
        dual_clip,
        sapo_temperatures,
        vespo_gamma,
        log_ratio_clip,
        aggregation,
        kl_coef,
        kl_estimator,
        kl_clip,
        entropy_coef,
    )
    corrections = correction_options(
        correction, correction_level, correction_range, clip, rollout_logprobs
    )
    check_layout(loss_mask, cu_seqlens, options, correction_level)
    check_reference(options, ref_logprobs)
    check_entropy(options, entropy, new_logprobs)
    loss, metrics, *_ = _op(
        new_logprobs,
        checks.detached(logprobs),
        checked_advantages(advantages, loss_mask, cu_seqlens),
        loss_mask,
        denominator_tensor("denominator", denominator, new_logprobs),
        cu_seqlens,
        constant_like("ref_logprobs", ref_logprobs, "new_logprobs", new_logprobs),
        entropy,
        constant_like("rollout_logprobs", rollout_logprobs, "new_logprobs", new_logprobs),
        *options,
        *corrections,
        checks.wants_grad(new_logprobs, entropy),
    )
    named = policy_metrics(
        metrics, ref_logprobs is not None, entropy is not None, correction != "none"
    )
    return loss, named

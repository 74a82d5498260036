"""Policy-gradient loss over trained tokens: PPO, CISPO or unclipped, token or sequence ratios.

Formulas: reference/policy.py. The forward pass makes the gradients and saves nothing else;
backward scales them by the incoming gradient of the loss.
"""

from typing import Any

import torch

from fuserl_kernels import checks
from fuserl_kernels.reference.policy import (
    AGGREGATIONS,
    CLIPS,
    CORRECTION_LEVELS,
    CORRECTIONS,
    MAX_LOG_RATIO,
    METRICS,
    RATIO_LEVELS,
    CorrectionOptions,
    PolicyOptions,
    policy_loss_fwd,
)
from fuserl_kernels.reference.rewards import ESTIMATORS
from fuserl_kernels.reference.sequences import compute_dtype
from fuserl_kernels.registration import register

FORWARD = {"reference": policy_loss_fwd}

OPTIONS_SCHEMA = (
    "str ratio_level, str clip, float clip_low, float clip_high, float dual_clip, float gate_pos, "
    "float gate_neg, float gate_rate_pos, float gate_rate_neg, float log_ratio_clip, "
    "str aggregation, float kl_coef, str kl_estimator, float kl_clip, float entropy_coef"
)
CORRECTION_SCHEMA = (
    "str correction, str correction_level, float correction_low, float correction_high"
)
SAPO_TEMPERATURES = (1.0, 1.05)
VESPO_GAMMA = ((2.0, 3.0), (3.0, 2.0))
_NUM_INPUTS = 9 + len(PolicyOptions._fields) + len(CorrectionOptions._fields) + 1


def fake_loss(like: torch.Tensor, num_metrics: int) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(like)
    return like.new_empty((), dtype=dtype), like.new_empty(num_metrics, dtype=dtype)


def fake_gradient(tensor: torch.Tensor | None, wanted: bool, like: torch.Tensor) -> torch.Tensor:
    if tensor is None or not wanted:
        return like.new_empty(0)
    return tensor.new_empty(tensor.shape)


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


def save_gradients(ctx: Any, output: tuple, made: tuple[bool, ...]) -> None:
    """Keep what follows (loss, metrics) in an op's output: scales, and gradients still to be
    multiplied by them; `made` says which of those there are. All get no gradient."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])
    ctx.made = made


def scaled_gradients(
    ctx: Any, grad_loss: torch.Tensor | None, scale_of: tuple[int, ...]
) -> tuple[torch.Tensor | None, ...]:
    """The saved gradients times their scale and the gradient of the loss; None for those never
    made. scale_of: for each gradient, the number of its scale."""
    if grad_loss is None:
        return (None,) * len(scale_of)
    scales, *gradients = ctx.saved_tensors
    factors = (scales * grad_loss).unbind()
    return tuple(
        # A 0-d factor is a number to type promotion: the product keeps the gradient's dtype.
        gradient * factors[scale] if made else None
        for gradient, made, scale in zip(gradients, ctx.made, scale_of, strict=True)
    )


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


def policy_options(
    ratio_level: str,
    clip: str,
    clip_range: float,
    clip_range_high: float | None,
    dual_clip: float | None,
    sapo_temperatures: tuple[float, float],
    vespo_gamma: tuple[tuple[float, float], tuple[float, float]],
    log_ratio_clip: float | None,
    aggregation: str,
    kl_coef: float,
    kl_estimator: str,
    kl_clip: float | None,
    entropy_coef: float,
) -> PolicyOptions:
    """Checked options; None becomes the value it stands for."""
    checks.choice("ratio_level", ratio_level, RATIO_LEVELS)
    checks.choice("clip", clip, CLIPS)
    checks.choice("aggregation", aggregation, AGGREGATIONS)
    checks.choice("kl_estimator", kl_estimator, ESTIMATORS)
    checks.at_least("clip_range", clip_range, 0.0)
    if clip_range_high is not None:
        checks.at_least("clip_range_high", clip_range_high, 0.0)
    if dual_clip is not None:
        checks.above("dual_clip", dual_clip, 1.0)
        if clip != "ppo":
            raise ValueError(f"dual_clip goes with clip 'ppo', not {clip!r}")
    if clip == "vespo" and ratio_level != "sequence_sum":
        raise ValueError(
            f"clip 'vespo' weighs whole sequences: ratio_level must be 'sequence_sum', "
            f"not {ratio_level!r}"
        )
    gate_pos, gate_neg, rate_pos, rate_neg = _gates(clip, sapo_temperatures, vespo_gamma)
    for name, value in (("log_ratio_clip", log_ratio_clip), ("kl_clip", kl_clip)):
        if value is not None:
            checks.above(name, value, 0.0)
    if log_ratio_clip is not None and log_ratio_clip > MAX_LOG_RATIO:
        raise ValueError(f"log_ratio_clip must be at most {MAX_LOG_RATIO}, not {log_ratio_clip}")
    checks.finite("kl_coef", kl_coef)
    checks.finite("entropy_coef", entropy_coef)
    return PolicyOptions(
        ratio_level,
        clip,
        float(clip_range),
        float(clip_range if clip_range_high is None else clip_range_high),
        float(dual_clip or 0.0),
        gate_pos,
        gate_neg,
        rate_pos,
        rate_neg,
        float(log_ratio_clip or 0.0),
        aggregation,
        float(kl_coef),
        kl_estimator,
        float(kl_clip or 0.0),
        float(entropy_coef),
    )


def _gates(
    clip: str,
    sapo_temperatures: tuple[float, float],
    vespo_gamma: tuple[tuple[float, float], tuple[float, float]],
) -> tuple[float, float, float, float]:
    """The four numbers of a soft gate; zeros for the other clips."""
    if clip == "sapo":
        for temperature in sapo_temperatures:
            checks.above("sapo_temperatures", temperature, 0.0)
        positive, negative = map(float, sapo_temperatures)
        return positive, negative, 0.0, 0.0
    if clip == "vespo":
        (k_pos, rate_pos), (k_neg, rate_neg) = vespo_gamma
        for number in (k_pos, rate_pos, k_neg, rate_neg):
            checks.at_least("vespo_gamma", number, 0.0)
        return float(k_pos), float(k_neg), float(rate_pos), float(rate_neg)
    return 0.0, 0.0, 0.0, 0.0


def correction_options(
    correction: str,
    correction_level: str,
    correction_range: tuple[float, float],
    clip: str,
    rollout_logprobs: torch.Tensor | None,
) -> CorrectionOptions:
    """Checked options of the off-policy correction."""
    checks.choice("correction", correction, CORRECTIONS)
    checks.choice("correction_level", correction_level, CORRECTION_LEVELS)
    low, high = correction_range
    checks.at_least("correction_range", low, 0.0)
    checks.at_least("correction_range", high, low)
    if correction != "none":
        if rollout_logprobs is None:
            raise ValueError(f"rollout_logprobs is needed with correction {correction!r}")
        if clip == "vespo":
            raise ValueError(
                "clip 'vespo' corrects by itself: pass the rollout's log-probabilities as logprobs"
            )
    elif rollout_logprobs is not None:
        raise ValueError("rollout_logprobs goes with a correction, which is 'none'")
    return CorrectionOptions(correction, correction_level, float(low), float(high))


def scalar_tensor(
    name: str, value: float | torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor | None:
    """A number or 0-d tensor as a 0-d tensor on the device of `like`, without a device wait."""
    if value is None:
        return None
    checks.number_or_scalar(name, value)
    if isinstance(value, torch.Tensor):
        return checks.detached(value).to(like.device)
    return torch.full((), float(value), dtype=compute_dtype(like), device=like.device)


def denominator_tensor(
    name: str, value: float | torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor | None:
    if value is not None and not isinstance(value, torch.Tensor):
        checks.above(name, value, 0.0)
    return scalar_tensor(name, value, like)


def check_layout(
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    options: PolicyOptions,
    correction_level: str = "token",
) -> None:
    """[B, T], packed [N] with cu_seqlens, or [N] alone where no sequence ends are needed."""
    if cu_seqlens is not None:
        checks.cu_seqlens_shape(cu_seqlens, "loss_mask", loss_mask)
    elif loss_mask.dim() == 1:
        if options.ratio_level != "token":
            raise ValueError(
                f"cu_seqlens is needed for ratio_level {options.ratio_level!r} of packed tensors"
            )
        if correction_level != "token":
            raise ValueError(
                f"cu_seqlens is needed for correction_level {correction_level!r} of packed tensors"
            )
        if options.aggregation != "token_mean":
            raise ValueError(
                f"cu_seqlens is needed for aggregation {options.aggregation!r} of packed tensors"
            )
    elif loss_mask.dim() != 2:
        raise ValueError(f"loss_mask must be [B, T] or packed [N], not {list(loss_mask.shape)}")


def checked_advantages(
    advantages: torch.Tensor, loss_mask: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """Advantages of each token, or of each sequence [B]."""
    checks.floating("advantages", advantages)
    checks.device("advantages", advantages, "loss_mask", loss_mask)
    num_sequences = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else None
    if cu_seqlens is None and loss_mask.dim() == 2:
        num_sequences = loss_mask.shape[0]
    if advantages.shape not in (loss_mask.shape, (num_sequences,)):
        raise ValueError(
            f"advantages must have shape {list(loss_mask.shape)} like loss_mask, or one for each "
            f"sequence, not {list(advantages.shape)}"
        )
    return checks.detached(advantages)


def constant_like(
    name: str, tensor: torch.Tensor | None, other_name: str, other: torch.Tensor
) -> torch.Tensor | None:
    """An optional argument shaped like another that gets no gradient."""
    if tensor is None:
        return None
    checks.like(name, tensor, other_name, other)
    return checks.detached(tensor)


def check_reference(options: PolicyOptions, ref_logprobs: torch.Tensor | None) -> None:
    if options.kl_coef and ref_logprobs is None:
        raise ValueError(f"ref_logprobs is needed with kl_coef {options.kl_coef}")


def policy_metrics(
    metrics: torch.Tensor, with_kl: bool, with_entropy: bool, with_correction: bool = False
) -> dict[str, torch.Tensor]:
    absent = {
        "kl": not with_kl,
        "entropy": not with_entropy,
        "correction/weight": not with_correction,
        "correction/clipfrac": not with_correction,
    }
    named = zip(METRICS, metrics.unbind(), strict=True)
    return {name: value for name, value in named if not absent.get(name, False)}


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


def check_entropy(
    options: PolicyOptions, entropy: torch.Tensor | None, new_logprobs: torch.Tensor
) -> None:
    if entropy is not None:
        checks.like("entropy", entropy, "new_logprobs", new_logprobs)
    elif options.entropy_coef:
        raise ValueError(f"entropy is needed with entropy_coef {options.entropy_coef}")

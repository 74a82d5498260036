"""Policy-gradient losses over trained tokens, with their gradients.

Per trained token, with r the probability ratio and A the advantage:
    ppo    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), bounded by -dual_clip * A for A < 0
    cispo  -stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) A new_logprob
    none   -r A
r = exp(new_logprob - logprob) for ratio level "token"; for "sequence_sum" and "sequence_mean" every
token of a sequence has the exp of the sum or mean of its log-ratios, and the gradient flows through
it. The argument of exp is held below MAX_LOG_RATIO so that ratio, square and slope stay finite.

The loss is sum_t w_t (term_t + kl_coef * kl_t - entropy_coef * entropy_t), with weights w_t
    token_mean     1 / denominator; default: the number of trained tokens
    sequence_mean  1 / (tokens of the sequence) / denominator
    sequence_sum   1 / denominator; default of both: the number of sequences with a trained token
"""

from typing import NamedTuple

import torch

from fuserl_kernels.reference.rewards import kl_penalty_fwd, kl_slope
from fuserl_kernels.reference.sequences import compute_dtype, sequence_sum, spread
from fuserl_kernels.reference.value import value_loss_fwd

RATIO_LEVELS = ("token", "sequence_sum", "sequence_mean")
CLIPS = ("ppo", "cispo", "none")
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum")
MAX_LOG_RATIO = 40.0  # exp(40) = 2.4e17: its square still fits float32

METRICS = (
    "policy/loss",
    "policy/approxkl",
    "policy/clipfrac",
    "val/ratio",
    "val/ratio_var",
    "kl",
    "entropy",
    "num_tokens",
)


class PolicyOptions(NamedTuple):
    """The choices of a policy loss, in the order in which ops take them."""

    ratio_level: str
    clip: str
    clip_low: float
    clip_high: float
    dual_clip: float  # 0 for none
    aggregation: str
    kl_coef: float
    kl_estimator: str
    entropy_coef: float


def aggregation_weights(
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    aggregation: str,
    denominator: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """w_t of every token, zero where masked; shape of loss_mask."""
    mask = loss_mask.to(dtype)
    if aggregation == "token_mean":
        count = mask.sum() if denominator is None else denominator.to(dtype)
        return mask / torch.where(count == 0, 1, count)
    lengths = sequence_sum(mask, cu_seqlens)
    count = (lengths > 0).sum().to(dtype) if denominator is None else denominator.to(dtype)
    weights = mask / torch.where(count == 0, 1, count)
    if aggregation == "sequence_mean":
        weights = weights / spread(lengths.clamp(min=1), mask, cu_seqlens)
    return weights


def surrogate(
    new_logprobs: torch.Tensor,
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    options: PolicyOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns per token the term, its slope (to the log-ratio, or for cispo to the logprob),
    whether the clip changed it, and the ratio."""
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    unclipped = ratio * advantages
    if options.clip == "none":
        return -unclipped, -unclipped, torch.zeros_like(ratio, dtype=torch.bool), ratio
    bounded_ratio = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    if options.clip == "cispo":
        weight = bounded_ratio * advantages
        term = torch.where(weight == 0, 0, -weight * new_logprobs)
        return term, -weight, bounded_ratio != ratio, ratio
    objective = torch.minimum(unclipped, bounded_ratio * advantages)
    clipped = objective < unclipped
    if options.dual_clip:
        floor = torch.where(advantages < 0, options.dual_clip * advantages, -torch.inf)
        clipped = clipped | (objective < floor)
        objective = torch.maximum(objective, floor)
    return -objective, torch.where(clipped, 0, -unclipped), clipped, ratio


def _level_log_ratio(
    log_ratio: torch.Tensor,  # of each token, zero where masked
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    ratio_level: str,
) -> torch.Tensor:
    """What the exponential is taken of: the token's log-ratio, or its sequence's sum or mean."""
    if ratio_level == "token":
        return log_ratio
    return torch.where(loss_mask, _of_sequence(log_ratio, loss_mask, cu_seqlens, ratio_level), 0)


def _of_sequence(
    x: torch.Tensor, loss_mask: torch.Tensor, cu_seqlens: torch.Tensor | None, ratio_level: str
) -> torch.Tensor:
    """The sum or mean of x over each sequence's trained tokens, at every token of it."""
    total = sequence_sum(x, cu_seqlens)
    if ratio_level == "sequence_mean":
        total = total / sequence_sum(loss_mask.to(x.dtype), cu_seqlens).clamp(min=1)
    return spread(total, x, cu_seqlens)


def _logprob_gradient(
    slope: torch.Tensor,
    new: torch.Tensor,
    ref: torch.Tensor | None,
    weights: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    options: PolicyOptions,
) -> torch.Tensor:
    """d loss / d new_logprob of each token, from the surrogate's slope."""
    gradient = weights * slope
    if options.ratio_level != "token" and options.clip != "cispo":
        gradient = _of_sequence(gradient, loss_mask, cu_seqlens, options.ratio_level)
        gradient = torch.where(loss_mask, gradient, 0)
    if ref is not None and options.kl_coef:
        slope = kl_slope(new - ref, options.kl_estimator)
        gradient = gradient + options.kl_coef * weights * slope
    return gradient


def policy_gradient(
    new: torch.Tensor,  # packed [n], as all the others: rows that train
    old: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    ref: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,  # of these rows; None for a token-level ratio
    options: PolicyOptions,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of policy_loss_fwd's loss to new_logprobs and (with a bonus) to entropy, for some
    of its sequences whose aggregation weights are known."""
    loss_mask = torch.ones_like(new, dtype=torch.bool)
    old, advantages = old.to(new.dtype), advantages.to(new.dtype)
    ref = None if ref is None else ref.to(new.dtype)
    log_ratio = _level_log_ratio(new - old, loss_mask, cu_seqlens, options.ratio_level)
    _, slope, _, _ = surrogate(new, log_ratio, advantages, options)
    gradient = _logprob_gradient(slope, new, ref, weights, loss_mask, cu_seqlens, options)
    return gradient, -options.entropy_coef * weights if options.entropy_coef else None


def policy_loss_fwd(
    new_logprobs: torch.Tensor,  # [B, T] or packed [N]
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    denominator: torch.Tensor | None,  # 0-d
    cu_seqlens: torch.Tensor | None,  # [B + 1] for packed
    ref_logprobs: torch.Tensor | None,
    entropy: torch.Tensor | None,
    ratio_level: str,
    clip: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    aggregation: str,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns loss, metrics in the order of METRICS, and the gradients of new_logprobs and entropy
    ([0] where not wanted). Every metric is a mean over this call's trained tokens."""
    options = PolicyOptions(
        ratio_level,
        clip,
        clip_low,
        clip_high,
        dual_clip,
        aggregation,
        kl_coef,
        kl_estimator,
        entropy_coef,
    )
    dtype = compute_dtype(new_logprobs)

    def trained(tensor: torch.Tensor) -> torch.Tensor:
        return torch.where(loss_mask, tensor.to(dtype), 0)

    new, advantages = trained(new_logprobs), trained(advantages)
    token_log_ratio = new - trained(logprobs)
    log_ratio = _level_log_ratio(token_log_ratio, loss_mask, cu_seqlens, ratio_level)
    weights = aggregation_weights(loss_mask, cu_seqlens, aggregation, denominator, dtype)

    term, slope, clipped, ratio = surrogate(new, log_ratio, advantages, options)
    loss = (weights * term).sum()
    num_tokens = loss_mask.sum().to(dtype)
    count = num_tokens.clamp(min=1)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return torch.where(loss_mask, x, 0).sum() / count

    kl = torch.zeros_like(new)
    ref = None if ref_logprobs is None else trained(ref_logprobs)
    if ref is not None:
        kl = kl_penalty_fwd(new, ref, kl_estimator)
        if kl_coef:
            loss = loss + kl_coef * (weights * kl).sum()
    bonus = torch.zeros_like(new) if entropy is None else trained(entropy)
    if entropy_coef:
        loss = loss - entropy_coef * (weights * bonus).sum()
    mean_ratio = mean(ratio)
    metrics = torch.stack(
        [
            mean(term),
            mean(0.5 * token_log_ratio.square()),
            mean(clipped.to(dtype)),
            mean_ratio,
            mean((ratio - mean_ratio).square()),
            mean(kl),
            mean(bonus),
            num_tokens,
        ]
    )
    if not needs_grad:
        return loss, metrics, new_logprobs.new_empty(0), new_logprobs.new_empty(0)

    gradient = _logprob_gradient(slope, new, ref, weights, loss_mask, cu_seqlens, options)
    grad_entropy = new_logprobs.new_empty(0)
    if entropy is not None:
        grad_entropy = (-entropy_coef * weights).to(entropy.dtype)
    return loss, metrics, gradient.to(new_logprobs.dtype), grad_entropy


def ppo_loss_fwd(
    new_logprobs: torch.Tensor,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    new_values: torch.Tensor,
    values: torch.Tensor,
    returns: torch.Tensor,
    loss_mask: torch.Tensor,
    value_mask: torch.Tensor,
    vf_coef: float,
    value_clip_range: float,  # infinite for none
    value_denominator: torch.Tensor | None,
    denominator: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    entropy: torch.Tensor | None,
    ratio_level: str,
    clip: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    aggregation: str,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """policy loss + vf_coef * value loss. Returns loss, both ops' metrics in a row, and the
    gradients of new_logprobs, entropy and new_values."""
    loss, metrics, grad_logprobs, grad_entropy = policy_loss_fwd(
        new_logprobs,
        logprobs,
        advantages,
        loss_mask,
        denominator,
        cu_seqlens,
        ref_logprobs,
        entropy,
        ratio_level,
        clip,
        clip_low,
        clip_high,
        dual_clip,
        aggregation,
        kl_coef,
        kl_estimator,
        entropy_coef,
        needs_grad,
    )
    value_loss, value_metrics, grad_values = value_loss_fwd(
        new_values, values, returns, value_mask, value_clip_range, value_denominator, needs_grad
    )
    metrics = torch.cat([metrics, value_metrics.to(metrics.dtype)])
    loss = loss + vf_coef * value_loss
    return loss, metrics, grad_logprobs, grad_entropy, grad_values.mul_(vf_coef)

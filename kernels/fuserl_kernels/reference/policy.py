"""Policy-gradient losses over trained tokens, with their gradients.

Per trained token, with r the probability ratio, A the advantage and s the logistic function:
    ppo    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), bounded by -dual_clip * A for A < 0
    cispo  -stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) A new_logprob
    sapo   -4 / tau s(tau (r - 1)) A, tau = gate_pos for A > 0, else gate_neg
    vespo  -stop_gradient(exp(l + k log r - l r)) A new_logprob, (k, l) = (gate_pos, gate_rate_pos)
           for A >= 0, else (gate_neg, gate_rate_neg)
    none   -r A
r = exp(new_logprob - logprob) for ratio level "token". For "sequence_sum" and "sequence_mean" every
token of a sequence has the exp of the sum or mean of its log-ratios, and the gradient flows through
it; for "sequence_mean_token" it flows through the token's own log-ratio alone. The argument of exp
is held below MAX_LOG_RATIO so that ratio, square and slope stay finite; log_ratio_clip holds it
within +-log_ratio_clip, without a gradient beyond.

With a correction, A is multiplied by a constant c made of w = exp(logprob - rollout_logprob), the
ratio of the policy at the start of the update to the one that sampled, of the token or of its
sequence: "truncate" clip(w, low, high), "mask" w within [low, high] and 0 outside, "reject" 1
within and 0 outside.

The loss is sum_t w_t (term_t + kl_coef * kl_t - entropy_coef * entropy_t), with weights w_t
    token_mean     1 / denominator; default: the number of trained tokens
    sequence_mean  1 / (tokens of the sequence) / denominator
    sequence_sum   1 / denominator; default of both: the number of sequences with a trained token

Sources: PPO (Schulman et al., 2017), dual clip (Ye et al., 2020), GSPO (Zheng et al., 2025), CISPO
(MiniMax, 2025), SAPO (Gao et al., 2025), VESPO (2026, as in TRL), truncated corrections (Yao et
al., 2025), masked ones (IcePop; Ling team, 2025).
"""

from typing import Any, NamedTuple

import torch

from fuserl_kernels.reference.rewards import kl_estimate, kl_slope
from fuserl_kernels.reference.sequences import compute_dtype, sequence_sum, spread
from fuserl_kernels.reference.value import value_loss_fwd

RATIO_LEVELS = ("token", "sequence_sum", "sequence_mean", "sequence_mean_token")
CLIPS = ("ppo", "cispo", "sapo", "vespo", "none")
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum")
CORRECTIONS = ("none", "truncate", "mask", "reject")
CORRECTION_LEVELS = ("token", "sequence_sum", "sequence_mean")
MAX_LOG_RATIO = 40.0  # exp(40) = 2.4e17: its square still fits float32

METRICS = (
    "policy/loss",
    "policy/approxkl",
    "policy/clipfrac",
    "val/ratio",
    "val/ratio_var",
    "kl",
    "entropy",
    "correction/weight",
    "correction/clipfrac",
    "num_tokens",
)
LOG_RATIO = ("log_ratio/abs", "log_ratio/min", "log_ratio/max")


class PolicyOptions(NamedTuple):
    """The choices of a policy loss, in the order in which ops take them."""

    ratio_level: str
    clip: str
    clip_low: float
    clip_high: float
    dual_clip: float  # 0 for none
    gate_pos: float  # sapo: tau; vespo: k
    gate_neg: float
    gate_rate_pos: float  # vespo: lambda
    gate_rate_neg: float
    log_ratio_clip: float  # 0 for none
    aggregation: str
    kl_coef: float
    kl_estimator: str
    kl_clip: float  # 0 for none
    entropy_coef: float


class CorrectionOptions(NamedTuple):
    """How the rollout's log-probabilities correct the advantages, in the order of the ops."""

    correction: str
    correction_level: str
    correction_low: float
    correction_high: float


def split_choices(choices: tuple) -> tuple[PolicyOptions, CorrectionOptions, bool]:
    """What follows the tensors of a policy loss, in the order of the ops' schemas."""
    *values, needs_grad = choices
    count = len(PolicyOptions._fields)
    return PolicyOptions(*values[:count]), CorrectionOptions(*values[count:]), needs_grad


def _relative_weights(
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    aggregation: str,
    denominator: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """w_t times the denominator, of every token, and the denominator (1 for none)."""
    mask = loss_mask.to(dtype)
    if aggregation == "token_mean":
        weights, count = mask, mask.sum()
    else:
        lengths = sequence_sum(mask, cu_seqlens)
        weights, count = mask, (lengths > 0).sum().to(dtype)
        if aggregation == "sequence_mean":
            weights = mask / spread(lengths.clamp(min=1), mask, cu_seqlens)
    count = count if denominator is None else denominator.to(dtype)
    return weights, torch.where(count == 0, 1, count)


def aggregation_weights(
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    aggregation: str,
    denominator: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """w_t of every token, zero where masked; shape of loss_mask."""
    weights, count = _relative_weights(loss_mask, cu_seqlens, aggregation, denominator, dtype)
    return weights / count


def surrogate(
    new_logprobs: torch.Tensor,
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    options: PolicyOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns per token the term, its slope (to the log-ratio, or for cispo and vespo to the
    logprob), whether the clip changed it, and the ratio."""
    bounded_log_ratio = log_ratio.clamp(max=MAX_LOG_RATIO)
    held = torch.zeros_like(log_ratio, dtype=torch.bool)  # by log_ratio_clip: no slope
    if options.log_ratio_clip:
        bounded_log_ratio = log_ratio.clamp(-options.log_ratio_clip, options.log_ratio_clip)
        held = log_ratio.abs() > options.log_ratio_clip
    ratio = bounded_log_ratio.exp()
    unclipped = ratio * advantages
    untouched = torch.zeros_like(held)
    if options.clip == "none":
        return -unclipped, torch.where(held, 0, -unclipped), untouched, ratio
    if options.clip == "sapo":
        tau = torch.where(advantages > 0, options.gate_pos, options.gate_neg).to(ratio.dtype)
        excess = tau * (ratio - 1)
        term = -4 / tau * torch.sigmoid(excess) * advantages
        slope = -4 * torch.sigmoid(excess) * torch.sigmoid(-excess) * unclipped
        return term, torch.where(held, 0, slope), untouched, ratio
    if options.clip == "vespo":
        positive = advantages >= 0
        k = torch.where(positive, options.gate_pos, options.gate_neg)
        rate = torch.where(positive, options.gate_rate_pos, options.gate_rate_neg)
        # 0 * -inf: a ratio of 0 with k = 0 has its own limit
        power = torch.where(k == 0, 0, k * bounded_log_ratio)
        weight = (rate + power - rate * ratio).exp() * advantages
        return torch.where(weight == 0, 0, -weight * new_logprobs), -weight, untouched, ratio
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
    return -objective, torch.where(clipped | held, 0, -unclipped), clipped, ratio


def correction_weights(
    logprobs: torch.Tensor,  # [B, T] or packed [N]
    rollout_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    options: CorrectionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """c of every token (of no meaning where masked) and whether the bounds changed it."""
    dtype = compute_dtype(logprobs)
    log_ratio = torch.where(loss_mask, logprobs.to(dtype) - rollout_logprobs.to(dtype), 0)
    log_ratio = _level_log_ratio(log_ratio, loss_mask, cu_seqlens, options.correction_level)
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    outside = (ratio < options.correction_low) | (ratio > options.correction_high)
    if options.correction == "truncate":
        return ratio.clamp(options.correction_low, options.correction_high), outside
    if options.correction == "mask":
        return torch.where(outside, 0, ratio), outside
    return (~outside).to(dtype), outside


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
    if ratio_level != "sequence_sum":
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
    through_sequence = options.ratio_level in ("sequence_sum", "sequence_mean")
    if through_sequence and options.clip not in ("cispo", "vespo"):
        gradient = _of_sequence(gradient, loss_mask, cu_seqlens, options.ratio_level)
        gradient = torch.where(loss_mask, gradient, 0)
    if ref is not None and options.kl_coef:
        slope = kl_slope(new - ref, options.kl_estimator, options.kl_clip)
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


def log_ratio_range(
    new_logprobs: torch.Tensor, logprobs: torch.Tensor, loss_mask: torch.Tensor
) -> torch.Tensor:
    """Of new_logprobs - logprobs over the trained tokens, in the order of LOG_RATIO, [3]: the mean
    of the absolute values, the least and the greatest; zeros without a trained token."""
    dtype = compute_dtype(new_logprobs)
    log_ratio = torch.where(loss_mask, new_logprobs.to(dtype) - logprobs.to(dtype), 0)
    if log_ratio.numel() == 0:
        return log_ratio.new_zeros(3)
    num_tokens = loss_mask.sum()
    found = torch.stack(
        [
            log_ratio.abs().sum() / num_tokens.clamp(min=1),
            torch.where(loss_mask, log_ratio, torch.inf).amin(),
            torch.where(loss_mask, log_ratio, -torch.inf).amax(),
        ]
    )
    return torch.where(num_tokens > 0, found, 0)


def policy_loss_fwd(
    new_logprobs: torch.Tensor,  # [B, T] or packed [N]
    logprobs: torch.Tensor,
    advantages: torch.Tensor,  # of the same shape, or one for each sequence [B]
    loss_mask: torch.Tensor,
    denominator: torch.Tensor | None,  # 0-d
    cu_seqlens: torch.Tensor | None,  # [B + 1] for packed
    ref_logprobs: torch.Tensor | None,
    entropy: torch.Tensor | None,
    rollout_logprobs: torch.Tensor | None,
    *choices: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """choices: the fields of PolicyOptions, those of CorrectionOptions, and needs_grad.

    Returns loss, metrics in the order of METRICS, scale [1], and the gradients of new_logprobs
    and entropy ([0] where not wanted), which are still to be multiplied by scale = 1 / denominator:
    a kernel that walks the tokens once does not know the denominator when it writes them. One that
    does may return gradients multiplied already, and a scale of 1.
    Every metric is a mean over this call's trained tokens."""
    options, corrections, needs_grad = split_choices(choices)
    dtype = compute_dtype(new_logprobs)

    def trained(tensor: torch.Tensor) -> torch.Tensor:
        return torch.where(loss_mask, tensor.to(dtype), 0)

    if advantages.shape != loss_mask.shape:
        advantages = spread(advantages, loss_mask, cu_seqlens)
    new, old, advantages = trained(new_logprobs), trained(logprobs), trained(advantages)
    factors, corrected = torch.ones_like(new), torch.zeros_like(loss_mask)
    if rollout_logprobs is not None and corrections.correction != "none":
        factors, corrected = correction_weights(
            logprobs, rollout_logprobs, loss_mask, cu_seqlens, corrections
        )
        advantages = advantages * trained(factors)
    token_log_ratio = new - old
    log_ratio = _level_log_ratio(token_log_ratio, loss_mask, cu_seqlens, options.ratio_level)
    weights, count = _relative_weights(
        loss_mask, cu_seqlens, options.aggregation, denominator, dtype
    )

    term, slope, clipped, ratio = surrogate(new, log_ratio, advantages, options)
    total = (weights * term).sum()
    num_tokens = loss_mask.sum().to(dtype)

    def mean(x: torch.Tensor) -> torch.Tensor:
        return torch.where(loss_mask, x, 0).sum() / num_tokens.clamp(min=1)

    kl = torch.zeros_like(new)
    ref = None if ref_logprobs is None else trained(ref_logprobs)
    if ref is not None:
        kl = kl_estimate(new - ref, options.kl_estimator, options.kl_clip)
        if options.kl_coef:
            total = total + options.kl_coef * (weights * kl).sum()
    bonus = torch.zeros_like(new) if entropy is None else trained(entropy)
    if options.entropy_coef:
        total = total - options.entropy_coef * (weights * bonus).sum()
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
            mean(factors),
            mean(corrected.to(dtype)),
            num_tokens,
        ]
    )
    loss, scale = total / count, (1 / count).view(1)
    if not needs_grad:
        return loss, metrics, scale, new_logprobs.new_empty(0), new_logprobs.new_empty(0)

    gradient = _logprob_gradient(slope, new, ref, weights, loss_mask, cu_seqlens, options)
    grad_entropy = new_logprobs.new_empty(0)
    if entropy is not None:
        grad_entropy = (-options.entropy_coef * weights).to(entropy.dtype).contiguous()
    gradient = gradient.to(new_logprobs.dtype).contiguous()
    return loss, metrics, scale, gradient, grad_entropy


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
    *policy_arguments: Any,
) -> tuple[torch.Tensor, ...]:
    """policy loss + vf_coef * value loss. policy_arguments: denominator and what follows it in
    policy_loss_fwd. Returns loss, both ops' metrics in a row, scales [2] and the gradients of
    new_logprobs, entropy (to be multiplied by scales[0]) and new_values (by scales[1])."""
    loss, metrics, scale, grad_logprobs, grad_entropy = policy_loss_fwd(
        new_logprobs, logprobs, advantages, loss_mask, *policy_arguments
    )
    value_loss, value_metrics, value_scale, grad_values = value_loss_fwd(
        new_values,
        values,
        returns,
        value_mask,
        value_clip_range,
        value_denominator,
        policy_arguments[-1],
    )
    metrics = torch.cat([metrics, value_metrics.to(metrics.dtype)])
    scales = torch.cat([scale, (vf_coef * value_scale).to(scale.dtype)])
    loss = loss + (vf_coef * value_loss).to(loss.dtype)
    return loss, metrics, scales, grad_logprobs, grad_entropy, grad_values

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
    METRICS,
    RATIO_LEVELS,
    PolicyOptions,
    policy_loss_fwd,
)
from fuserl_kernels.reference.rewards import ESTIMATORS
from fuserl_kernels.reference.sequences import compute_dtype, sequence_ids
from fuserl_kernels.registration import register

FORWARD = {"reference": policy_loss_fwd}

OPTIONS_SCHEMA = (
    "str ratio_level, str clip, float clip_low, float clip_high, float dual_clip, str aggregation, "
    "float kl_coef, str kl_estimator, float entropy_coef"
)
_NUM_INPUTS = 8 + len(PolicyOptions._fields) + 1


def fake_loss(like: torch.Tensor, num_metrics: int) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(like)
    return like.new_empty((), dtype=dtype), like.new_empty(num_metrics, dtype=dtype)


def fake_gradient(tensor: torch.Tensor | None, wanted: bool, like: torch.Tensor) -> torch.Tensor:
    if tensor is None or not wanted:
        return like.new_empty(0)
    return tensor.new_empty(tensor.shape)


def _fake(new_logprobs: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    entropy, needs_grad = rest[6], rest[-1]
    return (
        *fake_loss(new_logprobs, len(METRICS)),
        fake_gradient(new_logprobs, needs_grad, new_logprobs),
        fake_gradient(entropy, needs_grad, new_logprobs),
    )


def _check_data(new_logprobs: torch.Tensor, *rest: Any) -> None:
    checks.cu_seqlens_data(rest[4], new_logprobs.numel())


def save_gradients(ctx: Any, output: tuple) -> None:
    """Keep the gradients that follow (loss, metrics) in an op's output; all get no gradient."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def scaled_gradients(ctx: Any, grad_loss: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The saved gradients times that of the loss; None for those never made."""
    if grad_loss is None:
        return (None,) * len(ctx.saved_tensors)
    return tuple(
        g * grad_loss if made else None for g, made in zip(ctx.saved_tensors, ctx.made, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    save_gradients(ctx, output)
    ctx.made = (inputs[-1], inputs[-1] and inputs[7] is not None)


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple:
    grad_logprobs, grad_entropy = scaled_gradients(ctx, grad_loss)
    gradients: list[torch.Tensor | None] = [None] * _NUM_INPUTS
    gradients[0], gradients[7] = grad_logprobs, grad_entropy
    return tuple(gradients)


_op = register(
    "policy_loss(Tensor new_logprobs, Tensor logprobs, Tensor advantages, Tensor loss_mask, "
    "Tensor? denominator, Tensor? cu_seqlens, Tensor? ref_logprobs, Tensor? entropy, "
    f"{OPTIONS_SCHEMA}, bool needs_grad) -> (Tensor, Tensor, Tensor, Tensor)",
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
    aggregation: str,
    kl_coef: float,
    kl_estimator: str,
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
    checks.finite("kl_coef", kl_coef)
    checks.finite("entropy_coef", entropy_coef)
    return PolicyOptions(
        ratio_level,
        clip,
        float(clip_range),
        float(clip_range if clip_range_high is None else clip_range_high),
        float(dual_clip or 0.0),
        aggregation,
        float(kl_coef),
        kl_estimator,
        float(entropy_coef),
    )


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
) -> None:
    """[B, T], packed [N] with cu_seqlens, or [N] alone where no sequence ends are needed."""
    if cu_seqlens is not None:
        checks.cu_seqlens_shape(cu_seqlens, "loss_mask", loss_mask)
    elif loss_mask.dim() == 1:
        if options.ratio_level != "token":
            raise ValueError(
                f"cu_seqlens is needed for ratio_level {options.ratio_level!r} of packed tensors"
            )
        if options.aggregation != "token_mean":
            raise ValueError(
                f"cu_seqlens is needed for aggregation {options.aggregation!r} of packed tensors"
            )
    elif loss_mask.dim() != 2:
        raise ValueError(f"loss_mask must be [B, T] or packed [N], not {list(loss_mask.shape)}")


def token_advantages(
    advantages: torch.Tensor, loss_mask: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """Advantages for each token: those given so, or one for each sequence [B] handed out."""
    checks.floating("advantages", advantages)
    checks.device("advantages", advantages, "loss_mask", loss_mask)
    advantages = checks.detached(advantages)
    if advantages.shape == loss_mask.shape:
        return advantages
    if cu_seqlens is not None and advantages.shape == (cu_seqlens.shape[0] - 1,):
        return advantages[sequence_ids(loss_mask.shape[0], cu_seqlens)]
    if loss_mask.dim() == 2 and advantages.shape == loss_mask.shape[:1]:
        return advantages.unsqueeze(-1).expand(loss_mask.shape)
    raise ValueError(
        f"advantages must have shape {list(loss_mask.shape)} like loss_mask, or one for each "
        f"sequence, not {list(advantages.shape)}"
    )


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
    metrics: torch.Tensor, with_kl: bool, with_entropy: bool
) -> dict[str, torch.Tensor]:
    named = dict(zip(METRICS, metrics.unbind(), strict=True))
    if not with_kl:
        del named["kl"]
    if not with_entropy:
        del named["entropy"]
    return named


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
    ratio_level: str = "token",
    clip: str = "ppo",
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    aggregation: str = "token_mean",
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
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
    ratio_level: "token"; "sequence_sum" and "sequence_mean" (GSPO) give every token of a sequence
        the exp of the sum or mean of its log-ratios.
    clip: "ppo" clips the ratio to [1 - clip_range, 1 + clip_range_high] (default: the same) and,
        with dual_clip c > 1, bounds the loss of a negative advantage A by c * |A|. "cispo" weighs
        the logprob by the clipped ratio, held constant. "none" leaves the ratio as it is.
    kl_coef, kl_estimator, ref_logprobs: adds kl_coef times the aggregated kl_penalty.
    entropy_coef, entropy: takes off entropy_coef times the aggregated entropy.

    Returns the 0-d loss, float32 (float64 for float64), and 0-d metrics: "policy/loss" (the clipped
    term), "policy/approxkl" (mean of half the squared log-ratio), "policy/clipfrac", "val/ratio",
    "val/ratio_var", "kl" with ref_logprobs, "entropy" with entropy: each a mean over this call's
    trained tokens; "num_tokens" is their number, the weight to merge microbatches by.
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
        aggregation,
        kl_coef,
        kl_estimator,
        entropy_coef,
    )
    check_layout(loss_mask, cu_seqlens, options)
    check_reference(options, ref_logprobs)
    check_entropy(options, entropy, new_logprobs)
    loss, metrics, _, _ = _op(
        new_logprobs,
        checks.detached(logprobs),
        token_advantages(advantages, loss_mask, cu_seqlens),
        loss_mask,
        denominator_tensor("denominator", denominator, new_logprobs),
        cu_seqlens,
        constant_like("ref_logprobs", ref_logprobs, "new_logprobs", new_logprobs),
        entropy,
        *options,
        checks.wants_grad(new_logprobs, entropy),
    )
    return loss, policy_metrics(metrics, ref_logprobs is not None, entropy is not None)


def check_entropy(
    options: PolicyOptions, entropy: torch.Tensor | None, new_logprobs: torch.Tensor
) -> None:
    if entropy is not None:
        checks.like("entropy", entropy, "new_logprobs", new_logprobs)
    elif options.entropy_coef:
        raise ValueError(f"entropy is needed with entropy_coef {options.entropy_coef}")

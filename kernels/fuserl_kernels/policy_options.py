"""The choices of a policy loss as its callers name them, checked, and as the ops take them."""

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
)
from fuserl_kernels.reference.rewards import ESTIMATORS

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


def check_reference(options: PolicyOptions, ref_logprobs: torch.Tensor | None) -> None:
    if options.kl_coef and ref_logprobs is None:
        raise ValueError(f"ref_logprobs is needed with kl_coef {options.kl_coef}")


def check_entropy(
    options: PolicyOptions, entropy: torch.Tensor | None, new_logprobs: torch.Tensor
) -> None:
    if entropy is not None:
        checks.like("entropy", entropy, "new_logprobs", new_logprobs)
    elif options.entropy_coef:
        raise ValueError(f"entropy is needed with entropy_coef {options.entropy_coef}")


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

"""Device functions of the policy loss, one token or a block of them at a time, in float32.

Formulas: reference/policy.py, reference/rewards.py. Bounds are selects, not minima and maxima, so
that a NaN stays one. The loss kernels and the rows of linear_policy_loss share these functions.
"""

from fuserl_kernels.reference.policy import MAX_LOG_RATIO
from fuserl_kernels.triton_runtime import tl, triton

_MAX_LOG_RATIO = tl.constexpr(MAX_LOG_RATIO)


@triton.jit
def _between(x, low, high):  # type: ignore[no-untyped-def]
    """x within [low, high]; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _bounded(log_ratio):  # type: ignore[no-untyped-def]
    """No more than what leaves the ratio finite with its square."""
    return tl.where(log_ratio > _MAX_LOG_RATIO, _MAX_LOG_RATIO, log_ratio)


@triton.jit
def _surrogate(  # type: ignore[no-untyped-def]
    new_logprob,
    log_ratio,
    advantage,
    ratio_low,  # 1 - clip_low
    ratio_high,  # 1 + clip_high
    dual_clip,  # 0 for none
    gate_pos,
    gate_neg,
    gate_rate_pos,
    gate_rate_neg,
    log_ratio_clip,  # 0 for none
    CLIP: tl.constexpr,
):
    """(term, slope, whether the clip changed it, ratio). The slope is the term's derivative to the
    log-ratio, or for cispo and vespo to the log-probability."""
    far = (log_ratio_clip > 0) & ((log_ratio < -log_ratio_clip) | (log_ratio > log_ratio_clip))
    held = tl.where(log_ratio < 0, -log_ratio_clip, log_ratio_clip)
    log_ratio = tl.where(far, held, _bounded(log_ratio))
    ratio = tl.exp(log_ratio)
    unclipped = ratio * advantage
    clipped = ratio < ratio  # nowhere
    if CLIP == "ppo":
        bounded = _between(ratio, ratio_low, ratio_high) * advantage
        clipped = bounded < unclipped
        objective = tl.where(clipped, bounded, unclipped)
        floor = dual_clip * advantage
        lifted = (dual_clip > 0) & (advantage < 0) & (objective < floor)
        term = -tl.where(lifted, floor, objective)
        clipped = clipped | lifted
        slope = tl.where(clipped | far, 0.0, -unclipped)
    elif CLIP == "cispo":
        bounded = _between(ratio, ratio_low, ratio_high)
        clipped = bounded != ratio
        slope = -bounded * advantage
        term = tl.where(slope == 0, 0.0, slope * new_logprob)  # 0 * -inf
    elif CLIP == "sapo":
        tau = tl.where(advantage > 0, gate_pos, gate_neg)
        gate = 1.0 / (1.0 + tl.exp(-tau * (ratio - 1.0)))
        rest = 1.0 / (1.0 + tl.exp(tau * (ratio - 1.0)))
        term = -4.0 / tau * gate * advantage
        slope = tl.where(far, 0.0, -4.0 * gate * rest * unclipped)
    elif CLIP == "vespo":
        k = tl.where(advantage < 0, gate_neg, gate_pos)
        rate = tl.where(advantage < 0, gate_rate_neg, gate_rate_pos)
        power = tl.where(k == 0, 0.0, k * log_ratio)  # 0 * -inf
        slope = -tl.exp(rate + power - rate * ratio) * advantage
        term = tl.where(slope == 0, 0.0, slope * new_logprob)
    else:
        term = -unclipped
        slope = tl.where(far, 0.0, -unclipped)
    return term, slope, clipped, ratio


@triton.jit
def _correction(log_ratio, low, high, CORRECTION: tl.constexpr):  # type: ignore[no-untyped-def]
    """(constant factor of the advantage, whether the bounds changed it), for the log of the ratio
    of the policy at the start of the update to the one that sampled."""
    ratio = tl.exp(_bounded(log_ratio))
    outside = (ratio < low) | (ratio > high)
    if CORRECTION == "truncate":
        factor = _between(ratio, low, high)
    elif CORRECTION == "mask":
        factor = tl.where(outside, 0.0, ratio)
    else:
        factor = tl.where(outside, 0.0, 1.0)
    return factor, outside

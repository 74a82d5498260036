"""From scores to advantages: KL penalty, reward shaping, returns, GAE and whitening.

A slot is a position of the completion axis. loss_mask says which slots are trained tokens;
value_mask which slots have a value (and may have a reward). What other slots hold is never read.
"""

import torch

from fuserl_kernels.reference.sequences import compute_dtype, pad

ESTIMATORS = ("k1", "k2", "k3", "abs")
SCORE_SLOTS = ("last", "after")
MISSING_EOS = ("replace", "subtract")
MASKED = ("identity", "carry")
WHITEN_EPSILON = 1e-8


def kl_estimate(d: torch.Tensor, estimator: str, kl_clip: float) -> torch.Tensor:
    """With d = logprob - ref_logprob: k1 d, k2 d^2 / 2, k3 exp(-d) - 1 + d, abs |d|; held within
    +-kl_clip unless that is 0."""
    if estimator == "k1":
        kl = d
    elif estimator == "k2":
        kl = 0.5 * d.square()
    else:
        kl = torch.expm1(-d) + d if estimator == "k3" else d.abs()
    return kl.clamp(-kl_clip, kl_clip) if kl_clip else kl


def kl_slope(d: torch.Tensor, estimator: str, kl_clip: float) -> torch.Tensor:
    """Derivative of the estimate to d; 0 where kl_clip holds it."""
    if estimator == "k1":
        slope = torch.ones_like(d)
    elif estimator == "k2":
        slope = d
    else:
        slope = -torch.expm1(-d) if estimator == "k3" else d.sign()
    if kl_clip:
        slope = torch.where(kl_estimate(d, estimator, 0.0).abs() > kl_clip, 0, slope)
    return slope


def kl_penalty_fwd(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str, kl_clip: float
) -> torch.Tensor:
    dtype = compute_dtype(logprobs, ref_logprobs)
    return kl_estimate(logprobs.to(dtype) - ref_logprobs.to(dtype), estimator, kl_clip)


def kl_penalty_bwd(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    estimator: str,
    kl_clip: float,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(logprobs, ref_logprobs)
    d = logprobs.to(dtype) - ref_logprobs.to(dtype)
    slope = grad * kl_slope(d, estimator, kl_clip)
    return slope.to(logprobs.dtype), (-slope).to(ref_logprobs.dtype)


def score_slots(loss_mask: torch.Tensor, score_slot: str, max_length: int) -> torch.Tensor:
    """One-hot mask [B, T] of the slot that receives the score; empty for rows without a token.

    "last" is the last trained token; "after" the slot behind it, or the last token itself where
    that would lie at or past max_length (0: T)."""
    num_slots = loss_mask.shape[1]
    slots = torch.arange(num_slots, device=loss_mask.device)
    last = torch.where(loss_mask, slots, -1).amax(-1, keepdim=True) if num_slots else slots
    slot = last
    if score_slot == "after":
        limit = min(max_length, num_slots) if max_length else num_slots
        slot = (last + 1).clamp(max=limit - 1)
    return (slots == slot) & (last >= 0)


def shape_rewards_fwd(
    scores: torch.Tensor,  # [B], or [B, T]: one for each trained token
    logprobs: torch.Tensor,  # [B, T]
    ref_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    has_eos: torch.Tensor | None,  # [B] bool
    kl_coefs: torch.Tensor | None,  # 0-d, or None for the number
    kl_coef: float,
    estimator: str,
    kl_clip: float,  # 0 for none
    score_slot: str,
    score_clip: float,  # infinite for none
    score_scale: float,
    missing_eos: str,  # "" for none
    missing_eos_penalty: float,
    max_length: int,  # 0 for none
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns rewards = -kl_coef * kl + score at its slot, and kl; both zero elsewhere.

    A score is clipped to +-score_clip, then multiplied by score_scale, then the missing-EOS rule
    applies where has_eos is False: "replace" makes it -penalty, "subtract" takes penalty off."""
    dtype = compute_dtype(scores, logprobs)
    new = torch.where(loss_mask, logprobs.to(dtype), 0)
    ref = torch.where(loss_mask, ref_logprobs.to(dtype), 0)
    kl = kl_estimate(new - ref, estimator, kl_clip)
    score = scores.to(dtype).clamp(-score_clip, score_clip) * score_scale
    if has_eos is not None and missing_eos == "replace":
        score = torch.where(has_eos, score, -missing_eos_penalty)
    elif has_eos is not None and missing_eos == "subtract":
        score = torch.where(has_eos, score, score - missing_eos_penalty)
    if scores.dim() == 2:
        placed = torch.where(loss_mask, score, 0)
    else:
        slots = score_slots(loss_mask, score_slot, max_length)
        placed = torch.where(slots, score.unsqueeze(-1), 0)
    return placed - (kl_coef if kl_coefs is None else kl_coefs.to(dtype)) * kl, kl


def _scan(deltas: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """out_t = delta_t + decay_t * out_{t+1} along the last axis of [B, T]."""
    if deltas.shape[-1] == 0:
        return deltas
    state = deltas.new_zeros(deltas.shape[0])
    states = []
    steps = zip(
        reversed(deltas.t().contiguous().unbind(0)),
        reversed(decay.t().contiguous().unbind(0)),
        strict=True,
    )
    for delta, factor in steps:
        state = torch.addcmul(delta, factor, state)
        states.append(state)
    return torch.stack(states[::-1], -1)


def _next_value(values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Value at the next slot of the mask, skipping holes; 0 after the last. [B, T]"""
    num_slots = slots.shape[1]
    positions = torch.arange(num_slots, device=slots.device)
    index = torch.where(slots, positions, num_slots)
    following = index.flip(-1).cummin(-1).values.flip(-1) if num_slots else index
    following = torch.nn.functional.pad(following[:, 1:], (0, min(1, num_slots)), value=num_slots)
    return torch.nn.functional.pad(values, (0, 1)).gather(-1, following)


def gae_fwd(
    rewards: torch.Tensor,  # [B, T] or packed [N]
    values: torch.Tensor,
    loss_mask: torch.Tensor,
    value_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    gamma: float,
    gae_lambda: float,
    masked: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """delta_t = r_t + gamma * v_{t+1} - v_t;  A_t = delta_t + gamma * lambda * A_{t+1}.

    Rewards and values outside value_mask count as 0. "identity": t+1 is the next slot of the mask,
    so a hole costs no discount. "carry": t+1 is the next position, so value 0 and one more decay
    at each position of a hole. Advantages are 0 outside loss_mask, returns A + v on value_mask."""
    if cu_seqlens is not None:
        padded_rewards, index = pad(rewards, cu_seqlens)
        padded_values, padded_loss_mask, padded_value_mask = (
            pad(x, cu_seqlens)[0] for x in (values, loss_mask, value_mask)
        )
        advantages, returns = gae_fwd(
            padded_rewards,
            padded_values,
            padded_loss_mask,
            padded_value_mask,
            None,
            gamma,
            gae_lambda,
            masked,
        )
        return advantages.reshape(-1)[index], returns.reshape(-1)[index]
    dtype = compute_dtype(rewards, values)
    slots = value_mask | loss_mask
    r = torch.where(value_mask, rewards.to(dtype), 0)
    v = torch.where(value_mask, values.to(dtype), 0)
    if masked == "carry":
        ahead = torch.nn.functional.pad(v[:, 1:], (0, min(1, v.shape[1])))
        deltas = r + gamma * ahead - v
        decay = torch.full_like(v, gamma * gae_lambda)
    else:
        deltas = torch.where(slots, r + gamma * _next_value(v, slots) - v, 0)
        decay = torch.where(slots, gamma * gae_lambda, torch.ones_like(v))
    states = _scan(deltas, decay)
    advantages = torch.where(loss_mask, states, 0)
    return advantages, torch.where(value_mask, states + v, 0)


def discounted_returns_fwd(
    rewards: torch.Tensor,  # [B, T] or packed [N]
    loss_mask: torch.Tensor,
    reward_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    gamma: float,
) -> torch.Tensor:
    """R_t = r_t + gamma * R_{t+1} over the slots of reward_mask and loss_mask, holes skipped;
    0 outside loss_mask."""
    nothing = torch.zeros_like(rewards)
    slots = reward_mask | loss_mask
    rewards = torch.where(reward_mask, rewards, 0)
    _, returns = gae_fwd(rewards, nothing, loss_mask, slots, cu_seqlens, gamma, 1.0, "identity")
    return torch.where(loss_mask, returns, 0)


def masked_moments_fwd(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """float64 [3]: the number of entries under the mask, their mean, and the sum of their squared
    deviations from it."""
    inside = torch.where(mask, x.double(), 0)
    count = mask.sum()
    mean = inside.sum() / count.clamp(min=1)
    deviation = torch.where(mask, inside - mean, 0)
    return torch.stack([count.double(), mean, deviation.square().sum()])


def merged_moments(moments: torch.Tensor) -> torch.Tensor:
    """Moments [W, 3] of W disjoint sets -> [3] of all of them."""
    counts, means, squares = moments.unbind(-1)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp(min=1)
    return torch.stack([count, mean, (squares + counts * (means - mean).square()).sum()])


def masked_whiten_fwd(
    x: torch.Tensor,
    mask: torch.Tensor,
    moments: torch.Tensor | None,  # [W, 3] float64, or None for those of x
    shift_mean: bool,
    unbiased: bool,
) -> torch.Tensor:
    """(x - mean) / sqrt(var + 1e-8) over the mask (+ mean unless shift_mean); 0 outside it."""
    if moments is None:
        moments = masked_moments_fwd(x, mask).unsqueeze(0)
    dtype = compute_dtype(x)
    count, mean, squares = merged_moments(moments).unbind()
    variance = squares / (count - int(unbiased)).clamp(min=1)
    factor = torch.rsqrt(variance + WHITEN_EPSILON)
    white = (x.double() - mean) * factor
    return torch.where(mask, white if shift_mean else white + mean, 0).to(dtype)


def rewards_to_advantages_fwd(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    values: torch.Tensor,
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
    gamma: float,
    gae_lambda: float,
    masked: str,
    whiten: bool,
    whiten_rewards: bool,
    unbiased: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """shape_rewards, whitening of rewards over the value mask with their mean kept, gae, whitening
    of advantages over loss_mask. Returns advantages, returns, rewards (as gae saw them), kl."""
    rewards, kl = shape_rewards_fwd(
        scores,
        logprobs,
        ref_logprobs,
        loss_mask,
        has_eos,
        kl_coefs,
        kl_coef,
        estimator,
        kl_clip,
        score_slot,
        score_clip,
        score_scale,
        missing_eos,
        missing_eos_penalty,
        max_length,
    )
    value_mask = loss_mask.clone()
    if scores.dim() == 1:
        value_mask |= score_slots(loss_mask, score_slot, max_length)
    if whiten_rewards:
        rewards = masked_whiten_fwd(rewards, value_mask, None, False, unbiased)
    advantages, returns = gae_fwd(
        rewards, values, loss_mask, value_mask, None, gamma, gae_lambda, masked
    )
    if whiten:
        advantages = masked_whiten_fwd(advantages, loss_mask, None, True, unbiased)
    return advantages, returns, rewards, kl

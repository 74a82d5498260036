"""Advantages and returns: GAE, discounted returns, and the whole way from scores in one op.

Formulas: reference/rewards.py. None of these ops has a gradient.
"""

from typing import Any

import torch

from fuserl_kernels import checks, native_advantages
from fuserl_kernels.reference.rewards import (
    MASKED,
    discounted_returns_fwd,
    gae_fwd,
    rewards_to_advantages_fwd,
)
from fuserl_kernels.reference.sequences import compute_dtype
from fuserl_kernels.registration import register
from fuserl_kernels.reward_shaping import SHAPING_SCHEMA, check_room, shaping_arguments
from fuserl_kernels.triton_advantages import discounted_returns_triton, gae_triton
from fuserl_kernels.triton_rewards_to_advantages import rewards_to_advantages_triton

GAE_FORWARD = {
    "reference": gae_fwd,
    "triton": gae_triton,
    "native": native_advantages.gae_fwd,
}
RETURNS_FORWARD = {
    "reference": discounted_returns_fwd,
    "triton": discounted_returns_triton,
    "native": native_advantages.discounted_returns_fwd,
}
FORWARD = {
    "reference": rewards_to_advantages_fwd,
    "triton": rewards_to_advantages_triton,
    "native": native_advantages.rewards_to_advantages_fwd,
}


def _check_sequences(
    name: str, tensor: torch.Tensor, cu_seqlens: torch.Tensor | None, masks: dict
) -> None:
    checks.floating(name, tensor)
    for mask_name, mask in masks.items():
        checks.mask(mask_name, mask, name, tensor)
    if cu_seqlens is not None:
        checks.cu_seqlens_shape(cu_seqlens, name, tensor)
    elif tensor.dim() != 2:
        raise ValueError(
            f"{name} must be [B, T], or packed [N] with cu_seqlens, not {list(tensor.shape)}"
        )


# --- gae

_gae_op = register(
    "gae(Tensor rewards, Tensor values, Tensor loss_mask, Tensor value_mask, Tensor? cu_seqlens, "
    "float gamma, float gae_lambda, str masked) -> (Tensor, Tensor)",
    GAE_FORWARD,
    lambda rewards, values, *_: tuple(
        rewards.new_empty(rewards.shape, dtype=compute_dtype(rewards, values)) for _ in range(2)
    ),
    check=lambda rewards, *rest: checks.cu_seqlens_data(rest[3], rewards.numel()),
)


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
    value_mask: torch.Tensor | None = None,
    masked: str = "identity",
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation, backwards over the slots of value_mask.

    rewards, values: [B, T], or packed [N] with cu_seqlens int32/int64 [B + 1]. loss_mask: trained
    tokens. value_mask: slots with a value and perhaps a reward (default loss_mask; one slot longer
    where the score sits behind the last token). Other slots count as 0, whatever they hold.
    masked: what a hole in the mask (tool tokens) does. "identity" skips it: the next slot of the
        mask is the next step. "carry" walks through it with value 0, decaying at each position.

    Returns advantages (0 outside loss_mask) and returns = advantage + value (0 outside value_mask),
    float32 (float64 for float64). The value after the last slot is 0.
    """
    value_mask = loss_mask if value_mask is None else value_mask
    masks = {"loss_mask": loss_mask, "value_mask": value_mask}
    _check_sequences("rewards", rewards, cu_seqlens, masks)
    checks.like("values", values, "rewards", rewards)
    checks.between("gamma", gamma, 0.0, 1.0)
    checks.between("gae_lambda", gae_lambda, 0.0, 1.0)
    checks.choice("masked", masked, MASKED)
    rewards, values = checks.detached(rewards), checks.detached(values)
    advantages, returns = _gae_op(
        rewards, values, loss_mask, value_mask, cu_seqlens, gamma, gae_lambda, masked
    )
    return advantages, returns


# --- discounted_returns

_returns_op = register(
    "discounted_returns(Tensor rewards, Tensor loss_mask, Tensor reward_mask, Tensor? cu_seqlens, "
    "float gamma) -> Tensor",
    RETURNS_FORWARD,
    lambda rewards, *_: rewards.new_empty(rewards.shape, dtype=compute_dtype(rewards)),
    check=lambda rewards, *rest: checks.cu_seqlens_data(rest[2], rewards.numel()),
)


def discounted_returns(
    rewards: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    gamma: float = 1.0,
    reward_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reward-to-go at trained tokens: R_t = r_t + gamma * R_{t+1}, holes of the mask skipped.

    rewards: [B, T], or packed [N] with cu_seqlens. reward_mask: slots whose rewards count (default
    loss_mask); make it one slot longer where the score sits behind the last token, as value_mask
    in gae: that slot then is one step away. Other slots count as 0, whatever they hold.

    Returns [B, T] or [N], float32 (float64 for float64), 0 outside loss_mask.
    """
    reward_mask = loss_mask if reward_mask is None else reward_mask
    masks = {"loss_mask": loss_mask, "reward_mask": reward_mask}
    _check_sequences("rewards", rewards, cu_seqlens, masks)
    checks.between("gamma", gamma, 0.0, 1.0)
    return _returns_op(checks.detached(rewards), loss_mask, reward_mask, cu_seqlens, gamma)


# --- rewards_to_advantages


def _fake(
    scores: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    shaped = compute_dtype(scores, logprobs)
    estimated = torch.promote_types(shaped, compute_dtype(rest[0]))
    dtypes = (estimated, estimated, shaped, shaped)
    return tuple(logprobs.new_empty(logprobs.shape, dtype=dtype) for dtype in dtypes)


def _check_data(*inputs: Any) -> None:
    if inputs[0].dim() == 1:
        check_room(inputs[4], inputs[10], inputs[15])


_op = register(
    "rewards_to_advantages(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor values, "
    f"Tensor loss_mask, {SHAPING_SCHEMA}, float gamma, float gae_lambda, str masked, bool whiten, "
    "bool whiten_rewards, bool unbiased) -> (Tensor, Tensor, Tensor, Tensor)",
    FORWARD,
    _fake,
    check=_check_data,
)


def rewards_to_advantages(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    values: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    kl_coef: float | torch.Tensor,
    gamma: float,
    gae_lambda: float,
    whiten: bool,
    unbiased: bool = False,
    whiten_rewards: bool = False,
    masked: str = "identity",
    estimator: str = "k1",
    kl_clip: float | None = None,
    score_slot: str = "last",
    score_clip: float | None = None,
    score_scale: float = 1.0,
    missing_eos: str | None = None,
    missing_eos_penalty: float = 1.0,
    has_eos: torch.Tensor | None = None,
    max_length: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """shape_rewards, gae and masked_whiten in a row, as one op.

    values: [B, T]. The value mask is loss_mask, with one slot more behind the last trained token
    for score_slot "after" where it fits. whiten: whiten the advantages over loss_mask, the whole
    batch at once. whiten_rewards: first whiten the rewards over the value mask, keeping their mean.
    unbiased: the variance of both whitenings divides by n - 1. The rest: shape_rewards and gae.

    Returns advantages, returns, rewards (as gae saw them) and kl, [B, T] each.
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
    checks.like("values", values, "logprobs", logprobs)
    checks.between("gamma", gamma, 0.0, 1.0)
    checks.between("gae_lambda", gae_lambda, 0.0, 1.0)
    checks.choice("masked", masked, MASKED)
    advantages, returns, rewards, kl = _op(
        *tensors[:3],
        checks.detached(values),
        loss_mask,
        *options,
        gamma,
        gae_lambda,
        masked,
        whiten,
        whiten_rewards,
        unbiased,
    )
    return advantages, returns, rewards, kl

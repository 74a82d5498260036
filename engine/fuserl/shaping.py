"""From scores to advantages: the KL penalty, the score's slot, and the algorithm's estimator."""

from typing import Any

import torch

import fuserl_kernels as fk
from fuserl.algorithms import ALGORITHMS, PRESETS
from fuserl.batch import ScoredBatch, ShapedBatch
from fuserl.config import RLConfig


def shape(batch: ScoredBatch, config: RLConfig) -> ShapedBatch:
    """Add rewards, kl, value_mask, advantages and returns. Nothing carries a
    gradient. The rule for a missing EOS speaks of sequence scores: it leaves rewards at every
    token alone."""
    algorithm, preset = ALGORITHMS[config.algorithm], PRESETS[config.preset]
    at_tokens = batch.scores.ndim == 2
    score_slot = "last" if at_tokens else preset.score_slot
    value_mask = batch.loss_mask.clone()
    if score_slot == "after":
        value_mask[:, 1:] |= batch.loss_mask[:, :-1]
    shaping: dict[str, Any] = {
        "kl_coef": config.kl_coef,
        "estimator": config.kl_estimator,
        "score_slot": score_slot,
        "missing_eos": None if at_tokens else preset.missing_eos,
        "missing_eos_penalty": config.missing_eos_penalty,
        "has_eos": batch.has_eos,
    }
    if algorithm.has_critic:
        if batch.values is None:
            raise ValueError(f"{config.algorithm} needs the values of a critic")
        advantages, returns, rewards, kl = fk.rewards_to_advantages(
            batch.scores,
            batch.logprobs,
            batch.ref_logprobs,
            batch.values,
            batch.loss_mask,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            whiten=True,
            unbiased=preset.unbiased_variance,
            whiten_rewards=config.whiten_rewards,
            **shaping,
        )
    else:
        rewards, kl = fk.shape_rewards(
            batch.scores, batch.logprobs, batch.ref_logprobs, batch.loss_mask, **shaping
        )
        if config.whiten_rewards:
            rewards = fk.masked_whiten(rewards, value_mask, shift_mean=False)
        returns = fk.discounted_returns(
            rewards, batch.loss_mask, gamma=config.gamma, reward_mask=value_mask
        )
        advantages = returns
        if algorithm.advantage == "return_minus_mean":
            num_tokens = batch.loss_mask.sum().clamp(min=1)
            advantages = torch.where(batch.loss_mask, returns - returns.sum() / num_tokens, 0.0)
    # The same placing without the KL penalty: what the score of each sequence came to.
    placed, _ = fk.shape_rewards(
        batch.scores,
        batch.logprobs,
        batch.ref_logprobs,
        batch.loss_mask,
        **{**shaping, "kl_coef": 0.0},
    )
    return ShapedBatch(
        applied_scores=placed.sum(1),
        **batch.fields(),
        rewards=rewards,
        kl=kl,
        value_mask=value_mask,
        advantages=advantages,
        returns=returns,
    )

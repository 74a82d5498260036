"""From scores to advantages: the KL penalty, the score's slot, and the algorithm's estimator."""

import dataclasses
from typing import Any

import torch

import fuserl_kernels as fk
from fuserl.algorithms import ALGORITHMS
from fuserl.batch import ScoredBatch, ShapedBatch
from fuserl.config import RLConfig
from fuserl.conventions import conventions
from fuserl_kernels.presets import Preset


def shape(batch: ScoredBatch, config: RLConfig) -> ShapedBatch:
    """Add rewards, kl, value_mask, advantages and returns. Nothing carries a
    gradient. The rule for a missing EOS speaks of sequence scores: it leaves rewards at every
    token alone. Advantages that the preset whitens in each minibatch are not yet white."""
    algorithm, preset = ALGORITHMS[config.algorithm], conventions(config)
    value_mask = batch.loss_mask.clone()
    if preset.score_slot == "after":
        value_mask[:, 1:] |= batch.loss_mask[:, :-1]
    given: dict[str, Any] = {"kl_coef": config.kl_coef, "has_eos": batch.has_eos}
    shaping = preset.shaping(config.kl_estimator)
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
            whiten_rewards=config.whiten_rewards,
            **given,
            **preset.advantages(config.kl_estimator),
        )
    else:
        rewards, kl = fk.shape_rewards(
            batch.scores, batch.logprobs, batch.ref_logprobs, batch.loss_mask, **given, **shaping
        )
        if config.whiten_rewards:
            rewards = fk.masked_whiten(
                rewards, value_mask, shift_mean=False, unbiased=preset.unbiased
            )
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
        **{**given, "kl_coef": 0.0},
        **shaping,
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


def whitened(batch: ShapedBatch, preset: Preset) -> ShapedBatch:
    """A minibatch with its advantages whitened over what the preset takes together: trained
    tokens, or every slot up to the last value of any row (padding between them counts as 0;
    sequences without a trained token do not count)."""
    advantages, together = batch.advantages, batch.loss_mask
    if preset.whitening_mask == "all":
        assert batch.values is not None
        advantages = torch.where(batch.value_mask, batch.returns - batch.values, 0.0)
        slots = torch.arange(batch.value_mask.shape[1], device=advantages.device)
        used = slots <= torch.where(batch.value_mask, slots, -1).amax()
        together = used & batch.value_mask.any(1, keepdim=True)
    white = fk.masked_whiten(advantages, together, unbiased=preset.unbiased)
    return dataclasses.replace(batch, advantages=torch.where(batch.loss_mask, white, 0.0))

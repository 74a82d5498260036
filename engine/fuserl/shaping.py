"""From scores to advantages: the KL penalty, the score's slot, and the algorithm's estimator."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

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
    algorithm, preset, penalty = ALGORITHMS[config.algorithm], conventions(config), config.kl
    if batch.ref_logprobs is None and penalty.coef:
        raise ValueError(f"kl_coef {penalty.coef} needs the log-probabilities of a reference")
    # Without a reference the policy is compared with itself: the KL is 0.
    ref_logprobs = batch.logprobs if batch.ref_logprobs is None else batch.ref_logprobs
    value_mask = batch.loss_mask.clone()
    if preset.score_slot == "after":
        value_mask[:, 1:] |= batch.loss_mask[:, :-1]
    given: dict[str, Any] = {"kl_coef": penalty.reward_coef, "has_eos": batch.has_eos}
    shaping = preset.shaping(penalty.estimator)
    if algorithm.has_critic:
        if batch.values is None:
            raise ValueError(f"{config.algorithm} needs the values of a critic")
        advantages, returns, rewards, kl = fk.rewards_to_advantages(
            batch.scores,
            batch.logprobs,
            ref_logprobs,
            batch.values,
            batch.loss_mask,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
            whiten_rewards=config.whiten_rewards,
            **given,
            **preset.advantages(penalty.estimator),
        )
    else:
        rewards, kl = fk.shape_rewards(
            batch.scores, batch.logprobs, ref_logprobs, batch.loss_mask, **given, **shaping
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
        elif algorithm.advantage == "group":
            advantages = group_advantages(rewards.sum(1), batch.loss_mask, config.num_samples)
    # The same placing without the KL penalty: what the score of each sequence came to.
    placed, _ = fk.shape_rewards(
        batch.scores,
        batch.logprobs,
        ref_logprobs,
        batch.loss_mask,
        **{**given, "kl_coef": 0.0},
        **shaping,
    )
    return ShapedBatch(
        applied_scores=placed.sum(1),
        **batch.fields(),
        rewards=rewards,
        kl=None if batch.ref_logprobs is None else kl,
        value_mask=value_mask,
        advantages=advantages,
        returns=returns,
    )


def group_advantages(scores: Tensor, loss_mask: Tensor, num_samples: int) -> Tensor:
    """(score - mean of its group) / (deviation of the group, unbiased, + 1e-4) at every trained
    token, [B, T]; a group is the num_samples completions of a prompt, which stand together, less
    those that train nothing. Of a group of one, or of equal scores, 0.

    scores: [B]; loss_mask: [B, T]."""
    included = loss_mask.any(1).view(-1, num_samples)
    # The mean of equal numbers is that number in float64 alone.
    groups = torch.where(included, scores.double().view(-1, num_samples), 0)
    count = included.sum(1, keepdim=True)
    mean = groups.sum(1, keepdim=True) / count.clamp(min=1)
    apart = torch.where(included, groups - mean, 0)
    variance = apart.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
    advantages = (apart / (variance.sqrt() + 1e-4)).to(scores.dtype).view(-1, 1)
    return torch.where(loss_mask, advantages, 0)


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

"""The phase between scoring and shaping for old_logprobs "recomputed": the trainer's own
log-probabilities take the place of the sampler's, before any weight moves.

With them every ratio of the loss starts at 1, whatever made the rollout. What the sampler did
otherwise is then corrected by weights of its own, importance sampling with bounds (Yao et al.,
2025; masked: IcePop, Ling team, 2025):

    w = exp(recomputed - rollout)   of a token, or with the log-ratios of its sequence summed
    token, sequence                 min(w, cap)
    mask                            w within [1 / cap, cap], 0 outside

A weight multiplies the policy's advantages and nothing else: not the entropy bonus, not a KL
penalty in the loss, not what the critic learns.
"""

import dataclasses

import torch
from torch import Tensor

from fuserl.batch import ScoredBatch
from fuserl.config import RLConfig
from fuserl.model.heads import LanguageModel
from fuserl.sampling_gap import gap_of_tokens, masked_mean
from fuserl.sequences import Sequences, completion_logprobs
from fuserl_kernels.reference.policy import CorrectionOptions, correction_weights


@torch.no_grad()
def recompute(batch: ScoredBatch, policy: LanguageModel, config: RLConfig) -> ScoredBatch:
    """Replace logprobs by the policy's, keep the sampler's as rollout_logprobs, and add
    importance_weights where the configuration asks for a correction."""
    found: list[Tensor] = []
    for rows in torch.arange(len(batch), device=batch.prompts.device).split(config.microbatch_size):
        part = batch.select(rows)
        sequences = Sequences.of_batch(part)
        learned = sequences.by_token(part.loss_mask)
        logprobs = completion_logprobs(policy, sequences, config.temperature, learned)
        found.append(sequences.by_slot(logprobs, part.completions.shape[1]))
    batch = dataclasses.replace(batch, rollout_logprobs=batch.logprobs, logprobs=torch.cat(found))
    if config.importance_correction == "none":
        return batch
    weights, _ = _bounded_weights(batch, config)
    return dataclasses.replace(batch, importance_weights=weights)


def _bounded_weights(batch: ScoredBatch, config: RLConfig) -> tuple[Tensor, Tensor]:
    """[B, T] each: the weights, 0 where masked, and whether a bound changed them."""
    assert batch.rollout_logprobs is not None
    cap = config.importance_cap
    options = {
        "token": CorrectionOptions("truncate", "token", 0.0, cap),
        "sequence": CorrectionOptions("truncate", "sequence_sum", 0.0, cap),
        "mask": CorrectionOptions("mask", "token", 1 / cap, cap),
    }[config.importance_correction]
    weights, changed = correction_weights(
        batch.logprobs, batch.rollout_logprobs, batch.loss_mask, None, options
    )
    return torch.where(batch.loss_mask, weights, 0), changed & batch.loss_mask


def describe_recomputed(batch: ScoredBatch, config: RLConfig) -> dict[str, Tensor]:
    """The gap between sampler and trainer over the whole rollout, and the weights that correct it,
    of trained tokens whichever their level. Nothing where ratios start from the sampler."""
    if batch.rollout_logprobs is None:
        return {}
    metrics = gap_of_tokens(batch.logprobs, batch.rollout_logprobs, batch.loss_mask)
    if batch.importance_weights is None:
        return metrics
    mask, weights = batch.loss_mask, batch.importance_weights
    _, changed = _bounded_weights(batch, config)
    least = torch.where(mask, weights, torch.inf).amin()
    return metrics | {
        "sampling/importance_weight/min": least.masked_fill(~mask.any(), 0),
        "sampling/importance_weight/mean": masked_mean(weights, mask),
        "sampling/importance_weight/max": weights.amax(),
        "sampling/importance_weight/truncated": masked_mean(changed.float(), mask),
    }

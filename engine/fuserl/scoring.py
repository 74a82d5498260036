"""The phase after the rollout: scores, the reference's log-probabilities, the critic's values."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fuserl.batch import RolloutBatch, ScoredBatch
from fuserl.data.examples import Prompt
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.rewards import Reward
from fuserl.sequences import completion_logprobs, completion_values, joined


@torch.no_grad()
def score(
    batch: RolloutBatch,
    prompts: Sequence[Prompt],
    *,
    reward: Reward,
    reference: LanguageModel,
    critic: ScalarModel | None,
    temperature: float,
    microbatch_size: int,
) -> ScoredBatch:
    """Add scores, ref_logprobs and values. A sequence whose score is NaN or infinite is left
    out: its loss_mask becomes all False and its score 0."""
    scores = reward(batch, prompts)
    bad = ~scores.isfinite()
    excluded = bad if bad.ndim == 1 else bad.any(dim=1)
    scores = torch.where(bad, 0.0, scores)
    batch = dataclasses.replace(batch, loss_mask=batch.loss_mask & ~excluded[:, None])
    ref_logprobs: list[Tensor] = []
    values: list[Tensor] = []
    for rows in torch.arange(len(batch), device=scores.device).split(microbatch_size):
        part = batch.select(rows)
        token_ids = joined(part)
        ref_logprobs.append(
            completion_logprobs(
                reference,
                token_ids,
                part.prompt_lengths,
                part.completions,
                part.loss_mask,
                temperature,
            )
        )
        if critic is not None:
            width = part.completions.shape[1]
            values.append(completion_values(critic, token_ids, part.prompt_lengths, width))
    return ScoredBatch(
        **batch.fields(),
        scores=scores,
        ref_logprobs=torch.cat(ref_logprobs),
        values=torch.cat(values) if values else None,
    )

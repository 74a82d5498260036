"""The phase after the rollout: scores, the reference's log-probabilities, the critic's values."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from fuserl.batch import RolloutBatch, ScoredBatch
from fuserl.data.examples import Prompt
from fuserl.model.heads import Critic, LanguageModel
from fuserl.rewards import Reward
from fuserl.sequences import Sequences, completion_logprobs, completion_values


@torch.no_grad()
def score(
    batch: RolloutBatch,
    prompts: Sequence[Prompt],
    *,
    reward: Reward,
    reference: LanguageModel | None,
    critic: Critic | None,
    temperature: float,
    microbatch_size: int,
) -> ScoredBatch:
    """Add scores, and of the models that there are ref_logprobs and values. A sequence whose score
    is NaN or infinite is left out: its loss_mask becomes all False and its score 0."""
    scores = reward(batch, prompts)
    bad = ~scores.isfinite()
    excluded = bad if bad.ndim == 1 else bad.any(dim=1)
    scores = torch.where(bad, 0.0, scores)
    batch = dataclasses.replace(batch, loss_mask=batch.loss_mask & ~excluded[:, None])
    ref_logprobs: list[Tensor] = []
    values: list[Tensor] = []
    if reference is None and critic is None:
        return ScoredBatch(**batch.fields(), scores=scores, ref_logprobs=None, values=None)
    for rows in torch.arange(len(batch), device=scores.device).split(microbatch_size):
        part = batch.select(rows)
        sequences, width = Sequences.of_batch(part), part.completions.shape[1]
        if reference is not None:
            learned = sequences.by_token(part.loss_mask)
            logprobs = completion_logprobs(reference, sequences, temperature, learned)
            ref_logprobs.append(sequences.by_slot(logprobs, width))
        if critic is not None:
            values.append(completion_values(critic, sequences, width))
    return ScoredBatch(
        **batch.fields(),
        scores=scores,
        ref_logprobs=torch.cat(ref_logprobs) if ref_logprobs else None,
        values=torch.cat(values) if values else None,
    )

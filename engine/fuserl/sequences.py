"""Prompt and completion as one right-padded row, and the one-step shift between the two.

The logits after a token speak of the next one, so completion token t is predicted by the hidden
state at position prompt_length - 1 + t. That shift is written here and nowhere else.
"""

import torch
from torch import Tensor

import fuserl_kernels as fk
from fuserl.batch import RolloutBatch
from fuserl.model.heads import LanguageModel, ScalarModel


def join(
    prompts: Tensor, prompt_lengths: Tensor, completions: Tensor, completion_lengths: Tensor
) -> Tensor:
    """[B, P] and [B, T] right-padded rows to [B, S]: completion right after its prompt.

    S is the longest joined row; what follows a row's last token is 0.
    """
    if completions.shape[1] == 0:
        return torch.where(mask_of_lengths(prompt_lengths, prompts.shape[1]), prompts, 0)
    lengths = prompt_lengths + completion_lengths
    width = int(lengths.max())
    slots = torch.arange(width, device=prompts.device).expand(len(prompts), width)
    completion_slots = slots - prompt_lengths[:, None]
    from_prompt = prompts.gather(1, slots.clamp(max=prompts.shape[1] - 1))
    from_completion = completions.gather(
        1, completion_slots.clamp(min=0, max=completions.shape[1] - 1)
    )
    token_ids = torch.where(completion_slots < 0, from_prompt, from_completion)
    return torch.where(slots < lengths[:, None], token_ids, 0)


def joined(batch: RolloutBatch) -> Tensor:
    """The rows of a batch, [B, S]: see `join`."""
    return join(batch.prompts, batch.prompt_lengths, batch.completions, batch.completion_lengths)


def mask_of_lengths(lengths: Tensor, width: int) -> Tensor:
    """[B] lengths to a [B, width] bool mask of the slots in use."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def completion_states(states: Tensor, prompt_lengths: Tensor, width: int) -> Tensor:
    """What was known before each completion token: [B, S, ...] by position to [B, T, ...] by
    completion slot, T = width. Slot t is position prompt_length - 1 + t; slots past the row's
    last position repeat it (they are masked wherever they are used)."""
    slots = prompt_lengths[:, None] - 1 + torch.arange(width, device=states.device)
    slots = slots.clamp(max=states.shape[1] - 1)
    rows = torch.arange(len(states), device=states.device)[:, None]
    return states[rows, slots]


def completion_logprobs(
    model: LanguageModel,
    token_ids: Tensor,
    prompt_lengths: Tensor,
    completions: Tensor,
    loss_mask: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probabilities of the completion tokens, [B, T] fp32, 0 where loss_mask is False.

    token_ids: [B, S] from `join`. Differentiable in the model's parameters.
    """
    states = completion_states(model(token_ids), prompt_lengths, completions.shape[1])
    return fk.linear_token_logprobs(
        states, model.output_weight, completions, temperature=temperature, loss_mask=loss_mask
    )


def completion_values(
    model: ScalarModel, token_ids: Tensor, prompt_lengths: Tensor, width: int
) -> Tensor:
    """The scalar head before each completion token, [B, T] fp32."""
    return completion_states(model.values(token_ids), prompt_lengths, width)


def last_values(model: ScalarModel, token_ids: Tensor, lengths: Tensor) -> Tensor:
    """The scalar head at each row's last token, [B] fp32: the score of a whole sequence."""
    values = model.values(token_ids)
    return values.gather(1, lengths[:, None] - 1).squeeze(1)

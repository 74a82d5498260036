"""The record of one RL step. Phases fill it in the order of the loop; nobody changes a field."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """B sequences. Everything per token lives on the completion axis: index t is completion
    token t. Rows are right-padded, and lengths come from the sampler, so that padding may be
    any id. In a mask True means: a real token, which trains.

    T is one slot wider than the longest completion unless that completion reached the length
    limit: a score or a value may sit one slot after the last token (preset n+).
    """

    # rollout
    prompts: Tensor  # [B, P] int64
    prompt_lengths: Tensor  # [B] int64
    completions: Tensor  # [B, T] int64, the sampled ids, EOS included
    completion_lengths: Tensor  # [B] int64, EOS included
    has_eos: Tensor  # [B] bool
    loss_mask: Tensor  # [B, T] bool
    logprobs: Tensor  # [B, T] fp32, of the policy that sampled
    # score
    scores: Tensor | None = None  # [B], or [B, T] for rewards at every token
    ref_logprobs: Tensor | None = None  # [B, T] fp32
    values: Tensor | None = None  # [B, T] fp32, of the state before token t
    # shape
    rewards: Tensor | None = None  # [B, T] fp32, score and KL penalty
    kl: Tensor | None = None  # [B, T] fp32
    value_mask: Tensor | None = None  # [B, T] bool, loss_mask and the score's slot
    advantages: Tensor | None = None  # [B, T] fp32
    returns: Tensor | None = None  # [B, T] fp32, of each slot: what the critic learns

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str) -> "RolloutBatch":
        return self._map(lambda tensor: tensor.to(device))

    def select(self, rows: Tensor) -> "RolloutBatch":
        """Rows by index, [n] int64."""
        return self._map(lambda tensor: tensor[rows])

    def _map(self, function) -> "RolloutBatch":  # type: ignore[no-untyped-def]
        present = {
            field.name: function(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is not None
        }
        return dataclasses.replace(self, **present)

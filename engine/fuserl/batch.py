"""The record of one RL step. Each phase of the loop adds its fields, which makes it the next
phase's type; nobody changes a field."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """B sampled sequences. Everything per token lives on the completion axis: index t is completion
    token t. Rows are right-padded, and lengths come from the sampler, so that padding may be
    any id. In a mask True means: a real token, which trains.

    T is one slot wider than the longest completion unless that completion reached the length
    limit: a score or a value may sit one slot after the last token (preset n+).
    """

    prompts: Tensor  # [B, P] int64
    prompt_lengths: Tensor  # [B] int64
    completions: Tensor  # [B, T] int64, the sampled ids, EOS included
    completion_lengths: Tensor  # [B] int64, EOS included
    has_eos: Tensor  # [B] bool
    loss_mask: Tensor  # [B, T] bool
    logprobs: Tensor  # [B, T] fp32, of the policy that sampled: what ratios start from
    truncated_logprobs: Tensor  # [B, T] fp32, of the distribution drawn from: after truncation

    trunk_states: Tensor | None = None
    """[tokens, D], of the decoder's dtype: for a hydra, the residual stream before the first
    layer that trains, of the prompts (each once, however many samples it has) and then of the
    completions, end to end. `select` leaves it whole: rows are found by trunk_starts."""
    trunk_starts: Tensor | None = None
    """[B, 2] int64: where the row's prompt and its completion begin in trunk_states."""

    rollout_logprobs: Tensor | None = None
    """[B, T] fp32: the sampler's, where logprobs are recomputed; None where logprobs are they."""
    importance_weights: Tensor | None = None
    """[B, T] fp32: constants that the policy's advantages are multiplied by; 0 where masked."""

    def __len__(self) -> int:
        return len(self.prompts)

    def fields(self) -> dict[str, Any]:
        """By name: what the next phase's record is made from."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to(self, device: torch.device | str) -> Self:
        return self._map(lambda tensor: tensor.to(device))

    def select(self, rows: Tensor) -> Self:
        """Rows by index, [n] int64."""
        return self._map(lambda tensor: tensor[rows], whole=("trunk_states",))

    def _map(self, function: Callable[[Tensor], Tensor], whole: tuple[str, ...] = ()) -> Self:
        present = {
            name: function(tensor)
            for name, tensor in self.fields().items()
            if tensor is not None and name not in whole
        }
        return dataclasses.replace(self, **present)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredBatch(RolloutBatch):
    """loss_mask is all False for a sequence that had no usable score."""

    scores: Tensor  # [B], or [B, T] for rewards at every token
    ref_logprobs: Tensor | None  # [B, T] fp32; None without a reference
    values: Tensor | None  # [B, T] fp32, of the state before token t; None without a critic


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapedBatch(ScoredBatch):
    """What the update learns from."""

    applied_scores: Tensor  # [B] fp32, as they entered the rewards: after the missing-EOS rule
    rewards: Tensor  # [B, T] fp32, score and KL penalty
    kl: Tensor | None  # [B, T] fp32; None without a reference
    value_mask: Tensor  # [B, T] bool, loss_mask and the score's slot
    advantages: Tensor  # [B, T] fp32
    returns: Tensor  # [B, T] fp32, of each slot: what the critic learns

"""What computes a rollout's tokens: the interface, and which implementation a model gets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fuserl.model.cache import CacheShape
from fuserl.model.heads import LanguageModel
from fuserl.rollout.live_rows import Ended, LiveRows, NewPrompt, NewRow
from fuserl.rollout.sampling import SamplingParams
from fuserl.rollout.stopping import StopRule


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions:
    sampling: SamplingParams
    stop: StopRule
    keep_before: int = 0
    """Keep every token's residual stream before this layer (0: none)."""


class Runner(Protocol):
    """Holds the cache and the live rows of one model."""

    rows: LiveRows
    can_refill: bool
    """Whether rows may join while others are live."""
    num_flagged: int
    """Live rows that drew a flagged token in the last call of `run`."""
    cache_bytes: int
    weight_bytes: int
    """Of copies of the weights that were made for the rollout."""

    def admit(self, prompts: Sequence[NewPrompt], rows: Sequence[NewRow]) -> list[Tensor | None]:
        """Compute prompts into the cache and let rows of these or earlier prompts join. Returns
        the kept stream of each prompt, [P, D], or None."""

    def run(self, max_steps: int, enough: int) -> list[Ended]:
        """Draw up to max_steps tokens for every live row and take the rows that end out; returns
        early once `enough` rows have ended, none is live, or a flagged token was drawn."""

    def keep(self, rows: Tensor) -> None:
        """Make these live rows, [n] int64 and ascending, the only ones."""

    def kept(self, slot: int, length: int) -> Tensor | None:
        """The kept stream of a completion that ended, [length, D]."""


def allocate_rows(model: LanguageModel, shape: CacheShape) -> LiveRows:
    return LiveRows(
        shape.num_slots,
        shape.capacity,
        shape.num_prompts,
        model.config.hidden_size,
        model.trunk.dtype,
        model.device,
    )


def pack_prompts(prompts: Sequence[NewPrompt], device: torch.device) -> tuple[Tensor, list[int]]:
    """Token ids end to end, [N] int64, and lengths."""
    ids = [token for prompt in prompts for token in prompt.ids]
    return torch.tensor(ids, device=device), [len(prompt.ids) for prompt in prompts]

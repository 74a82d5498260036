"""What a policy generates: completions one by one as they finish, or all those of a call."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fuserl.rollout.engine import RolloutFacts

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedCompletion:
    """One completion of T tokens."""

    index: int
    """Its number in the call: prompts' order, the samples of a prompt together."""
    prompt_index: int
    token_ids: list[int]  # [T]
    logprobs: list[float]  # [T]
    truncated_logprobs: list[float]  # [T]
    text: str | None
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One entry a completion: prompts' order, the samples of a prompt together."""

    token_ids: list[list[int]]
    """All that were sampled, with what ended the completion: an EOS, a stop id, the tokens of a
    stop string."""
    logprobs: list[list[float]]
    """Of each token, after the temperature and before truncation."""
    truncated_logprobs: list[list[float]]
    """Of each token, in the distribution it was drawn from."""
    texts: list[str] | None
    """Without special tokens, and cut before a stop string. None for a policy without a
    tokenizer."""
    finish_reasons: list[FinishReason]
    """stop: an EOS, a stop id or a stop string; length: the limit."""
    kv_bytes: int
    """Of the cache of keys and values. 0 through transformers' modules, which hold their own."""
    weight_bytes: int
    """Of copies of the weights that lived as long as the call."""

    @classmethod
    def of(
        cls, completions: Iterable[FinishedCompletion], facts: RolloutFacts, *, has_texts: bool
    ) -> "Generation":
        """All completions of a call, in any order, and its facts once it has ended."""
        rows = sorted(completions, key=lambda completion: completion.index)
        return cls(
            token_ids=[row.token_ids for row in rows],
            logprobs=[row.logprobs for row in rows],
            truncated_logprobs=[row.truncated_logprobs for row in rows],
            texts=[row.text for row in rows if row.text is not None] if has_texts else None,
            finish_reasons=[row.finish_reason for row in rows],
            kv_bytes=facts.cache_bytes,
            weight_bytes=facts.weight_bytes,
        )

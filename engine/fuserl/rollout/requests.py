"""What is asked of a rollout, and what comes back: prompts with their requests, completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from fuserl.model.config import DecoderConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRequest:
    """One prompt and the numbers of the completions wanted of it."""

    ids: Sequence[int]  # [P], P >= 1
    max_new_tokens: int
    request_ids: Sequence[int]
    """One a completion. Its random draws depend on the seed and this number alone."""


class End(IntEnum):
    """Why a completion ended; the numbers are also those of fk.advance_rows and decoder.h."""

    STOP = 1  # EOS, a stop id or a stop string
    LIMIT = 2
    BROKEN = 3  # the logits held no distribution


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One finished completion of T tokens, on the model's device."""

    index: int  # its number among all requests of the call, prompt by prompt
    token_ids: Tensor  # [T] int64, the token that ended it included
    logprobs: Tensor  # [T] fp32: after the temperature, before truncation
    truncated_logprobs: Tensor  # [T] fp32: of the distribution that was drawn from
    end: End
    trunk_states: Tensor | None = None  # [T, D]: see RolloutBatch


def check_request(
    config: DecoderConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int | Sequence[int]
) -> list[int]:
    """The limit of each prompt. ValueError for an empty prompt, a token id outside the vocabulary,
    and a request longer than the model's positions."""
    if isinstance(max_new_tokens, int):
        limits = [max_new_tokens] * len(prompts)
    else:
        limits = list(max_new_tokens)
    if len(limits) != len(prompts):
        raise ValueError(f"max_new_tokens has {len(limits)} entries for {len(prompts)} prompts")
    if not limits:
        raise ValueError("prompts must not be empty")
    if min(limits) < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {min(limits)}")
    check_token_ids(config, "prompts", prompts)
    for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        if not prompt:
            raise ValueError(f"prompts[{i}] is empty: it needs at least one token")
        if len(prompt) + limit > config.max_positions:
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens; with max_new_tokens {limit} it passes "
                f"the model's {config.max_positions} positions"
            )
    return limits


def check_token_ids(config: DecoderConfig, name: str, rows: Sequence[Sequence[int]]) -> None:
    """ValueError for a token id outside the vocabulary."""
    for i, row in enumerate(rows):
        if row and (min(row) < 0 or max(row) >= config.vocab_size):
            wrong = next(token for token in row if not 0 <= token < config.vocab_size)
            raise ValueError(
                f"{name}[{i}] holds token id {wrong}, outside the vocabulary of {config.vocab_size}"
            )

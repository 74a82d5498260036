"""Where scores come from: a reward model, or any Python function."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fuserl.batch import RolloutBatch
from fuserl.data.examples import Prompt
from fuserl.model.heads import ScalarModel
from fuserl.sequences import Sequences, last_values
from fuserl.tokenizer import Tokenizer

RewardFunction = Callable[..., Sequence[float | None] | Sequence[Sequence[float]]]
"""f(prompts, completions, **columns) -> one number a completion, None or NaN to leave it out
(or, with reward_at="token", one list of numbers a completion, one for each of its tokens).
prompts and completions are lists of str; columns are the rows' other keys, a list each, and
completion_ids the sampled token ids."""

_OWN_ARGUMENTS = ("prompts", "completions", "completion_ids")


class RewardError(ValueError):
    """A reward function raised, or returned something of the wrong length or kind."""


class Reward(Protocol):
    def __call__(self, batch: RolloutBatch, prompts: Sequence[Prompt]) -> Tensor:
        """Scores of the completions, [B] fp32 or [B, T] fp32. NaN: leave the sequence out."""


def once(reward: Reward) -> Reward:
    """A reward of one batch, whose function is called once however often scores are asked for. A
    model is itself: to run it again costs time and changes nothing."""
    if isinstance(reward, ModelReward):
        return reward
    known: list[Tensor] = []

    def scores(batch: RolloutBatch, prompts: Sequence[Prompt]) -> Tensor:
        if not known:
            known.append(reward(batch, prompts))
        return known[0]

    return scores


class ModelReward:
    """Scores by a reward model: its value after the completion's last token, or after each."""

    def __init__(self, model: ScalarModel, *, microbatch_size: int, at_tokens: bool) -> None:
        self.model = model
        self._microbatch_size, self._at_tokens = microbatch_size, at_tokens

    @torch.no_grad()
    def __call__(self, batch: RolloutBatch, prompts: Sequence[Prompt]) -> Tensor:
        return torch.cat(
            [
                self._score(batch.select(rows))
                for rows in torch.arange(len(batch)).split(self._microbatch_size)
            ]
        )

    def _score(self, batch: RolloutBatch) -> Tensor:
        sequences = Sequences.of_batch(batch)
        if not self._at_tokens:
            return last_values(self.model, sequences)
        values = self.model(sequences.token_ids, sequences.packing)
        after = values[sequences.own]  # the value after token t, not before it
        return sequences.by_slot(after, batch.completions.shape[1])


class FunctionReward:
    """Scores by a Python function (see RewardFunction), checked."""

    def __init__(
        self, function: RewardFunction, tokenizer: Tokenizer | None, *, at_tokens: bool
    ) -> None:
        self._function, self._tokenizer, self._at_tokens = function, tokenizer, at_tokens

    def __call__(self, batch: RolloutBatch, prompts: Sequence[Prompt]) -> Tensor:
        lengths = batch.completion_lengths.tolist()
        completion_ids = [
            row[:length] for row, length in zip(batch.completions.tolist(), lengths, strict=True)
        ]
        texts = [self._tokenizer.decode(ids) if self._tokenizer else "" for ids in completion_ids]
        returned = self._call(prompts, texts, completion_ids)
        if not hasattr(returned, "__len__"):
            raise RewardError(
                f"the reward function returned {returned!r}, not a list with a score for each of "
                f"{len(prompts)} completions"
            )
        if len(returned) != len(prompts):
            raise RewardError(
                f"the reward function returned {len(returned)} scores for "
                f"{len(prompts)} completions"
            )
        device = batch.completions.device
        if not self._at_tokens:
            scores = [
                _number(score, prompt, text)
                for score, prompt, text in zip(returned, prompts, texts, strict=True)
            ]
            return torch.tensor(scores, dtype=torch.float32, device=device)
        rows = torch.zeros(batch.completions.shape, dtype=torch.float32)
        for i, (row, length) in enumerate(zip(returned, lengths, strict=True)):
            if not hasattr(row, "__len__") or len(row) != length:
                raise RewardError(
                    f'reward_at="token" needs one number for each of the {length} tokens of a '
                    f"completion, got {row!r}\n{_shown(prompts[i], texts[i])}"
                )
            numbers = [_number(score, prompts[i], texts[i]) for score in row]
            rows[i, :length] = torch.tensor(numbers)
        return rows.to(device)

    def _call(
        self, prompts: Sequence[Prompt], texts: list[str], completion_ids: list[list[int]]
    ) -> Sequence[Any]:
        names = sorted(set().union(*(prompt.columns for prompt in prompts)))
        if taken := [name for name in names if name in _OWN_ARGUMENTS]:
            raise RewardError(
                f"the data has a column {taken[0]!r}, which is what reward functions call the "
                f"rollout's own {taken[0]}: rename the column ({prompts[0].where})"
            )
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        try:
            return self._function(
                prompts=[prompt.text for prompt in prompts],
                completions=texts,
                completion_ids=completion_ids,
                **columns,
            )
        except Exception as error:
            raise RewardError(
                f"the reward function raised {type(error).__name__}: {error}\n"
                f"the batch begins with\n{_shown(prompts[0], texts[0])}"
            ) from error


def _number(score: Any, prompt: Prompt, completion: str) -> float:
    if score is None:
        return math.nan
    try:
        if isinstance(score, bool | str):
            raise TypeError
        return float(score)
    except (TypeError, ValueError, RuntimeError):
        raise RewardError(
            f"the reward function returned {score!r}, not a number, for\n"
            f"{_shown(prompt, completion)}"
        ) from None


def _shown(prompt: Prompt, completion: str) -> str:
    """A row in an error message."""
    return f"prompt ({prompt.where}): {prompt.text!r}\ncompletion: {completion!r}"


def observe(
    monitors: Mapping[str, Reward], batch: RolloutBatch, prompts: Sequence[Prompt]
) -> dict[str, Tensor]:
    """Mean of rewards that are watched and not trained on."""
    return {name: monitor(batch, prompts).nanmean() for name, monitor in monitors.items()}

"""A reward that is computed while other completions are still being sampled."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor

from fuserl.batch import RolloutBatch
from fuserl.config import RLConfig
from fuserl.data.batching import pad_rows
from fuserl.data.examples import Prompt
from fuserl.rewards import Reward
from fuserl.rollout.requests import Completion, End
from fuserl.sequences import mask_of_lengths


class StreamedReward:
    """A Reward of one rollout: `add` each completion as it finishes, then call it with the whole.

    Completions are scored `size` at a time, in the order in which they finished, by one thread of
    its own: a function that waits (for a judge, a compiler, a test) costs nothing while sampling
    goes on. The function must not need a whole rollout at once.
    """

    def __init__(self, reward: Reward, prompts: Sequence[Prompt], size: int) -> None:
        """prompts: of each completion of the rollout."""
        self._reward, self._prompts, self._size = reward, prompts, size
        self._waiting: list[Completion] = []
        self._parts: list[tuple[list[int], Future[Tensor]]] = []
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reward")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """What was not yet begun is given up."""
        self._thread.shutdown(cancel_futures=True)

    def add(self, completion: Completion) -> None:
        """Raises what the reward raised so far: the rest need not be sampled."""
        for _, future in self._parts:
            if future.done():
                future.result()
        self._waiting.append(completion)
        if len(self._waiting) == self._size:
            self._submit()

    def _submit(self) -> None:
        part, self._waiting = self._waiting, []
        numbers = [completion.index for completion in part]
        prompts = [self._prompts[number] for number in numbers]
        future = self._thread.submit(self._score, _batch_of(part, prompts), prompts)
        self._parts.append((numbers, future))

    @torch.no_grad()
    def _score(self, batch: RolloutBatch, prompts: Sequence[Prompt]) -> Tensor:
        return self._reward(batch, prompts)

    def __call__(self, batch: RolloutBatch, prompts: Sequence[Prompt]) -> Tensor:
        """Waits for the scores of all; raises what the reward raised."""
        if self._waiting:
            self._submit()
        whole: Tensor | None = None
        for numbers, future in self._parts:
            scores = future.result()
            if whole is None:
                shape = batch.completions.shape[: scores.ndim]
                whole = scores.new_zeros(shape)
            if scores.ndim == 1:
                whole[numbers] = scores
            else:  # a number a token, as many as the longest of the part has
                whole[numbers, : scores.shape[1]] = scores
        assert whole is not None
        return whole


@contextmanager
def reward_of(
    reward: Reward, prompts: Sequence[Prompt], config: RLConfig
) -> Iterator[tuple[Reward, Callable[[Completion], None] | None]]:
    """The reward of one rollout, and what it wants to be called with as completions finish."""
    if config.reward_batch_size is None:
        yield reward, None
        return
    with StreamedReward(reward, prompts, config.reward_batch_size) as streamed:
        yield streamed, streamed.add


def _batch_of(part: Sequence[Completion], prompts: Sequence[Prompt]) -> RolloutBatch:
    """Some completions as a record of their own."""
    device = part[0].token_ids.device

    def by_row(rows: Sequence[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

    token_ids = by_row([completion.token_ids for completion in part])
    lengths = torch.tensor([len(completion.token_ids) for completion in part], device=device)
    padded, prompt_lengths = (x.to(device) for x in pad_rows([prompt.ids for prompt in prompts]))
    return RolloutBatch(
        prompts=padded,
        prompt_lengths=prompt_lengths,
        completions=token_ids,
        completion_lengths=lengths,
        has_eos=torch.tensor([c.end is End.STOP for c in part], device=device),
        loss_mask=mask_of_lengths(lengths, token_ids.shape[1]),
        logprobs=by_row([completion.logprobs for completion in part]),
        truncated_logprobs=by_row([completion.truncated_logprobs for completion in part]),
    )

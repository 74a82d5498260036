"""Requests for the rollout engine, and what comes of them."""

from collections.abc import Sequence
from typing import Any

import torch

from fuserl.model.heads import LanguageModel
from fuserl.rollout.engine import generate
from fuserl.rollout.requests import Completion, PromptRequest
from fuserl.rollout.runner import RunnerOptions
from fuserl.rollout.sampling import SamplingParams
from fuserl.rollout.stopping import StopRule


def requests_of(num_prompts: int, limits: Sequence[int], samples: int = 2) -> list[PromptRequest]:
    generator = torch.Generator().manual_seed(4)
    return [
        PromptRequest(
            ids=torch.randint(3, 40, (1 + i % 5,), generator=generator).tolist(),
            max_new_tokens=limits[i % len(limits)],
            request_ids=range(i * samples, (i + 1) * samples),
        )
        for i in range(num_prompts)
    ]


def completions_of(
    model: LanguageModel, requests: Sequence[PromptRequest], options: RunnerOptions, **more: Any
) -> dict[int, Completion]:
    return {found.index: found for found in generate(model, requests, options, **more)}


def assert_same(got: dict[int, Completion], want: dict[int, Completion]) -> None:
    assert got.keys() == want.keys()
    for index, completion in want.items():
        assert got[index].end is completion.end
        for name in ("token_ids", "logprobs", "truncated_logprobs", "trunk_states"):
            ours, theirs = getattr(got[index], name), getattr(completion, name)
            assert (ours is None) == (theirs is None)
            assert ours is None or torch.equal(ours, theirs), (index, name)


def options_of(*stop_ids: int, keep_before: int = 0, **sampling: Any) -> RunnerOptions:
    return RunnerOptions(
        sampling=SamplingParams(seed=3, **sampling),
        stop=StopRule(token_ids=frozenset(stop_ids)),
        keep_before=keep_before,
    )

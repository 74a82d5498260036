"""Rewards computed while others are sampled: the same scores, in parts, in another thread."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fuserl.config import RLConfig
from fuserl.data.examples import Prompt
from fuserl.model.heads import LanguageModel
from fuserl.rewards import FunctionReward, RewardError
from fuserl.rollout.collect import rollout
from fuserl.streamed_reward import reward_of

PROMPTS = [[5, 9, 3], [8], [12, 4, 6, 9], [33, 21]]


def prompts_of(num_samples: int) -> list[Prompt]:
    return [
        Prompt(ids=tuple(ids), text=str(ids), columns={"row": i}, where=f"data[{i}]")
        for i, ids in enumerate(PROMPTS)
        for _ in range(num_samples)
    ]


def config_of(**options: Any) -> RLConfig:
    return RLConfig(
        model="m", data="d", out="o", num_samples=3, batch_size=4, max_new_tokens=9, **options
    )


def sampled_and_scored(
    model: LanguageModel,
    function: Callable[..., Any],
    config: RLConfig,
    at_tokens: bool = False,
    eos: int = 7,
) -> tuple[Any, torch.Tensor]:
    prompts = prompts_of(config.num_samples)
    whole = FunctionReward(function, None, at_tokens=at_tokens)
    with reward_of(whole, prompts, config) as (reward, on_completion):
        batch = rollout(
            model,
            prompts,
            config,
            eos_token_ids=[eos],
            step=0,
            on_step=lambda: None,
            on_completion=on_completion,
        )
        return batch, reward(batch, prompts)


def streamed(
    model: LanguageModel,
    function: Callable[..., Any],
    config: RLConfig,
    *,
    then: Callable[[Any], None],
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """A rollout whose completions go to the reward as they finish; `then` is called after each,
    with what took it."""
    prompts = prompts_of(config.num_samples)
    with reward_of(FunctionReward(function, None, at_tokens=False), prompts, config) as (_, add):
        assert add is not None

        def on_completion(completion: Any) -> None:
            add(completion)
            then(add)

        rollout(
            model,
            prompts,
            config,
            eos_token_ids=(),
            step=0,
            on_step=on_step,
            on_completion=on_completion,
        )


@pytest.mark.parametrize("at_tokens", [False, True])
def test_scores_are_those_of_the_whole(
    make_model: Callable[..., LanguageModel], at_tokens: bool
) -> None:
    model = make_model(seed=2)
    calls: list[tuple[int, str]] = []

    def function(completion_ids: list[list[int]], row: list[int], **_: Any) -> list[Any]:
        calls.append((len(completion_ids), threading.current_thread().name))
        if at_tokens:
            return [
                [token + number for token in ids]
                for ids, number in zip(completion_ids, row, strict=True)
            ]
        return [sum(ids) + 1000 * number for ids, number in zip(completion_ids, row, strict=True)]

    free, _ = sampled_and_scored(model, function, config_of(), at_tokens)
    eos = int(free.completions[0, 2])
    calls.clear()
    _, expected = sampled_and_scored(model, function, config_of(), at_tokens, eos)
    assert calls == [(12, threading.current_thread().name)]
    calls.clear()
    batch, found = sampled_and_scored(
        model, function, config_of(reward_batch_size=5, rollout_slots=4), at_tokens, eos
    )
    assert torch.equal(found, expected)
    assert [size for size, _ in calls] == [5, 5, 2]
    assert all(name.startswith("reward") for _, name in calls)
    assert len(set(batch.completion_lengths.tolist())) > 1, "rows finish at different times"


def test_parts_are_scored_before_the_rollout_ends(
    make_model: Callable[..., LanguageModel],
) -> None:
    """The function's first call waits until the sampler asks for its next tokens."""
    config = config_of(reward_batch_size=3, rollout_slots=2)
    scored = threading.Event()

    def function(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        scored.set()
        return [0.0] * len(completion_ids)

    waited: list[bool] = []
    finished: list[int] = []

    def on_step() -> None:
        if len(finished) >= 3 and not waited:  # others are still to be sampled
            waited.append(scored.wait(timeout=30))
            assert len(finished) < len(prompts_of(config.num_samples))

    streamed(
        make_model(seed=2), function, config, then=lambda add: finished.append(1), on_step=on_step
    )
    assert waited == [True]


def test_what_the_function_raises_arrives_with_its_row(
    make_model: Callable[..., LanguageModel],
) -> None:
    def function(**_: Any) -> list[float]:
        raise KeyError("no judge")

    with pytest.raises(RewardError, match=r"raised KeyError: 'no judge'\n.*\nprompt \(data\["):
        sampled_and_scored(make_model(seed=2), function, config_of(reward_batch_size=2))


def test_a_rollout_ends_early_where_its_reward_raised(
    make_model: Callable[..., LanguageModel],
) -> None:
    calls: list[int] = []
    raised = threading.Event()

    def function(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        calls.append(len(completion_ids))
        raised.set()
        raise KeyError("no judge")

    def until_it_raised(add: Any) -> None:
        assert raised.wait(timeout=30)
        while not all(future.done() for _, future in add.__self__._parts):
            time.sleep(0.01)

    config = config_of(reward_batch_size=1, rollout_slots=1)
    with pytest.raises(RewardError, match="no judge"):
        streamed(make_model(seed=2), function, config, then=until_it_raised)
    assert len(calls) == 1, "the other completions are neither sampled nor scored"


def test_an_interrupted_rollout_leaves_no_thread(make_model: Callable[..., LanguageModel]) -> None:
    def interrupted(add: Any) -> None:
        raise KeyboardInterrupt

    config = config_of(reward_batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        streamed(make_model(seed=2), lambda **given: [0.0], config, then=interrupted)
    assert not [t for t in threading.enumerate() if t.name.startswith("reward")]


def test_sizes_are_checked() -> None:
    with pytest.raises(ValueError, match="reward_batch_size must be positive, got 0"):
        config_of(reward_batch_size=0)
    with pytest.raises(ValueError, match="rollout_slots must be positive, got 0"):
        config_of(rollout_slots=0)

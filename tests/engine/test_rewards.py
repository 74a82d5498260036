"""Where scores come from: what a function is given, what is made of its answer, and how it is
told what was wrong with it; a reward model in a batch equals one sequence at a time."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from packed import run_one

from fuserl.batch import RolloutBatch
from fuserl.data.examples import Prompt
from fuserl.model.heads import ScalarModel
from fuserl.rewards import FunctionReward, ModelReward, RewardError, RewardFunction, observe
from fuserl.tokenizer import Tokenizer

COMPLETIONS = [" red dog", " cat", " big old house"]


@pytest.fixture
def prompts() -> list[Prompt]:
    texts = ["blue", "green", "small tree"]
    return [
        Prompt((1, 5), text, {"number": i, "ideal": f"ideal {i}"}, f"rows.jsonl:{i + 1}")
        for i, text in enumerate(texts)
    ]


@pytest.fixture
def batch(tokenizer: Tokenizer, batch_of: Callable[..., RolloutBatch]) -> RolloutBatch:
    ids = [[*tokenizer.encode_text(text), tokenizer.eos_token_id] for text in COMPLETIONS]
    return batch_of([[1, 5]] * 3, ids, width=max(map(len, ids)) + 1)


@pytest.fixture
def call(
    tokenizer: Tokenizer, batch: RolloutBatch, prompts: list[Prompt]
) -> Callable[..., torch.Tensor]:
    def score(function: RewardFunction, at_tokens: bool = False) -> torch.Tensor:
        return FunctionReward(function, tokenizer, at_tokens=at_tokens)(batch, prompts)

    return score


def test_a_function_gets_texts_ids_and_columns(
    call: Callable[..., torch.Tensor], batch: RolloutBatch
) -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: Sequence[str], completions: Sequence[str], **rest: Any) -> list[float]:
        seen.update(rest, prompts=prompts, completions=completions)
        return [1.5, -2, 0.25]

    scores = call(reward)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.5, -2.0, 0.25]
    assert seen.pop("completion_ids") == [
        row[:length].tolist()
        for row, length in zip(batch.completions, batch.completion_lengths, strict=True)
    ]
    assert seen == {
        "prompts": ["blue", "green", "small tree"],
        "completions": COMPLETIONS,
        "number": [0, 1, 2],
        "ideal": ["ideal 0", "ideal 1", "ideal 2"],
    }


def test_a_column_that_some_rows_lack_is_none_there(
    tokenizer: Tokenizer, batch: RolloutBatch, prompts: list[Prompt]
) -> None:
    prompts[1].columns.clear()
    numbers: list[Any] = []

    def reward(number: list[Any], **_: Any) -> list[float]:
        numbers.extend(number)
        return [0.0] * 3

    FunctionReward(reward, tokenizer, at_tokens=False)(batch, prompts)
    assert numbers == [0, None, 2]


def test_none_and_nan_become_nan(call: Callable[..., torch.Tensor]) -> None:
    scores = call(lambda **_: [None, math.nan, 3])
    assert scores.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize("kind", [torch.tensor, lambda x: torch.tensor(x).numpy(), tuple])
def test_tensors_and_arrays_are_numbers(
    kind: Callable[..., Any], call: Callable[..., torch.Tensor]
) -> None:
    assert call(lambda **_: kind([1.0, 2.0, 3.0])).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"returned None, not a list with a score for each of 3 completions"),
        (1.0, r"returned 1.0, not a list"),
        ([1.0, 2.0], "returned 2 scores for 3 completions"),
        ([], "returned 0 scores for 3 completions"),
        ([1.0, "high", 2.0], "'high', not a number"),
        ([1.0, "2", 2.0], "'2', not a number"),
        ([1.0, True, 2.0], "True, not a number"),
        ([1.0, [1, 2], 2.0], r"\[1, 2\], not a number"),
        ([1.0, torch.ones(2), 2.0], r"tensor\(\[1., 1.\]\), not a number"),
        ([1.0, 2j, 2.0], r"2j, not a number"),
    ],
)
def test_a_wrong_answer_is_shown(
    returned: Any, message: str, call: Callable[..., torch.Tensor]
) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        call(lambda **_: returned)
    if "not a number" in message:
        assert "prompt (rows.jsonl:2): 'green'\ncompletion: ' cat'" in str(caught.value)


def test_a_function_that_raises_is_named_with_a_row(call: Callable[..., torch.Tensor]) -> None:
    def reward(**_: Any) -> list[float]:
        return [1 / 0]

    with pytest.raises(RewardError, match="raised ZeroDivisionError: division by zero") as caught:
        call(reward)
    assert "prompt (rows.jsonl:1): 'blue'\ncompletion: ' red dog'" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_column_with_a_name_of_ours_is_refused(
    tokenizer: Tokenizer, batch: RolloutBatch, prompts: list[Prompt]
) -> None:
    prompts[0].columns["completions"] = "x"
    reward = FunctionReward(lambda **_: [0.0] * 3, tokenizer, at_tokens=False)
    with pytest.raises(RewardError, match=r"column 'completions'.*rename.*rows\.jsonl:1"):
        reward(batch, prompts)


def test_rewards_of_tokens_stand_at_their_tokens(
    call: Callable[..., torch.Tensor], batch: RolloutBatch
) -> None:
    scores = call(lambda completion_ids, **_: [list(map(float, r)) for r in completion_ids], True)
    assert scores.shape == batch.completions.shape
    assert torch.equal(scores, torch.where(batch.loss_mask, batch.completions.float(), 0.0))


def test_rewards_of_tokens_are_counted(call: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(RewardError, match=r"one number for each of the \d+ tokens") as caught:
        call(lambda completion_ids, **_: [[0.0] * len(completion_ids[0]), [1.0], [2.0]], True)
    assert "prompt (rows.jsonl:2): 'green'" in str(caught.value)
    with pytest.raises(RewardError, match=r"got 1\.0"):
        call(lambda **_: [1.0, 2.0, 3.0], True)
    with pytest.raises(RewardError, match="'x', not a number"):
        call(lambda completion_ids, **_: [["x"] * len(row) for row in completion_ids], True)


@pytest.mark.parametrize("microbatch_size", [1, 2, 16])
def test_a_reward_model_scores_each_sequence_as_if_alone(
    microbatch_size: int,
    make_scalar_model: Callable[..., ScalarModel],
    batch_of: Callable[..., RolloutBatch],
) -> None:
    model = make_scalar_model(seed=4)
    prompts = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
    completions = [[15], [16, 17, 18, 2], [19, 20, 21, 22, 23], [2]]
    batch = batch_of(prompts, completions, width=6)
    options = {"microbatch_size": microbatch_size}
    scores = ModelReward(model, **options, at_tokens=False)(batch, [])
    by_token = ModelReward(model, **options, at_tokens=True)(batch, [])
    assert scores.std() > 0.1
    assert by_token.shape == (4, 6)
    assert (by_token[~batch.loss_mask] == 0).all()
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        with torch.no_grad():
            alone = run_one(model, prompt + completion)
        assert scores[i].item() == pytest.approx(alone[-1].item(), abs=1e-5)
        own = by_token[i, : len(completion)]
        torch.testing.assert_close(own, alone[len(prompt) :], rtol=1e-5, atol=1e-5)


def test_monitors_are_means_without_what_was_left_out(
    tokenizer: Tokenizer, batch: RolloutBatch, prompts: list[Prompt]
) -> None:
    monitor = FunctionReward(lambda **_: [1.0, None, 2.0], tokenizer, at_tokens=False)
    assert observe({"gold": monitor}, batch, prompts)["gold"].item() == 1.5

"""The phase after the rollout: the reference and the critic see what the sampler saw, and a
sequence without a usable score is left out."""

import math
from collections.abc import Callable

import pytest
import torch
from packed import run_one

from fuserl.batch import RolloutBatch, ScoredBatch
from fuserl.data.examples import Prompt
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.scoring import score
from fuserl.sequences import Sequences

NUM = 6


@pytest.fixture
def model(make_model: Callable[..., LanguageModel]) -> LanguageModel:
    return make_model(seed=1)


@pytest.fixture
def prompts(make_prompts: Callable[..., list[Prompt]]) -> list[Prompt]:
    return make_prompts(NUM)


@pytest.fixture
def batch(
    model: LanguageModel, prompts: list[Prompt], make_batch: Callable[..., RolloutBatch]
) -> RolloutBatch:
    return make_batch(model, prompts, max_new_tokens=9)


def scored(
    batch: RolloutBatch,
    prompts: list[Prompt],
    scores: torch.Tensor,
    reference: LanguageModel | None,
    critic: ScalarModel | None = None,
    microbatch_size: int = 4,
) -> ScoredBatch:
    return score(
        batch,
        prompts,
        reward=lambda *_: scores,
        reference=reference,
        critic=critic,
        temperature=0.7,
        microbatch_size=microbatch_size,
    )


def test_the_sampling_policy_as_reference_gives_back_its_logprobs(
    batch: RolloutBatch, prompts: list[Prompt], model: LanguageModel
) -> None:
    found = scored(batch, prompts, torch.zeros(NUM), model)
    assert not found.ref_logprobs.requires_grad
    torch.testing.assert_close(found.ref_logprobs, batch.logprobs, rtol=1e-5, atol=1e-5)


def test_a_model_that_is_not_there_is_not_run(
    batch: RolloutBatch,
    prompts: list[Prompt],
    make_scalar_model: Callable[..., ScalarModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    critic = make_scalar_model(seed=7)
    found = scored(batch, prompts, torch.zeros(NUM), None, critic)
    assert found.ref_logprobs is None
    assert found.values is not None

    def run(*_: object) -> None:
        raise AssertionError("no model is there to run")

    monkeypatch.setattr(Sequences, "of_batch", run)
    found = scored(batch, prompts, torch.ones(NUM), None)
    assert found.ref_logprobs is None
    assert found.values is None
    assert found.scores.tolist() == [1.0] * NUM


@pytest.mark.parametrize("microbatch_size", [1, 4, 100])
def test_values_are_of_the_state_before_each_token_and_after_the_last(
    microbatch_size: int,
    batch: RolloutBatch,
    prompts: list[Prompt],
    model: LanguageModel,
    make_scalar_model: Callable[..., ScalarModel],
) -> None:
    critic = make_scalar_model(seed=7)
    found = scored(batch, prompts, torch.zeros(NUM), model, critic, microbatch_size)
    assert found.values is not None
    width = batch.completions.shape[1]
    for i, prompt in enumerate(prompts):
        length = int(batch.completion_lengths[i])
        ids = [*prompt.ids, *batch.completions[i, :length].tolist()]
        with torch.no_grad():
            alone = run_one(critic, ids)
        slots = min(length + 1, width)  # one more than tokens: the score's slot
        expected = alone[len(prompt.ids) - 1 :][:slots]
        torch.testing.assert_close(found.values[i, :slots], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_score_leaves_its_sequence_out(
    bad: float, batch: RolloutBatch, prompts: list[Prompt], model: LanguageModel
) -> None:
    scores = torch.arange(1.0, NUM + 1)
    scores[2] = bad
    found = scored(batch, prompts, scores, model)
    assert found.scores.tolist() == [1, 2, 0, 4, 5, 6]
    expected = batch.loss_mask.clone()
    expected[2] = False
    assert torch.equal(found.loss_mask, expected)
    assert (found.ref_logprobs[2] == 0).all()
    assert batch.loss_mask[2].any(), "the batch handed in is not changed"


def test_one_bad_score_of_a_token_leaves_the_sequence_out(
    batch: RolloutBatch, prompts: list[Prompt], model: LanguageModel
) -> None:
    scores = torch.ones(batch.completions.shape)
    scores[1, 0] = math.nan
    found = scored(batch, prompts, scores, model)
    assert found.loss_mask.any(1).tolist() == [True, False, True, True, True, True]
    assert found.scores.isfinite().all()

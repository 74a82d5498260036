"""Rollouts through transformers' modules, whose rows all begin together: waves change nothing, and
memory that runs out loses nothing. That completions are transformers' is test_fallback.py."""

import other_models
import pytest
import torch
from random_models import frequent_token, ragged_prompts

from fuserl.model.folder import load_language_model
from fuserl.model.heads import LanguageModel
from fuserl.rollout.decode import Completions, decode
from fuserl.rollout.engine import make_runner
from fuserl.rollout.live_rows import Ended
from fuserl.rollout.sampling import SamplingParams
from fuserl.rollout.wave_runner import WaveRunner

PROMPTS = ragged_prompts([9, 20, 1, 14, 5])
LIMITS = [8, 7, 12, 5, 9]
NUM_SAMPLES = 3
SAMPLING = SamplingParams(temperature=0.9, seed=3)


@pytest.fixture(scope="module", params=["olmo2", "mixtral-window", "mamba"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> LanguageModel:
    folder = tmp_path_factory.mktemp(request.param)
    other_models.build(request.param).save_pretrained(folder)
    model = load_language_model(folder)
    assert make_runner(model) is WaveRunner
    return model


@pytest.fixture(scope="module")
def eos(model: LanguageModel) -> int:
    return frequent_token(
        model, PROMPTS, max_new_tokens=LIMITS, sampling=SAMPLING, num_samples=NUM_SAMPLES
    )


def rows_of(order: list[int]) -> list[int]:
    return [NUM_SAMPLES * i + sample for i in order for sample in range(NUM_SAMPLES)]


def sample(
    model: LanguageModel, eos: int, order: list[int], num_slots: int | None = None
) -> Completions:
    return decode(
        model,
        [PROMPTS[i] for i in order],
        max_new_tokens=[LIMITS[i] for i in order],
        sampling=SAMPLING,
        eos_token_id=eos,
        num_samples=NUM_SAMPLES,
        request_ids=rows_of(order),
        num_slots=num_slots,
    )


def assert_near(ours: Completions, whole: Completions, order: list[int]) -> None:
    rows, width = rows_of(order), ours.token_ids.shape[1]
    assert torch.equal(ours.lengths, whole.lengths[rows])
    assert torch.equal(ours.has_eos, whole.has_eos[rows])
    assert torch.equal(ours.token_ids, whole.token_ids[rows, :width])
    expected = whole.logprobs[rows, :width]
    torch.testing.assert_close(ours.logprobs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("order", "num_slots"),
    [([0, 1, 2, 3, 4], 1), ([4, 2, 0, 1, 3], 4), ([3, 1], 5), ([2, 0, 3, 4, 1], 7), ([0], 64)],
)
def test_waves_change_nothing(
    order: list[int], num_slots: int, model: LanguageModel, eos: int
) -> None:
    """Slots for some rows at a time, which cut the samples of a prompt in two; an EOS that ends
    some rows of a wave early."""
    whole = sample(model, eos, [0, 1, 2, 3, 4])
    assert 0 < int(whole.has_eos.sum()) < len(whole.has_eos)
    out = sample(model, eos, order, num_slots)
    assert out.facts.num_slots == min(num_slots, NUM_SAMPLES * len(order))
    assert_near(out, whole, order)


@pytest.mark.parametrize("calls_before", [0, 2])
def test_it_goes_on_with_half_the_slots(
    calls_before: int, model: LanguageModel, eos: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = [0, 1, 2, 3, 4]
    whole = sample(model, eos, order)
    calls, run = 0, WaveRunner.run

    def failing(it: WaveRunner, max_steps: int, enough: int) -> list[Ended]:
        nonlocal calls
        calls += 1
        if calls == calls_before + 1:
            raise torch.OutOfMemoryError
        return run(it, max_steps, enough)

    monkeypatch.setattr(WaveRunner, "run", failing)
    out = sample(model, eos, order, num_slots=5)
    assert out.facts.num_slots == 2
    assert_near(out, whole, order)

"""What a rollout does when memory runs out, and that it keeps none."""

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from random_models import (
    SAMPLINGS,
    assert_same,
    choose_runner,
    frequent_token,
    ragged_prompts,
    scrambled,
)

from fuserl.bench.memory import growth_bytes, why_not_measured
from fuserl.model.heads import LanguageModel
from fuserl.policy import Policy
from fuserl.rollout.decode import Completions, decode
from fuserl.rollout.sampling import SamplingParams
from fuserl.rollout.stopping import StopRule

PROMPTS = ragged_prompts([3, 1, 17, 9, 5])
LIMITS = [40, 50, 33, 20, 7]
ERRORS = {
    "python": MemoryError(),
    "cuda": torch.OutOfMemoryError("CUDA out of memory"),
    "cpu": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TB"),
}


@pytest.fixture(params=["native", "modules"])
def runner(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class that runs rollouts in this test."""
    return choose_runner(request.param, monkeypatch)


@pytest.fixture
def model(runner: Any) -> LanguageModel:
    return scrambled()


def sample(model: LanguageModel, **changes: Any) -> Completions:
    options: dict[str, Any] = {"sampling": SAMPLINGS["cool"], "num_samples": 2, "num_slots": 6}
    return decode(model, PROMPTS, max_new_tokens=LIMITS, **(options | changes))


def fail(kind: Any, patch: pytest.MonkeyPatch, name: str, errors: Iterator[Any]) -> None:
    """Calls of a method raise what `errors` gives, or go on at None and after the last."""
    whole = getattr(kind, name)

    def failing(it: Any, *arguments: Any) -> Any:
        if (error := next(errors, None)) is not None:
            raise error
        return whole(it, *arguments)

    patch.setattr(kind, name, failing)


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize(
    ("method", "calls_before"),
    [("__init__", 0), ("admit", 0), ("admit", 2), ("run", 0), ("run", 3)],
)
def test_it_goes_on_with_half_the_slots(
    error: Exception,
    method: str,
    calls_before: int,
    runner: Any,
    model: LanguageModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = sample(model, keep_before=1)
    fail(runner, monkeypatch, method, iter([None] * calls_before + [error]))
    finished: list[int] = []
    with caplog.at_level(logging.WARNING):
        out = sample(model, keep_before=1, on_completion=lambda c: finished.append(c.index))
    assert sorted(finished) == list(range(10)), "each once"
    assert out.facts.num_slots == 3
    assert_same(out, whole)
    assert [record.getMessage() for record in caplog.records] == [
        "out of memory with 6 sequences at a time: the rollout goes on with 3"
    ]


def test_again_and_again_until_there_is_one_slot(
    runner: Any, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sample(model)
    with monkeypatch.context() as patch:
        fail(runner, patch, "__init__", iter([MemoryError(), MemoryError()]))
        out = sample(model)
    assert out.facts.num_slots == 1
    assert_same(out, whole)
    fail(runner, monkeypatch, "run", iter([MemoryError()] * 9))
    with pytest.raises(MemoryError):
        sample(model, num_slots=4)


@pytest.mark.parametrize("error", [RuntimeError("broken"), ValueError("wrong"), OSError(12, "")])
def test_other_errors_come_through(
    error: Exception, runner: Any, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(runner, monkeypatch, "run", iter([error]))
    with pytest.raises(type(error)) as raised:
        sample(model)
    assert raised.value is error


def test_the_memory_is_free_before_the_next_try(
    runner: Any, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches: list[Callable[[], Any]] = []
    alive: list[int] = []
    make, run, fails = runner.__init__, runner.run, iter([False, True, False, True])

    def failing(*arguments: Any) -> Any:
        if next(fails, False):
            raise MemoryError  # an error in a variable would hold its own frame
        return run(*arguments)

    def watched(it: Any, *arguments: Any) -> None:
        alive.append(sum(cache() is not None for cache in caches))
        make(it, *arguments)
        caches.append(weakref.ref(it._cache))

    monkeypatch.setattr(runner, "__init__", watched)
    monkeypatch.setattr(runner, "run", failing)
    gc.collect()
    gc.disable()  # what only a collection frees comes too late
    try:
        sample(model)
        assert alive == [0, 0, 0]
        assert [cache() for cache in caches] == [None] * 3
    finally:
        gc.enable()


def test_a_row_that_met_a_stop_string_is_not_lost(
    make_policy: Callable[..., Policy], runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out where the others move together."""
    policy = make_policy()
    tokenizer = policy.text_tokenizer
    prompts = policy.encode(["red dog", "blue", "green cat runs", "old tree"])
    free = decode(policy.model, prompts, max_new_tokens=48, sampling=SamplingParams(seed=2))
    text = tokenizer.decode(free.token_ids[1].tolist())
    stop = StopRule.of(
        None, stop=text[20:22], tokenizer=tokenizer, vocab_size=policy.model.config.vocab_size
    )

    def run(**options: Any) -> Completions:
        return decode(
            policy.model,
            prompts,
            max_new_tokens=48,
            sampling=SamplingParams(seed=2),
            stop=stop,
            **options,
        )

    whole = run()
    assert 0 < int(whole.has_eos.sum()) < 4
    kept: list[Any] = []
    keep = runner.keep

    def failing(it: Any, rows: Any) -> None:
        kept.append(rows)
        if len(kept) == 1:
            raise MemoryError
        keep(it, rows)

    monkeypatch.setattr(runner, "keep", failing)
    finished: list[int] = []
    out = run(on_completion=lambda completion: finished.append(completion.index))
    assert kept
    assert sorted(finished) == [0, 1, 2, 3]
    assert_same(out, whole)


@pytest.mark.skipif(why_not_measured("cpu") is not None, reason="needs /proc")
def test_a_thousand_requests_leave_nothing(model: LanguageModel) -> None:
    eos = frequent_token(
        model, PROMPTS, max_new_tokens=8, sampling=SAMPLINGS["cool"], num_samples=10
    )

    def run() -> None:
        decode(
            model,
            PROMPTS,
            max_new_tokens=8,
            sampling=SAMPLINGS["cool"],
            num_samples=10,
            num_slots=16,
            eos_token_id=eos,
            keep_before=1,
        )

    num_calls = 1000 // (10 * len(PROMPTS))
    assert growth_bytes("cpu", run, num_calls) < 1 << 20

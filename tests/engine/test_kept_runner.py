"""A runner that waits for the next rollout: when it suits, when it must not, and that it is gone
when memory is short. The device is simulated (late_device.py); test_gpu_rollout.py has a real one.
"""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from late_device import LateRunner, use_late_device
from rollout_cases import assert_same, completions_of, options_of, requests_of

from fuserl.model.cache import CacheShape
from fuserl.model.heads import LanguageModel
from fuserl.rollout import engine, module_runner
from fuserl.rollout.engine import generate
from fuserl.rollout.kept_runner import RolloutMemory
from fuserl.rollout.memory import is_out_of_memory
from fuserl.rollout.module_runner import ModuleRunner
from fuserl.rollout.runner import RunnerOptions

MakeModel = Callable[..., LanguageModel]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[LateRunner]:
    """The runners made so far. Products read the weights themselves, as on a device."""
    monkeypatch.setattr(module_runner, "_can_pack", lambda model: False)
    return use_late_device(monkeypatch)


@torch.no_grad()
def nudge(model: LanguageModel) -> None:
    """What an optimizer does: the weights change where they are."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_a_cpu_keeps_nothing(make_model: MakeModel) -> None:
    memory = RolloutMemory()
    completions_of(make_model(), requests_of(2, (5,)), options_of(), memory=memory)
    assert memory.kept is None


def test_one_runner_serves_rollouts_across_optimizer_steps(
    make_model: MakeModel, made: list[LateRunner]
) -> None:
    model, memory, options = make_model(seed=2), RolloutMemory(), options_of(7, 8, 9)
    requests, fewer = requests_of(5, (9, 20)), requests_of(3, (11,))
    first = completions_of(model, requests, options, memory=memory)
    for wanted in (requests, fewer, requests):
        nudge(model)
        got = completions_of(model, wanted, options, memory=memory)
        assert memory.kept is made[0]
        assert_same(got, completions_of(model, wanted, options))
    assert made.count(made[0]) == 1
    assert len(made) == 1 + 3  # those of the comparison stay with nobody
    assert not torch.equal(got[0].token_ids, first[0].token_ids)


def longer(model: LanguageModel) -> dict[str, Any]:
    return {"requests": requests_of(5, (21,))}


def more(model: LanguageModel) -> dict[str, Any]:
    return {"requests": requests_of(6, (9, 20))}


def other_sampling(model: LanguageModel) -> dict[str, Any]:
    return {"options": options_of(7, temperature=0.5)}


def moved(model: LanguageModel) -> dict[str, Any]:
    model.trunk.norm.weight.data = model.trunk.norm.weight.data.clone()
    return {}


def another_model(model: LanguageModel) -> dict[str, Any]:
    other = LanguageModel(model.config)
    other.load_state_dict(model.state_dict())
    return {"model": other}


@pytest.mark.parametrize("change", [longer, more, other_sampling, moved, another_model])
def test_what_does_not_suit_is_made_anew(
    change: Callable[[LanguageModel], dict[str, Any]],
    make_model: MakeModel,
    made: list[LateRunner],
) -> None:
    memory = RolloutMemory()
    given = {
        "model": make_model(seed=2),
        "requests": requests_of(5, (9, 20)),
        "options": options_of(7),
    }
    completions_of(**given, memory=memory)
    given |= change(given["model"])
    got = completions_of(**given, memory=memory)
    assert len(made) == 2
    assert memory.kept is made[1]
    assert_same(got, completions_of(**given))


def test_fewer_slots_than_asked_for_are_kept_when_memory_had_no_more(
    make_model: MakeModel, made: list[LateRunner]
) -> None:
    model, memory, options = make_model(seed=2), RolloutMemory(), options_of(7)
    requests = requests_of(6, (9, 20), samples=1)
    config = model.config
    room = CacheShape(num_slots=3, capacity=20, num_prompts=3, prompt_capacity=5)
    budget = room.num_bytes(config, torch.float32)
    for _ in range(2):
        completions_of(model, requests, options, memory=memory, kv_budget_bytes=budget)
    assert [runner.rows.slots.shape[0] for runner in made] == [3]


def test_a_budget_is_that_of_its_call(make_model: MakeModel, made: list[LateRunner]) -> None:
    """Less room than the call before had, and more."""
    model, memory, options = make_model(seed=2), RolloutMemory(), options_of(7)
    requests = requests_of(6, (9, 20), samples=1)
    completions_of(model, requests, options, memory=memory)
    budget = made[0].cache_bytes // 2
    for given in (budget, None):
        completions_of(model, requests, options, memory=memory, kv_budget_bytes=given)
    assert made[1].cache_bytes <= budget
    assert [len(runner.rows.slots) for runner in made[::2]] == [6, 6]


def test_a_runner_that_is_out_is_not_lent_twice(
    make_model: MakeModel, made: list[LateRunner]
) -> None:
    model, memory, options = make_model(seed=2), RolloutMemory(), options_of(7)
    requests = requests_of(4, (9, 20))
    want = completions_of(model, requests, options, memory=memory)
    both = [generate(model, requests, options, memory=memory, num_slots=2) for _ in range(2)]
    got: list[dict[int, Any]] = [{}, {}]
    for pair in zip(*both, strict=True):
        for found, completion in zip(got, pair, strict=True):
            found[completion.index] = completion
    for found in got:
        assert found.keys() == want.keys()
        for index, completion in found.items():
            assert torch.equal(completion.token_ids, want[index].token_ids)


def test_an_abandoned_rollout_leaves_nothing(make_model: MakeModel, made: list[LateRunner]) -> None:
    model, memory, options = make_model(seed=2), RolloutMemory(), options_of(7)
    rollout = generate(model, requests_of(4, (9, 20)), options, memory=memory)
    next(rollout)
    rollout.close()
    assert memory.kept is None
    want = completions_of(model, requests_of(2, (9,)), options)
    assert_same(completions_of(model, requests_of(2, (9,)), options, memory=memory), want)


def test_release_gives_the_runner_up(make_model: MakeModel, made: list[LateRunner]) -> None:
    model, memory = make_model(seed=2), RolloutMemory()
    completions_of(model, requests_of(2, (9,)), options_of(), memory=memory)
    alive = weakref.ref(made.pop())
    assert alive() is memory.kept is not None
    memory.release()
    assert alive() is None


def test_tables_that_graphs_read_stay(make_model: MakeModel, made: list[LateRunner]) -> None:
    """A longer sequence elsewhere makes the table anew; the old one goes with its graphs."""
    model, memory = make_model(seed=2), RolloutMemory()
    table = model.trunk.layers[0].attn.table  # type: ignore[union-attr]
    requests = requests_of(2, (9,))
    tables = []
    for num_positions in (600, 3000, 9000):
        completions_of(model, requests, options_of(), memory=memory)
        tables.append(weakref.ref(table.upto(1, model.device)[0]))
        table.upto(num_positions, model.device)
    assert [cosines() is None for cosines in tables] == [False, False, False]
    made.clear()
    memory.release()
    assert [cosines() is None for cosines in tables] == [True, True, True]


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Memory must come back without the collector's help, which may be long in coming."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class OnceShort(LateRunner):
    """Runs out of memory after its third replay, if it has more than two slots."""

    def run(self, max_steps: int, enough: int) -> list[Any]:
        if len(self.rows.slots) > 2 and len(self.graphs.sizes) >= 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return super().run(min(max_steps, 4), enough)


@pytest.mark.usefixtures("no_collection")
def test_out_of_memory_goes_on_with_half_and_remembers(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, made: list[LateRunner]
) -> None:
    model, memory, options = make_model(seed=2), RolloutMemory(), options_of(7)
    requests = requests_of(8, (3, 9, 20), samples=1)
    want = completions_of(model, requests, options)
    alive: list[weakref.ref[ModuleRunner]] = []

    def make(model: LanguageModel, shape: CacheShape, options: RunnerOptions) -> OnceShort:
        assert all(runner() is None for runner in alive), "a dead runner still holds its memory"
        runner = OnceShort(model, shape, options)
        alive.append(weakref.ref(runner))
        return runner

    monkeypatch.setattr(engine, "make_runner", lambda model: make)
    got = completions_of(model, requests, options, memory=memory)
    for index, completion in want.items():  # plain products may sum in another order
        assert torch.equal(got[index].token_ids, completion.token_ids)
    assert len(alive) == 3
    assert memory.num_slots == 2
    completions_of(model, requests, options, memory=memory)
    assert len(alive) == 3, "the next rollout must not try what failed"


@pytest.mark.usefixtures("made")
def test_a_runner_that_cannot_be_made_is_halved_down_to_one(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def make(model: LanguageModel, shape: CacheShape, options: RunnerOptions) -> ModuleRunner:
        tried.append(shape.num_slots)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "make_runner", lambda model: make)
    with pytest.raises(torch.OutOfMemoryError):
        completions_of(make_model(), requests_of(7, (9,), samples=1), options_of())
    assert tried == [7, 3, 1]


def test_what_running_out_of_memory_is() -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))
    assert not is_out_of_memory(ValueError("out of memory"))
    later = RuntimeError("the capture was invalidated")
    later.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_out_of_memory(later)

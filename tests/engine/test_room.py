"""A phase that runs out of memory beside a kept rollout: what is released, what is done twice, and
what never is."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from late_device import LateRunner, use_late_device
from rollout_cases import assert_same, completions_of, options_of, requests_of

import fuserl_kernels as fk
from fuserl import scoring, update
from fuserl.config import RLConfig
from fuserl.model.heads import LanguageModel
from fuserl.optimizer import Optimizer
from fuserl.policy import Policy
from fuserl.rewards import once
from fuserl.rollout import kept_runner, module_runner
from fuserl.rollout.kept_runner import KEPT_SHARE, RolloutMemory
from fuserl.rollout.room import with_room
from fuserl.stages.opening import open_policy
from fuserl.stages.rl import RLTrainer

MakeModel = Callable[..., LanguageModel]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[LateRunner]:
    monkeypatch.setattr(module_runner, "_can_pack", lambda model: False)
    return use_late_device(monkeypatch)


@pytest.fixture
def memory(make_model: MakeModel, made: list[LateRunner]) -> RolloutMemory:
    """One that keeps a runner."""
    memory = RolloutMemory()
    completions_of(make_model(seed=2), requests_of(3, (9,)), options_of(), memory=memory)
    assert memory.kept is made[0]
    return memory


@pytest.fixture
def rl_config() -> RLConfig:
    return RLConfig(model="m", data="d", out="o")


class Short:
    """A phase that runs out of memory a few times."""

    def __init__(self, times: int, error: Exception | None = None) -> None:
        self.times, self.calls = times, 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory")

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return "done"


def test_a_phase_with_room_leaves_the_runner(memory: RolloutMemory) -> None:
    kept, phase = memory.kept, Short(0)
    assert with_room(memory, "scoring", phase) == "done"
    assert phase.calls == 1
    assert memory.kept is kept


def test_a_short_phase_begins_again_without_the_runner(
    memory: RolloutMemory, caplog: pytest.LogCaptureFixture
) -> None:
    phase = Short(1)
    with caplog.at_level(logging.WARNING):
        assert with_room(memory, "scoring", phase) == "done"
    assert phase.calls == 2
    assert memory.kept is None
    assert memory._share == KEPT_SHARE / 2
    assert "out of memory in scoring" in caplog.text


@pytest.mark.parametrize(
    ("times", "error"), [(2, None), (1, ValueError("no")), (1, RuntimeError("device assert"))]
)
def test_what_room_does_not_help_goes_on(
    memory: RolloutMemory, times: int, error: Exception | None
) -> None:
    phase = Short(times, error)
    with pytest.raises(type(phase.error)):
        with_room(memory, "scoring", phase)
    assert phase.calls == times
    assert (memory.kept is None) == (error is None)


def test_what_the_caller_handles_says_nothing_of_a_phase(memory: RolloutMemory) -> None:
    """Training again, smaller, from within the handler of an error of memory."""
    for error, times in ((RuntimeError("device assert"), 1), (torch.OutOfMemoryError("CUDA"), 2)):
        assert memory.kept is not None
        phase = Short(1, error)
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError:
            if times == 2:
                assert with_room(memory, "scoring", phase) == "done"
            else:
                with pytest.raises(RuntimeError, match="device assert"):
                    with_room(memory, "scoring", phase)
        assert phase.calls == times


def test_nothing_kept_is_no_reason_to_begin_again() -> None:
    phase = Short(1)
    with pytest.raises(torch.OutOfMemoryError):
        with_room(RolloutMemory(), "scoring", phase)
    assert phase.calls == 1


def test_what_changed_weights_does_not_begin_again(
    memory: RolloutMemory, caplog: pytest.LogCaptureFixture
) -> None:
    phase = Short(1)
    with caplog.at_level(logging.ERROR), pytest.raises(torch.OutOfMemoryError):
        with_room(memory, "the update", phase, begin_again=lambda: False)
    assert phase.calls == 1
    assert "cannot begin again" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_undone_and_steps_are_not(
    make_model: MakeModel, rl_config: RLConfig, dtype: torch.dtype
) -> None:
    model = make_model(seed=2).to(dtype)
    optimizer = Optimizer({"policy": model}, rl_config, total_steps=3)

    def backward() -> None:
        sum(p.float().square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]

    backward()
    assert optimizer.undo_since(0)
    assert all(parameter.grad is None for parameter in model.parameters())
    backward()
    optimizer.step()
    assert not optimizer.undo_since(0)
    assert optimizer.undo_since(1)


def test_a_reward_is_asked_once() -> None:
    calls: list[Any] = []

    def reward(batch: Any, prompts: Any) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.ones(2)

    known = once(reward)
    with pytest.raises(torch.OutOfMemoryError):
        known("batch", [])  # type: ignore[arg-type]
    for _ in range(3):
        assert known("batch", []).tolist() == [1.0, 1.0]  # type: ignore[arg-type]
    assert len(calls) == 2, "an error is no score"


@pytest.mark.usefixtures("made")
def test_a_step_that_runs_out_of_memory_once_is_the_same_step(
    make_policy: Callable[..., Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first step's scoring, and in the second's update behind its first backward pass."""
    asked: list[int] = []

    def reward(*, completions: list[str], **_: Any) -> list[float]:
        asked.append(len(completions))
        return [float(len(text)) for text in completions]

    def train(name: str) -> dict[str, torch.Tensor]:
        policy = make_policy(seed=1)
        options: dict[str, Any] = {"steps": 2, "batch_size": 4, "max_new_tokens": 6}
        options |= {"num_samples": 2, "microbatch_size": 2, "kl_coef": 0.05}
        rows = [{"prompt": f"the dog {i}"} for i in range(4)]
        out = tmp_path / name
        RLTrainer(policy, data=rows, reward=reward, out=out, algorithm="grpo", **options).train()
        return policy.model.state_dict()

    want = train("whole")
    whole, asked[:] = list(asked), []
    short = {"completion_logprobs": 0, "linear_policy_loss": 0}

    def shorten(module: Any, name: str, function: Callable[..., Any], at: int) -> None:
        def once_short(*args: Any, **kwargs: Any) -> Any:
            short[name] += 1
            if short[name] == at:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, once_short)

    monkeypatch.setattr(update, "fk", SimpleNamespace(**vars(fk)))  # its view of the ops
    shorten(scoring, "completion_logprobs", scoring.completion_logprobs, at=2)
    shorten(update.fk, "linear_policy_loss", fk.linear_policy_loss, at=6)
    got = train("short")
    assert short == {"completion_logprobs": 8 + 2, "linear_policy_loss": 8 + 2}
    assert asked == whole, "the reward is not asked again"
    for name, weight in want.items():
        assert torch.equal(got[name], weight), name


# --- what a policy keeps


@pytest.fixture
def on_late_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that takes its device for one that keeps."""
    monkeypatch.setattr(Policy, "_keeps", property(lambda self: True))


@pytest.mark.usefixtures("on_late_cuda")
def test_a_policy_keeps_its_runner_until_it_is_released(
    make_policy: Callable[..., Policy], made: list[LateRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_runner, "free_bytes", lambda device: 1 << 40)
    policy = make_policy(seed=1)
    prompts = [[5, 6, 7], [8]]
    first = policy.generate(prompts, max_new_tokens=6, n=2)
    assert policy.generate(prompts, max_new_tokens=6, n=2).token_ids == first.token_ids
    assert len(made) == 1
    list(policy.stream(prompts, max_new_tokens=4))
    assert len(made) == 1, "a shorter call fits into the same cache"
    policy.release()
    assert policy.generate(prompts, max_new_tokens=6, n=2).token_ids == first.token_ids
    assert len(made) == 2


@pytest.mark.usefixtures("on_late_cuda")
def test_a_policy_keeps_no_cache_that_leaves_others_little_room(
    make_policy: Callable[..., Policy], made: list[LateRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, prompts = make_policy(seed=1), [[5, 6, 7], [8]]
    policy.generate(prompts, max_new_tokens=6)
    needed = made[0].cache_bytes
    policy.release()
    for free, stays in ((needed / KEPT_SHARE + 1, True), (needed / KEPT_SHARE - 1, False)):
        monkeypatch.setattr(kept_runner, "free_bytes", lambda device, free=free: free)
        before = len(made)
        for _ in range(2):
            policy.generate(prompts, max_new_tokens=6)
        assert len(made) - before == (1 if stays else 2)
        policy.release()


@pytest.mark.usefixtures("made", "on_late_cuda")
def test_training_begins_with_the_memory_of_a_policy(
    make_policy: Callable[..., Policy], rl_config: RLConfig
) -> None:
    policy = make_policy(seed=1)
    policy.generate([[5, 6]], max_new_tokens=4)
    assert policy._rollouts.kept is not None
    assert open_policy(rl_config, policy) is policy
    assert policy._rollouts.kept is None


def test_a_copy_keeps_nothing(memory: RolloutMemory, make_model: MakeModel) -> None:
    twin = copy.deepcopy(memory)
    assert twin.kept is None
    assert memory.kept is not None
    model, requests = make_model(seed=2), requests_of(3, (9,))
    want = completions_of(model, requests, options_of())
    assert_same(completions_of(model, requests, options_of(), memory=twin), want)

"""What a process may have done before, around or during a rollout, and what must not matter."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from fuserl.model.cache import CacheShape
from fuserl.model.heads import LanguageModel
from fuserl.rollout.decode import Completions, decode
from fuserl.rollout.engine import generate, make_runner
from fuserl.rollout.module_runner import ModuleRunner
from fuserl.rollout.native_runner import NativeRunner, why_not
from fuserl.rollout.requests import PromptRequest
from fuserl.rollout.runner import RunnerOptions
from fuserl.rollout.sampling import SamplingParams
from fuserl.rollout.stopping import StopRule
from fuserl_kernels import native

PROMPTS = [[5, 9, 3], [8], [12, 4, 6, 9]]
REQUESTS = [
    PromptRequest(ids=ids, max_new_tokens=30, request_ids=[2 * i, 2 * i + 1])
    for i, ids in enumerate(PROMPTS)
]
SHAPE = CacheShape(num_slots=2, capacity=4, num_prompts=2, prompt_capacity=4)
OPTIONS = RunnerOptions(sampling=SamplingParams(seed=4), stop=StopRule())

MakeModel = Callable[..., LanguageModel]

needs_native = pytest.mark.skipif(
    native.why_absent() is not None, reason="the decode loop in C++ is not compiled"
)


def sample(model: LanguageModel, **options: Any) -> Completions:
    given = {"max_new_tokens": 12, "num_samples": 2, "sampling": SamplingParams(seed=4)}
    return decode(model, PROMPTS, **{**given, **options})


def assert_same(found: Completions, expected: Completions) -> None:
    assert torch.equal(found.token_ids, expected.token_ids)
    assert torch.equal(found.logprobs, expected.logprobs)
    assert torch.equal(found.truncated_logprobs, expected.truncated_logprobs)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("runner", ["native", "modules"])
def test_the_default_dtype(
    make_model: MakeModel, dtype: torch.dtype, runner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if runner == "modules":
        monkeypatch.setattr("fuserl.rollout.native_runner.why_not", lambda model: "asked for")
    model = make_model(seed=3)
    expected = sample(model)
    with default_dtype(dtype):
        assert_same(sample(model), expected)


@needs_native
def test_the_default_device(make_model: MakeModel) -> None:
    model = make_model(seed=3)
    expected = sample(model, eos_token_id=7)
    with torch.device("meta"):  # what takes addresses must say where they are
        made = NativeRunner(model, SHAPE, OPTIONS)
    assert made.rows.logprobs.device.type == "cpu"
    assert_same(sample(model, eos_token_id=7), expected)


@needs_native
@pytest.mark.parametrize("part", ["norm", "head", "embedding"])
def test_weights_that_are_not_alike_take_the_modules(make_model: MakeModel, part: str) -> None:
    model = make_model(seed=3, tie_embeddings=False)
    assert make_runner(model) is NativeRunner
    if part == "norm":
        model.to(torch.bfloat16).trunk.norm.float()
    elif part == "head":
        model.lm_head.to(torch.bfloat16)
    else:
        weight = model.trunk.embed_tokens.weight
        model.trunk.embed_tokens.weight = nn.Parameter(weight.detach().t().contiguous().t())
    assert make_runner(model) is ModuleRunner
    reason = why_not(model)
    assert reason is not None
    assert {"norm": "norm", "head": "lm_head", "embedding": "embed_tokens"}[part] in reason


@needs_native
def test_weights_that_move_or_change_on_the_way_are_noticed(make_model: MakeModel) -> None:
    model = make_model(seed=3)
    open_stream = generate(model, REQUESTS, OPTIONS, num_slots=2)
    next(open_stream)
    with torch.no_grad():
        model.trunk.norm.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match=r"trunk\.norm\.weight changed while a rollout"):
        list(open_stream)
    open_stream = generate(model, REQUESTS, OPTIONS, num_slots=2)
    next(open_stream)
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="changed while a rollout was under way"):
        list(open_stream)


@pytest.mark.parametrize("inside", [True, False])
def test_inference_mode_may_begin_and_end(make_model: MakeModel, inside: bool) -> None:
    model = make_model(seed=3)
    expected = {c.index: c.token_ids for c in generate(model, REQUESTS, OPTIONS, num_slots=2)}
    with torch.inference_mode(inside):
        stream = generate(model, REQUESTS, OPTIONS, num_slots=2)
        found = [next(stream)]
    with torch.inference_mode(not inside):
        found += list(stream)
    assert len(found) == len(expected)
    assert all(torch.equal(c.token_ids, expected[c.index]) for c in found)


def test_errors_of_the_caller_are_no_shortage_of_memory(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    model, asked = make_model(seed=3), []

    def on_step() -> None:
        asked.append(1)
        raise MemoryError("of the caller's own")

    with pytest.raises(MemoryError, match="of the caller's own"):
        sample(model, on_step=on_step)
    assert len(asked) == 1

    def fail() -> None:
        asked.append(1)
        raise RuntimeError("unrelated")

    try:
        raise MemoryError("handled outside")
    except MemoryError:
        with pytest.raises(RuntimeError, match="unrelated"):
            sample(model, on_step=fail)
    assert len(asked) == 2
    assert "out of memory" not in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
        ({"num_slots": -1}, "num_slots must be at least 1, got -1"),
        ({"request_ids": [1, 2]}, "request_ids has 2 entries for 6 completions"),
    ],
)
def test_arguments_are_checked(make_model: MakeModel, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(make_model(seed=3), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, r"seed must be in \[0, 2\^63\), got -1"),
        ({"seed": 2**63}, r"seed must be in \[0, 2\^63\)"),
        ({"temperature": float("inf")}, "temperature must be finite"),
        ({"temperature": float("nan")}, "temperature must be finite"),
    ],
)
def test_sampling_rules_are_checked(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)

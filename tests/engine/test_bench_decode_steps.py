"""The benchmark of decode steps, on a CPU with a tiny shape: what it counts, keeps and refuses."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from fuserl.bench import decode_steps
from fuserl.bench.decode_steps import MODELS, NUM_STEPS, StepCase, floor_ms, run_case, step_cases
from fuserl.bench.timing import Ceilings
from fuserl.model.heads import LanguageModel
from fuserl.rollout.module_runner import ModuleRunner

H200 = Ceilings(4.3e12, 790e12, "bf16")  # as in the notes on generation's limits
TINY = StepCase(
    model="tiny", num_rows=3, prompt_length=8, contexts=(8, 20), dtype="fp32", device="cpu"
)


def weights_of(name: str) -> int:
    with torch.device("meta"):
        model = LanguageModel(MODELS[name])
    untied = 0 if MODELS[name].tie_embeddings else model.trunk.embed_tokens.weight.numel()
    return sum(parameter.numel() for parameter in model.parameters()) - untied


@pytest.mark.parametrize(
    ("name", "billions", "tokens_per_second"),
    [
        ("Qwen3-0.6B", 0.6, {64: 31_600, 256: 34_700}),
        ("Qwen2.5-1.5B", 1.54, {64: 55_400, 256: 93_100}),
        ("Llama-3-8B", 7.5, {64: 11_700, 256: 19_900}),
    ],
)
def test_the_limit_is_that_of_the_formula(
    name: str, billions: float, tokens_per_second: dict[int, int]
) -> None:
    """Against figures computed apart: prompt 512, response 1024, so 1024 tokens on average."""
    num_weights = weights_of(name)
    assert num_weights / 1e9 == pytest.approx(billions, rel=0.03)
    for num_rows, expected in tokens_per_second.items():
        limit = 1e3 * num_rows / floor_ms(MODELS[name], num_weights, num_rows, 1024, H200)
        assert limit == pytest.approx(expected, rel=0.01)


def test_it_times_steps_of_all_rows_at_each_context(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    run = ModuleRunner.run

    def watched(self: ModuleRunner, max_steps: int, enough: int) -> Any:
        assert max_steps == NUM_STEPS
        lengths.append(int(self.rows.lengths[0]))
        ended = run(self, max_steps, enough)
        assert self.rows.lengths.tolist() == [lengths[-1] + NUM_STEPS] * 3
        return ended

    monkeypatch.setattr(ModuleRunner, "run", watched)
    report = run_case(TINY, H200, 60)
    assert set(lengths) == {0, 12}
    assert [result.context for result in report.results] == [8, 20]
    for result in report.results:
        assert result.num_rows == 3
        assert len(result.samples_ms) >= decode_steps.MIN_ROUNDS
        assert min(result.samples_ms) > 0
        assert 0 < result.share_of_limit < 1
    content = json.loads(json.dumps(report.to_json()))
    assert content["case"]["model"] == "tiny"
    assert content["results"][1]["tokens_per_second"] == pytest.approx(
        3e3 / content["results"][1]["median_ms"]
    )
    assert "| 20 | 3 |" in report.table()


def test_as_many_rows_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MODELS["tiny"]
    tokens = 8 + 12 + NUM_STEPS
    row_bytes = 2 * 4 * config.num_layers * config.num_kv_heads * config.head_dim * tokens
    monkeypatch.setattr(decode_steps, "free_bytes", lambda device: int(2 * 5.5 * row_bytes))
    report = run_case(replace(TINY, num_rows=None), H200, 60)
    assert {result.num_rows for result in report.results} == {5}
    assert report.cache_bytes == 5 * row_bytes
    monkeypatch.undo()
    report = run_case(replace(TINY, num_rows=None, most_rows=7), H200, 60)
    assert {result.num_rows for result in report.results} == {7}


def test_what_does_not_fit_says_so_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    go_to = decode_steps.Steps.go_to

    def failing(self: decode_steps.Steps, context: int) -> None:
        if context == 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        go_to(self, context)

    monkeypatch.setattr(decode_steps.Steps, "go_to", failing)
    report = run_case(TINY, H200, 60)
    assert [bool(result.samples_ms) for result in report.results] == [True, False]
    assert "20 tokens: not timed, out of memory" in report.table()
    assert len(report.to_json()["results"]) == 2

    def broken(self: decode_steps.Steps, context: int) -> None:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(decode_steps.Steps, "go_to", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        run_case(TINY, H200, 60)


def test_the_budget_bounds_the_rounds() -> None:
    report = run_case(TINY, H200, 0)
    assert [len(r.samples_ms) for r in report.results] == [decode_steps.MIN_ROUNDS] * 2


def test_the_cases_are_real_shapes() -> None:
    cases = step_cases()
    assert len({case.title for case in cases}) == len(cases) == 12
    assert {case.num_rows for case in cases} == {1, 64, 256, None}
    assert all(case.contexts == (512, 1024, 1536) for case in cases)
    with pytest.raises(ValueError, match=r"contexts must be at least prompt_length \(512\), got 8"):
        StepCase(model="tiny", num_rows=1, contexts=(8,))


def test_waits_are_told_from_what_only_looks_like_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        def __init__(self, name: str) -> None:
            self.name = name

    class Profile:
        def __init__(self, activities: Any) -> None: ...

        def __enter__(self) -> "Profile":
            return self

        def __exit__(self, *_: object) -> None: ...

        def events(self) -> list[Event]:
            names = "cudaLaunchKernel cudaStreamSynchronize cudaMemcpyAsync cuda_kernel aten::add"
            at_the_end = "cudaDeviceSynchronize"
            return [
                Event(n) for n in (*names.split(), "Memcpy DtoH (Device -> Pinned)", at_the_end)
            ]

    monkeypatch.setattr(decode_steps, "profile", Profile)
    with decode_steps.counted_waits() as found:
        pass
    assert (found.num_calls, found.num_waits, found.num_copies_to_host) == (4, 1, 1)

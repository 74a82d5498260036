"""The rollout benchmark: its requests, its truth, who is refused, and what it tells."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fuserl import cli
from fuserl.bench import rollout
from fuserl.bench.memory import why_not_measured
from fuserl.bench.output import WrongAnswer
from fuserl.bench.rivals import Unavailable
from fuserl.bench.rollout import RolloutReport, RolloutResult, cases_of, check, run_case
from fuserl.bench.rollout_problem import (
    MODELS,
    WORKLOADS,
    Completions,
    RolloutCase,
    RolloutProblem,
    Workload,
    make_limits,
    make_prompts,
)
from fuserl.bench.rollout_providers import BASELINE, OURS, PROVIDERS, FuserlGenerator
from fuserl.bench.shapes import SHAPES
from fuserl.bench.timing import Ceilings
from fuserl.config import BenchConfig
from fuserl.model.families import FAMILIES

pytest.importorskip("transformers", reason="the benchmark's rival is not installed")

REQUESTS = {
    "uniform": Workload(num_requests=6, prompt_length=9, max_new_tokens=7),
    # More than a batch of `generate`.
    "ragged": Workload(num_requests=40, prompt_length=9, max_new_tokens=12, median_new_tokens=4),
}


def tiny(workload: str = "ragged", dtype: str = "fp32") -> RolloutCase:
    return RolloutCase(
        model="tiny", workload=workload, requests=REQUESTS[workload], dtype=dtype, device="cpu"
    )


@pytest.fixture(scope="module")
def problem() -> RolloutProblem:
    return RolloutProblem(tiny())


@pytest.fixture
def _no_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring them takes seconds."""
    monkeypatch.setattr(rollout, "measure_ceilings", lambda *_: Ceilings(1e9, 1e9, "fp32"))


def test_limits_are_equal_or_log_normal() -> None:
    assert make_limits(WORKLOADS["uniform"]) == [128] * 32
    limits = make_limits(WORKLOADS["ragged"])
    assert limits == make_limits(WORKLOADS["ragged"])
    assert len(limits) == 64
    assert min(limits) >= 1
    assert max(limits) <= 256
    assert 30 < sorted(limits)[32] < 75
    assert max(limits) > 8 * min(limits)


def test_prompts_are_seeded_and_within_the_vocabulary() -> None:
    prompts = make_prompts(WORKLOADS["uniform"], 4096)
    assert prompts == make_prompts(WORKLOADS["uniform"], 4096)
    assert {len(prompt) for prompt in prompts} == {64}
    assert 4000 < max(map(max, prompts)) < 4096


def test_the_floor_counts_every_product_once(problem: RolloutProblem) -> None:
    sizes = MODELS["tiny"]
    layer = 4 * sizes.hidden_size**2 + 3 * sizes.hidden_size * sizes.intermediate_size
    head = sizes.hidden_size * sizes.vocab_size
    tokens = 40 * 9 + sum(problem.limits)
    assert problem.num_flops == 2 * (2 * layer * tokens + head * sum(problem.limits))
    assert problem.kv_bytes(10) == 10 * 2 * 2 * sizes.hidden_size * 4


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("workload", list(REQUESTS))
def test_every_provider_is_right(dtype: str, workload: str) -> None:
    problem = RolloutProblem(tiny(workload, dtype))
    for name, make in PROVIDERS.items():
        result, generator = check(problem, name, make)
        assert not result.reason
        assert generator is not None
        assert result.greedy_error is not None
        assert (result.logprob_error is None) == (name == "generate-tokens")
        assert (result.kv_bytes or 0) > 0 or name == OURS
        if dtype == "fp32":
            assert result.greedy_error < 1e-5
            assert (result.logprob_error or 0) < 1e-5


@pytest.mark.parametrize("name", list(SHAPES))
def test_real_shapes_go_to_the_rivals_as_their_own_family(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published switches at a size a CPU can judge."""
    small = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_layers": 2}
    small |= {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    monkeypatch.setitem(MODELS, name, dataclasses.replace(SHAPES[name], **small))
    problem = RolloutProblem(dataclasses.replace(tiny(), model=name))
    assert type(problem.source).__name__ == FAMILIES[SHAPES[name].family].language_model
    layers = 2 * (32 * (2 * 32 + 2 * 16) + 3 * 32 * 64)
    tokens = problem.num_prompt_tokens + problem.num_new_tokens
    assert problem.num_flops == 2 * (layers * tokens + 32 * 128 * problem.num_new_tokens)
    for provider, make in PROVIDERS.items():
        result, _ = check(problem, provider, make)
        assert not result.reason


def test_a_model_too_large_for_float64_is_judged_in_what_fits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for room, dtype in ((8, "float64"), (4, "float32"), (1, "bfloat16")):
        problem = RolloutProblem(tiny(dtype="bf16"))
        numbers = sum(parameter.numel() for parameter in problem.source.parameters())
        monkeypatch.setattr(RolloutProblem, "_room", room * numbers)
        assert problem.truth_dtype == dtype


def test_greedy_tokens_are_the_same_whoever_draws_them(problem: RolloutProblem) -> None:
    """Prompts of one token and more, so that rows are padded where padding is done."""
    lengths = [len(prompt) for prompt in problem.greedy_prompts]
    assert (min(lengths), max(lengths)) == (1, 9)
    drawn = {
        name: make(problem).generate(problem.greedy_prompts, problem.greedy_limits, greedy=True)
        for name, make in PROVIDERS.items()
    }
    for name, found in drawn.items():
        assert found.token_ids == drawn[OURS].token_ids, name


def test_what_is_wrong_has_an_error(problem: RolloutProblem) -> None:
    ours = FuserlGenerator(problem)
    right = ours.generate(problem.prompts, problem.limits)
    assert problem.sampling_error(right) < 1e-5
    assert right.logprobs is not None
    shifted = [[value + 0.01 for value in row] for row in right.logprobs]
    error = problem.sampling_error(Completions(right.token_ids, shifted))
    assert error == pytest.approx(0.01, rel=0.01)
    short = [row[:-1] for row in right.token_ids]
    assert problem.sampling_error(Completions(short, None)) == math.inf
    broken = [[math.nan] * len(row) for row in right.logprobs]
    assert problem.sampling_error(Completions(right.token_ids, broken)) == math.inf
    greedy = ours.generate(problem.greedy_prompts, problem.greedy_limits, greedy=True)
    other = [[(token + 1) % 128 for token in row] for row in greedy.token_ids]
    assert problem.greedy_error(Completions(other, None)) > 0.1


def test_greedy_tokens_are_no_fair_draw() -> None:
    requests = Workload(num_requests=16, prompt_length=9, max_new_tokens=40)
    problem = RolloutProblem(dataclasses.replace(tiny(), requests=requests))
    ours = FuserlGenerator(problem)
    fair = ours.generate(problem.prompts, problem.limits)
    assert problem.sampling_error(fair) < 1e-5
    greedy = ours.generate(problem.prompts, problem.limits, greedy=True)
    assert problem.sampling_error(greedy) == math.inf


def test_a_wrong_answer_of_ours_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FuserlGenerator.generate

    def off(self: FuserlGenerator, *args: Any, **options: Any) -> Completions:
        found = right(self, *args, **options)
        assert found.logprobs is not None
        return Completions(found.token_ids, [[0.0] * len(row) for row in found.logprobs])

    monkeypatch.setattr(FuserlGenerator, "generate", off)
    with pytest.raises(WrongAnswer, match=r"nothing was timed, because fuserl: its greedy tokens"):
        run_case(tiny("uniform"), 1, 1.0)


class _Absent:
    def __init__(self, problem: RolloutProblem) -> None:
        raise Unavailable("it is not installed")


class _Broken(FuserlGenerator):
    def generate(
        self, prompts: Sequence[list[int]], limits: Sequence[int], *, greedy: bool = False
    ) -> Completions:
        raise RuntimeError("no memory\nmore of it")


@pytest.mark.usefixtures("_no_ceilings")
def test_a_rival_that_cannot_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("continuous", "generate-tokens"):
        monkeypatch.delitem(PROVIDERS, name)
    monkeypatch.setitem(PROVIDERS, "absent", _Absent)
    monkeypatch.setitem(PROVIDERS, "broken", _Broken)
    report = run_case(tiny("uniform"), 1, 0.01)
    assert {result.provider for result in report.timed()} == {OURS, BASELINE}
    assert "absent: not timed, it is not installed" in report.table()
    assert "broken: not timed, RuntimeError: no memory" in report.table()


@pytest.mark.usefixtures("_no_ceilings")
def test_the_command_writes_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rollout, "cases_of", lambda config: [tiny(dtype=config.dtype)])
    out = tmp_path / "a" / "rollout.json"
    flags = ["bench", "rollout", "--dtype", "bf16", "--rounds", "1", "--json", str(out)]
    assert cli.main(flags) == 0
    told = capsys.readouterr().out
    assert "rollout, tiny, ragged lengths, bf16 cpu" in told
    assert "| continuous |" in told
    (case,) = json.loads(out.read_text())["cases"]
    assert case["case"]["requests"]["num_requests"] == 40
    assert case["num_new_tokens"] == sum(make_limits(REQUESTS["ragged"]))
    results = {result["provider"]: result for result in case["results"]}
    assert set(results) == set(PROVIDERS)
    assert results[BASELINE]["speedup"] == 1.0
    for result in results.values():
        assert len(result["samples_ms"]) >= 3
        assert result["tokens_per_second"] == pytest.approx(
            1e3 * case["num_new_tokens"] / result["median_ms"]
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_rows": 3}, "num_rows makes no sense with rollout"),
        ({"dtype": "fp16"}, r"dtype of rollout must be one of \('fp32', 'bf16'\)"),
        ({"model": "3M"}, r"model of rollout must be one of \('all', 'tiny', 'small', 'big'\)"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cases_of(BenchConfig(op="rollout", **options))


def test_all_means_both_models_workloads_and_dtypes() -> None:
    cases = cases_of(BenchConfig(op="rollout", device="cpu"))
    assert len({(case.model, case.workload, case.dtype) for case in cases}) == 8
    assert "tiny" not in {case.model for case in cases}


def test_speeds_are_compared_with_generate() -> None:
    results = [
        RolloutResult(OURS, greedy_error=0.0, logprob_error=0.0, samples_ms=[2.0, 1.0, 3.0]),
        RolloutResult(BASELINE, greedy_error=0.0, logprob_error=0.0, samples_ms=[5.0, 5.0, 5.0]),
    ]
    report = RolloutReport(
        tiny(), 1000, 10, 20, Ceilings(1e9, 1e9, "fp32"), 0.5, "float64", results
    )
    assert report.speedup(results[0]) == 2.5
    assert report.tokens_per_second(results[0]) == 1e4
    assert "2.50x | 10,000 | 25%" in report.table()


@pytest.mark.skipif(why_not_measured("cpu") is not None, reason="memory is read from /proc")
def test_a_thousand_requests_leave_nothing_behind(problem: RolloutProblem) -> None:
    """A cache of one call has 40 x 21 tokens of 512 bytes; one kept of each would be 10 MB."""
    assert rollout.growth_over_requests(problem) < 4 << 20

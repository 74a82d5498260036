"""What the benchmarks share: a provider is checked against float64, then timed by pytest-benchmark.

`fuserl bench` times the same cases interleaved, with memory and the limit; quote its ratios. These
files show the whole range in minutes, each provider in turn.
"""

import functools
from collections.abc import Callable

import pytest
import torch

from fuserl.bench.case import Case
from fuserl.bench.checking import Error
from fuserl.bench.op import BASELINE, Provider
from fuserl.bench.ops import find_op, providers
from fuserl.bench.problem import Problem
from fuserl.bench.run import check

_ROUNDS = 5


@functools.lru_cache(maxsize=1)
def _problem(case: Case) -> tuple[Problem, Error | None]:
    """The inputs and truth of a case, and the error of plain torch on it."""
    torch.compiler.reset()
    problem = find_op(case.op).problem(case)
    (baseline,) = providers(case.op, BASELINE)
    return problem, check(problem, baseline, None)[0].error


@pytest.fixture
def time_provider(benchmark) -> Callable[[Case, Provider], None]:
    def run(case: Case, provider: Provider) -> None:
        problem, baseline = _problem(case)
        result, call = check(problem, provider, baseline)
        if call is None:
            told = f"{provider.name}: {result.status}, {result.reason}"
            if provider.is_ours and result.status != "unavailable":
                pytest.fail(told)
            pytest.skip(told)

        def step() -> None:
            call.run()
            if case.device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = case.title
        benchmark.extra_info["error"] = result.error.value
        benchmark.extra_info["gradient_error"] = result.error.gradient
        benchmark.pedantic(step, setup=call.prepare, rounds=_ROUNDS, warmup_rounds=1)

    return run

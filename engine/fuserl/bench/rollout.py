"""Generation on the trainer's weights against transformers: `fuserl bench rollout`.

Prompts in, sampled tokens with their log-probabilities out, prefill included, as the rollout of an
RL step needs them. Two workloads: uniform, 32 requests of one length that run as one batch, and
ragged, 64 requests of log-normal lengths, where a batch that waits for its longest row idles.
Before anything is timed, greedy tokens must be the likeliest and log-probabilities right, by
transformers' module in float64 (a model too large for that: in the widest dtype that fits).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fuserl.bench.checking import RIVAL_BOUND
from fuserl.bench.memory import growth_bytes, peak_extra_bytes, why_not_measured
from fuserl.bench.output import (
    WrongAnswer,
    first_line,
    models_of,
    refuse_other_options,
    run_cases,
    table_row,
)
from fuserl.bench.rivals import Unavailable
from fuserl.bench.rollout_problem import WORKLOADS, Completions, RolloutCase, RolloutProblem
from fuserl.bench.rollout_providers import (
    BASELINE,
    ON_CUDA,
    OURS,
    PROVIDERS,
    FuserlGenerator,
    Generator,
)
from fuserl.bench.timing import Ceilings, as_milliseconds, interleave, measure_ceilings, quartiles
from fuserl.config import BenchConfig
from fuserl.device import default_device

NAME = "rollout"
_MEASURED = ("small", "big")
_OPTIONS = {"op", "device", "dtype", "model", "rounds", "budget_seconds", "threads", "json"}
_OUR_BOUND = {"fp32": 1e-4, "bf16": 0.15}  # of log-probabilities, for any token
_RIVAL_BOUND = {dtype: RIVAL_BOUND[dtype].value for dtype in _OUR_BOUND}
UNITS = """\
ms: median [quartiles] of interleaved rounds. vs generate: its median over this one. tokens/s: new
ones, prefill included. limit: the time of the products with weights alone, at the rate of a large
product in the same dtype, over the median. peak: most memory during a call beyond what was held
before it. KV: the cache's. errors against the same model in float64 (float32 or its own dtype
where it says so): how far a greedy token's log-probability is
below the likeliest one's, and of the sampled tokens' log-probabilities."""


@dataclass(slots=True)
class RolloutResult:
    """One provider in one case: timed, or left out for a reason."""

    provider: str
    note: str = ""
    reason: str = ""
    greedy_error: float | None = None
    logprob_error: float | None = None
    kv_bytes: int | None = None
    peak_extra_bytes: int | None = None
    samples_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return quartiles(self.samples_ms)[1]


@dataclass(frozen=True, slots=True)
class RolloutReport:
    case: RolloutCase
    num_parameters: int
    num_prompt_tokens: int
    num_new_tokens: int
    ceilings: Ceilings
    floor_ms: float
    truth_dtype: str
    """In which answers were judged."""
    results: list[RolloutResult]

    def timed(self) -> list[RolloutResult]:
        """The fastest first."""
        return sorted((r for r in self.results if r.samples_ms), key=lambda r: r.median_ms)

    def speedup(self, result: RolloutResult) -> float:
        """Times as fast as generate."""
        (baseline,) = [r for r in self.results if r.provider == BASELINE]
        return baseline.median_ms / result.median_ms

    def tokens_per_second(self, result: RolloutResult) -> float:
        return 1e3 * self.num_new_tokens / result.median_ms

    def table(self) -> str:
        """In Markdown."""
        heads = ("", "ms", f"vs {BASELINE}", "tokens/s", "limit", "peak MB", "KV MB")
        lines = [
            f"{self.case.title}: {self.num_parameters / 1e6:.1f}M parameters, "
            f"{self.num_prompt_tokens} tokens of prompts, {self.num_new_tokens} new\n"
            f"floor {as_milliseconds(self.floor_ms)} ms; {self.ceilings}; judged in "
            f"{self.truth_dtype}\n",
            table_row(*heads, "greedy error", "of logprobs", "note"),
            table_row("---", *["--:"] * (len(heads) + 1), "---"),
        ]
        for result in self.timed():
            low, median, high = quartiles(result.samples_ms)
            lines.append(
                table_row(
                    result.provider,
                    "{} [{}, {}]".format(*map(as_milliseconds, (median, low, high))),
                    f"{self.speedup(result):.2f}x",
                    f"{self.tokens_per_second(result):,.0f}",
                    f"{self.floor_ms / median:.0%}",
                    _megabytes(result.peak_extra_bytes),
                    _megabytes(result.kv_bytes),
                    f"{result.greedy_error:.1e}",
                    "-" if result.logprob_error is None else f"{result.logprob_error:.1e}",
                    result.note,
                )
            )
        lines += [f"\n{r.provider}: not timed, {r.reason}" for r in self.results if r.reason]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"results": [self._result_json(result) for result in self.results]}

    def _result_json(self, result: RolloutResult) -> dict[str, Any]:
        if not result.samples_ms:
            return asdict(result)
        return asdict(result) | {
            "median_ms": result.median_ms,
            "quartiles_ms": list(quartiles(result.samples_ms)[::2]),
            "speedup": self.speedup(result),
            "tokens_per_second": self.tokens_per_second(result),
        }


def _megabytes(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else f"{num_bytes / 1e6:.0f}"


class RolloutCall:
    """All requests of a problem by one provider (a Timed of timing.interleave)."""

    def __init__(self, generator: Generator, problem: RolloutProblem) -> None:
        self._generator, self._problem = generator, problem

    def prepare(self) -> None:
        """Nothing is used up."""

    def run(self) -> Completions:
        return self._generator.generate(self._problem.prompts, self._problem.limits)


def growth_over_requests(problem: RolloutProblem, num_requests: int = 1000) -> int:
    """Bytes by which memory grew while our engine answered about so many requests."""
    call = RolloutCall(FuserlGenerator(problem), problem)
    return growth_bytes(problem.case.device, call.run, num_requests // len(problem.prompts))


def run_rollout(config: BenchConfig) -> list[RolloutReport]:
    """Print the tables and write the JSON that was asked for.

    Raises ValueError for an option that would do nothing and without transformers, and WrongAnswer.
    """
    try:
        return run_cases(config, cases_of(config), run_case, UNITS)
    except Unavailable as reason:
        raise ValueError(f"{NAME} is measured against transformers, and {reason}") from None


def cases_of(config: BenchConfig) -> list[RolloutCase]:
    refuse_other_options(config, _OPTIONS, NAME)
    if config.dtype not in ("auto", *_OUR_BOUND):
        raise ValueError(f"dtype of {NAME} must be one of {(*_OUR_BOUND,)}, not {config.dtype!r}")
    device = default_device(None if config.device == "auto" else config.device).type
    return [
        RolloutCase(model=model, workload=name, requests=requests, dtype=dtype, device=device)
        for model in models_of(config, _MEASURED, NAME)
        for dtype in (_OUR_BOUND if config.dtype == "auto" else (config.dtype,))
        for name, requests in WORKLOADS.items()
    ]


def run_case(case: RolloutCase, rounds: int, budget_seconds: float) -> RolloutReport:
    """Check every provider, then time those that are right, interleaved."""
    problem = RolloutProblem(case)
    results: dict[str, RolloutResult] = {}
    calls: dict[str, RolloutCall] = {}
    for name, make in (PROVIDERS | (ON_CUDA if case.device == "cuda" else {})).items():
        results[name], generator = check(problem, name, make)
        if generator is not None:
            calls[name] = RolloutCall(generator, problem)
    _refuse_wrong(case, [results[OURS], results[BASELINE]])
    for name, call in calls.items():
        if why_not_measured(case.device) is None:
            results[name].peak_extra_bytes = peak_extra_bytes(case.device, call.run)
    ceilings = measure_ceilings(case.device, case.dtype)
    for name, samples in interleave(case.device, calls, rounds, budget_seconds).items():
        results[name].samples_ms = samples
    ceilings = ceilings.better_of(measure_ceilings(case.device, case.dtype))
    return RolloutReport(
        case,
        sum(parameter.numel() for parameter in problem.source.parameters()),
        problem.num_prompt_tokens,
        problem.num_new_tokens,
        ceilings,
        1e3 * problem.num_flops / ceilings.flops_per_second,
        problem.truth_dtype,
        list(results.values()),
    )


def check(
    problem: RolloutProblem, name: str, make: Callable[[RolloutProblem], Generator]
) -> tuple[RolloutResult, Generator | None]:
    """Let a provider generate and compare with the truth. The generator is None unless it is right.

    Raises Unavailable for the baseline, without which nothing is measured.
    """
    result = RolloutResult(name)
    try:
        generator = make(problem)
        greedy = generator.generate(problem.greedy_prompts, problem.greedy_limits, greedy=True)
        result.greedy_error = problem.greedy_error(greedy)
        sampled = generator.generate(problem.prompts, problem.limits)
        error = problem.sampling_error(sampled)
    except Unavailable as reason:
        if name == BASELINE:
            raise
        result.reason = str(reason)
        return result, None
    except Exception as failure:  # whatever another library raises is told, and the others go on
        if name == OURS:
            raise
        result.reason = f"{type(failure).__name__}: {first_line(failure)}"
        return result, None
    result.note, result.kv_bytes = generator.note, generator.kv_bytes
    result.logprob_error = None if sampled.logprobs is None else error
    bound = (_OUR_BOUND if name == OURS else _RIVAL_BOUND)[problem.case.dtype]
    if not (result.greedy_error <= bound and error <= bound):
        result.reason = (
            f"its greedy tokens are {result.greedy_error:.1e} from the likeliest and its "
            f"log-probabilities err by {error:.1e} (both at most {bound:.1e})"
        )
        return result, None
    return result, generator


def _refuse_wrong(case: RolloutCase, results: Sequence[RolloutResult]) -> None:
    wrong = [f"{result.provider}: {result.reason}" for result in results if result.reason]
    if wrong:
        raise WrongAnswer(f"{case.title}: nothing was timed, because {'; '.join(wrong)}")

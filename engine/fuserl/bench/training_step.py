"""One step of supervised fine-tuning against transformers: `fuserl bench training_step`.

A step is forward, mean loss of the completion tokens, backward, clipping and AdamW on one batch of
32 rows. Ours is the sft stage's, on packed rows; theirs is transformers' module of the same family
and weights, on the padded batch, with its own loss. Two batches: ragged lengths, where most of a
padded batch is padding, and equal lengths of as many tokens, where packing gains nothing.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

from fuserl.bench.checking import OURS_MORE, RIVAL_BOUND
from fuserl.bench.memory import peak_extra_bytes, why_not_measured
from fuserl.bench.output import (
    WrongAnswer,
    models_of,
    refuse_other_options,
    run_cases,
    table_row,
)
from fuserl.bench.rivals import Unavailable
from fuserl.bench.timing import as_milliseconds, interleave, quartiles
from fuserl.bench.training_problem import BATCHES, StepCase, StepProblem
from fuserl.bench.training_providers import BASELINE, OURS, PROVIDERS, Step
from fuserl.bench.truth import Error
from fuserl.config import BenchConfig
from fuserl.device import default_device

NAME = "training_step"
_MEASURED = ("3M", "25M")
_OPTIONS = {"op", "device", "dtype", "model", "rounds", "budget_seconds", "threads", "json"}
_UNITS = """\
ms: median [quartiles] of interleaved rounds. vs transformers: its median over this one. tokens/s:
without padding. peak: most memory during a step beyond what is held between steps (state: weights,
masters, moments). errors against float64: absolute of the loss, relative (2-norm) of all
gradients."""


@dataclass(slots=True)
class StepResult:
    """One provider in one case."""

    provider: str
    error: Error
    state_bytes: int = 0
    peak_extra_bytes: int | None = None
    samples_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return quartiles(self.samples_ms)[1]


@dataclass(frozen=True, slots=True)
class StepReport:
    case: StepCase
    num_tokens: int
    padded_tokens: int
    num_completion_tokens: int
    num_parameters: int
    results: list[StepResult]

    def speedup(self, result: StepResult) -> float:
        """Times as fast as transformers."""
        (baseline,) = [r for r in self.results if r.provider == BASELINE]
        return baseline.median_ms / result.median_ms

    def table(self) -> str:
        """In Markdown."""
        heads = ("", "ms", f"vs {BASELINE}", "tokens/s", "peak MB", "state MB", "error of loss")
        lines = [
            f"{self.case.title}: {self.num_parameters / 1e6:.1f}M parameters, "
            f"{self.num_tokens} tokens ({self.padded_tokens} padded), "
            f"{self.num_completion_tokens} learned\n",
            table_row(*heads, "of gradients"),
            table_row("---", *["--:"] * len(heads)),
        ]
        for result in sorted(self.results, key=lambda r: r.median_ms):
            low, median, high = quartiles(result.samples_ms)
            peak = result.peak_extra_bytes
            lines.append(
                table_row(
                    result.provider,
                    "{} [{}, {}]".format(*map(as_milliseconds, (median, low, high))),
                    f"{self.speedup(result):.2f}x",
                    f"{1e3 * self.num_tokens / median:,.0f}",
                    "-" if peak is None else f"{peak / 1e6:.0f}",
                    f"{result.state_bytes / 1e6:.0f}",
                    f"{result.error.value:.1e}",
                    f"{result.error.gradient:.1e}",
                )
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        results = [
            asdict(result)
            | {
                "median_ms": result.median_ms,
                "quartiles_ms": list(quartiles(result.samples_ms)[::2]),
                "speedup": self.speedup(result),
            }
            for result in self.results
        ]
        return asdict(self) | {"results": results}


def run_training_step(config: BenchConfig) -> list[StepReport]:
    """Print the tables and write the JSON that was asked for.

    Raises ValueError for an option that would do nothing and without transformers, and WrongAnswer.
    """
    try:
        return run_cases(config, cases_of(config), run_case, _UNITS)
    except Unavailable as reason:
        raise ValueError(f"{NAME} is measured against transformers, and {reason}") from None


def cases_of(config: BenchConfig) -> list[StepCase]:
    refuse_other_options(config, _OPTIONS, NAME)
    if config.dtype not in ("auto", *PROVIDERS):
        raise ValueError(f"dtype of {NAME} must be one of {(*PROVIDERS,)}, not {config.dtype!r}")
    device = default_device(None if config.device == "auto" else config.device).type
    return [
        StepCase(model=model, batch=batch, dtype=dtype, device=device)
        for model in models_of(config, _MEASURED, NAME)
        for dtype in (PROVIDERS if config.dtype == "auto" else (config.dtype,))
        for batch in BATCHES
    ]


def run_case(case: StepCase, rounds: int, budget_seconds: float) -> StepReport:
    """Check every provider's loss and gradients, then time whole steps, interleaved."""
    problem = StepProblem(case)
    steps = {name: make(problem) for name, make in PROVIDERS[case.dtype].items()}
    results = {name: StepResult(name, problem.error(step.answer())) for name, step in steps.items()}
    _refuse_wrong(case, results)
    for name, step in steps.items():
        _measure_memory(case, step, results[name])
    for name, samples in interleave(case.device, steps, rounds, budget_seconds).items():
        results[name].samples_ms = samples
    parameters = problem.source.parameters()
    return StepReport(
        case,
        problem.num_tokens,
        problem.padded()["input_ids"].numel(),
        problem.num_completion_tokens,
        sum(parameter.numel() for parameter in parameters),
        list(results.values()),
    )


def _refuse_wrong(case: StepCase, results: dict[str, StepResult]) -> None:
    """Theirs may err as bf16 does, ours no more than theirs in the same dtype and a little."""
    more, baseline = OURS_MORE[case.dtype], results[BASELINE].error
    bounds = dict.fromkeys(results, RIVAL_BOUND[case.dtype])
    bounds[OURS] = Error(baseline.value + more.value, baseline.gradient + more.gradient)
    wrong = [
        f"{name} errs by {result.error.value:.1e} (gradients {result.error.gradient:.1e})"
        for name, result in results.items()
        if not result.error.within(bounds[name])
    ]
    if wrong:
        raise WrongAnswer(f"{case.title}: nothing was timed, because {'; '.join(wrong)}")


def _measure_memory(case: StepCase, step: Step, result: StepResult) -> None:
    step.run()  # makes the moments
    result.state_bytes = step.state_bytes
    if why_not_measured(case.device) is None:
        result.peak_extra_bytes = peak_extra_bytes(case.device, step.run)

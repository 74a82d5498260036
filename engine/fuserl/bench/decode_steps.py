"""Decode steps of real model shapes on a CUDA device: `benchmarks/gpu --part rollouts`.

A step is all that a rollout does for a token of every row: the decoder, the head, sampling with
log-probabilities, stops and the bookkeeping; replayed from its captured graph, 64 in a row, the
host's part included. Weights and the keys of all tokens before are random, which changes no time.
Beside each time stands its limit: the larger of reading the weights once and multiplying by them,
plus the larger of reading the cache once and attention's products, at the two measured ceilings.
"""

import gc
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from fuserl.bench.case import DTYPES
from fuserl.bench.output import table_row
from fuserl.bench.shapes import SHAPES, TINY
from fuserl.bench.timing import Ceilings, as_milliseconds, quartiles
from fuserl.model.cache import CacheShape
from fuserl.model.config import DecoderConfig
from fuserl.model.heads import LanguageModel
from fuserl.rollout.live_rows import NewRow
from fuserl.rollout.memory import is_out_of_memory
from fuserl.rollout.module_runner import ModuleRunner
from fuserl.rollout.plan import BUDGET_SHARE, free_bytes
from fuserl.rollout.runner import RunnerOptions
from fuserl.rollout.sampling import SamplingParams
from fuserl.rollout.stopping import StopRule

NUM_STEPS = 64
MIN_ROUNDS, MAX_ROUNDS = 3, 10
UNITS = """\
ms: a step of all rows, median [quartiles] of rounds of 64, the host's part included. tokens/s: of
all rows. limit: the time below which no implementation gets, over the median. waits: times a step
that the host waited for the device, blocking copies included. capture: seconds for the graph of
this size, kernels compiled on the way. peak: most memory in use, weights and cache included."""

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
"""Calls by which a host waits. A copy that does not wait is cudaMemcpyAsync."""
_CALL = re.compile("cuda[A-Z]")  # as cudaLaunchKernel, where kernels are cuda_something or others


MODELS = {"tiny": TINY, **SHAPES}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCase:
    """One model and number of rows, at several lengths."""

    model: str
    """A key of MODELS."""
    num_rows: int | None
    """None: as many as memory has room for, up to most_rows."""
    most_rows: int = 1024
    prompt_length: int = 512
    """Of each row a prompt of its own."""
    contexts: tuple[int, ...] = (512, 1024, 1536)
    """Tokens before the first of the timed steps."""
    dtype: str = "bf16"
    device: str = "cuda"

    def __post_init__(self) -> None:
        if min(self.contexts) < self.prompt_length:
            raise ValueError(
                f"contexts must be at least prompt_length ({self.prompt_length}), "
                f"got {min(self.contexts)}"
            )

    @property
    def title(self) -> str:
        rows = "as many rows as fit" if self.num_rows is None else f"{self.num_rows} rows"
        return f"decode steps, {self.model}, {rows}, {self.dtype} {self.device}"


def step_cases() -> list[StepCase]:
    """The most wanted first."""
    return [StepCase(model=name, num_rows=rows) for rows in (256, 64, None, 1) for name in SHAPES]


@dataclass(slots=True)
class StepResult:
    """At one context: timed, or left out for a reason."""

    context: int
    num_rows: int = 0
    floor_ms: float = 0.0
    reason: str = ""
    waits_per_step: float | None = None
    samples_ms: list[float] = field(default_factory=list)

    @property
    def median_ms(self) -> float:
        return quartiles(self.samples_ms)[1]

    @property
    def share_of_limit(self) -> float:
        return self.floor_ms / self.median_ms

    @property
    def tokens_per_second(self) -> float:
        return 1e3 * self.num_rows / self.median_ms


@dataclass(slots=True)
class StepReport:
    case: StepCase
    ceilings: Ceilings
    num_parameters: int = 0
    cache_bytes: int = 0
    capture_seconds: float | None = None
    peak_bytes: int | None = None
    results: list[StepResult] = field(default_factory=list)

    def table(self) -> str:
        """In Markdown."""
        told = [
            f"{self.num_parameters / 1e6:,.1f}M parameters",
            f"{self.cache_bytes / 1e9:.1f} GB of cache",
        ]
        if self.capture_seconds is not None:
            told.append(f"capture {self.capture_seconds:.1f} s")
        if self.peak_bytes is not None:
            told.append(f"peak {self.peak_bytes / 1e9:.1f} GB")
        lines = [
            f"{self.case.title}: {', '.join(told)}\n{self.ceilings}\n",
            table_row("context", "rows", "ms", "limit ms", "limit", "tokens/s", "waits"),
            table_row(*["--:"] * 7),
        ]
        for result in self.results:
            if result.reason:
                continue
            low, median, high = map(as_milliseconds, quartiles(result.samples_ms))
            waits = "-" if result.waits_per_step is None else f"{result.waits_per_step:.3f}"
            lines.append(
                table_row(
                    str(result.context),
                    str(result.num_rows),
                    f"{median} [{low}, {high}]",
                    as_milliseconds(result.floor_ms),
                    f"{result.share_of_limit:.0%}",
                    f"{result.tokens_per_second:,.0f}",
                    waits,
                )
            )
        lines += [f"\n{r.context} tokens: not timed, {r.reason}" for r in self.results if r.reason]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"results": [_result_json(result) for result in self.results]}


def _result_json(result: StepResult) -> dict[str, Any]:
    if not result.samples_ms:
        return asdict(result)
    return asdict(result) | {
        "median_ms": result.median_ms,
        "quartiles_ms": list(quartiles(result.samples_ms)[::2]),
        "share_of_limit": result.share_of_limit,
        "tokens_per_second": result.tokens_per_second,
    }


def floor_ms(
    config: DecoderConfig, num_weights: int, num_rows: int, context: float, ceilings: Ceilings
) -> float:
    """Of a step in 16 bits. num_weights: of matrices that are multiplied by. No two rows share a
    prompt here."""
    bandwidth, rate = ceilings.bytes_per_second, ceilings.flops_per_second
    products = max(2 * num_weights / bandwidth, 2 * num_rows * num_weights / rate)
    kv_bytes = 4 * config.num_layers * config.num_kv_heads * config.head_dim
    flops = 4 * config.num_layers * config.num_heads * config.head_dim
    tokens = num_rows * context
    return 1e3 * (products + max(tokens * kv_bytes / bandwidth, tokens * flops / rate))


def run_case(case: StepCase, ceilings: Ceilings, budget_seconds: float) -> StepReport:
    """Time a step at each context. budget_seconds: of timed rounds; captures come on top. What does
    not fit says so in its place."""
    report = StepReport(case, ceilings)
    is_cuda = case.device == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        steps = Steps(case)
        report.num_parameters, report.cache_bytes = steps.num_parameters, steps.cache_bytes
        for context in case.contexts:
            result = StepResult(context, steps.num_rows)
            result.floor_ms = floor_ms(
                steps.config, steps.num_weights, steps.num_rows, context + NUM_STEPS / 2, ceilings
            )
            report.results.append(result)
            steps.go_to(context)
            steps.run()  # captures, the first time
            if is_cuda:
                result.waits_per_step = steps.waits(context)
            end = time.perf_counter() + budget_seconds / len(case.contexts)
            while len(result.samples_ms) < MIN_ROUNDS or (
                len(result.samples_ms) < MAX_ROUNDS and time.perf_counter() < end
            ):
                steps.go_to(context)
                result.samples_ms.append(steps.run())
        report.capture_seconds = steps.capture_seconds
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        done = {result.context for result in report.results if result.samples_ms}
        report.results = [r for r in report.results if r.samples_ms]
        report.results += [
            StepResult(context, reason="out of memory")
            for context in case.contexts
            if context not in done
        ]
    if is_cuda:
        report.peak_bytes = torch.cuda.max_memory_allocated()
    return report


class Steps:
    """A model of random weights, and rows that can be put to any length."""

    def __init__(self, case: StepCase) -> None:
        self.config = MODELS[case.model]
        self._is_cuda = case.device == "cuda"
        with torch.device("meta"):
            model = LanguageModel(self.config).to(DTYPES[case.dtype])
        model.to_empty(device=case.device)
        model.initialize(0)
        model.requires_grad_(False)
        self._prompt_length = case.prompt_length
        capacity = max(case.contexts) - case.prompt_length + NUM_STEPS
        self.num_rows = case.num_rows or self._most_rows(case, model, capacity)
        shape = self._shape(case, self.num_rows, capacity)
        options = RunnerOptions(sampling=SamplingParams(), stop=StopRule())
        self._runner = ModuleRunner(model, shape, options)
        cache = self._runner.cache
        for arena in (cache.keys, cache.values, cache.prompt_keys, cache.prompt_values):
            arena.normal_()
        cache.prompt_lengths.fill_(case.prompt_length)
        self.cache_bytes = cache.num_bytes
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        untied = 0 if self.config.tie_embeddings else model.trunk.embed_tokens.weight.numel()
        self.num_weights = self.num_parameters - untied

    @staticmethod
    def _shape(case: StepCase, num_rows: int, capacity: int) -> CacheShape:
        return CacheShape(
            num_slots=num_rows,
            capacity=capacity,
            num_prompts=num_rows,
            prompt_capacity=case.prompt_length,
        )

    def _most_rows(self, case: StepCase, model: LanguageModel, capacity: int) -> int:
        row_bytes = self._shape(case, 1, capacity).num_bytes(self.config, model.trunk.dtype)
        room = int(BUDGET_SHARE[case.device] * free_bytes(model.device) / row_bytes)
        return max(1, min(case.most_rows, room))

    @property
    def capture_seconds(self) -> float | None:
        graphs = self._runner.graphs
        return None if graphs is None else graphs.seconds

    def go_to(self, context: int) -> None:
        """All rows at this length, far from any end."""
        rows = self._runner.rows
        rows.num_rows = 0
        limit = self._runner.cache.shape.capacity + 1
        self._runner.admit([], [NewRow(row, row, limit, row) for row in range(self.num_rows)])
        rows.lengths.fill_(context - self._prompt_length)

    def run(self) -> float:
        """Milliseconds a step, of NUM_STEPS as a rollout runs them."""
        self._wait()
        began = time.perf_counter()
        ended = self._runner.run(NUM_STEPS, self.num_rows)
        self._wait()
        assert not ended, "a row ended, and the rest of the steps was not of all rows"
        return 1e3 * (time.perf_counter() - began) / NUM_STEPS

    def waits(self, context: int) -> float | None:
        """Of the host for the device, a step; None where the profiler sees no calls."""
        self.go_to(context)
        self._wait()
        with counted_waits() as found:
            self._runner.run(NUM_STEPS, self.num_rows)
        return None if found.num_calls == 0 else found.num_waits / NUM_STEPS

    def _wait(self) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()


@dataclass(slots=True)
class Waits:
    num_calls: int = 0
    """Of the CUDA runtime, of any kind: 0 where none can be seen."""
    num_waits: int = 0
    num_copies_to_host: int = 0


@contextmanager
def counted_waits() -> Iterator[Waits]:
    """Filled in at the end of the block. The profiler's own wait at its end is not counted."""
    found = Waits()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    gc.collect()
    with profile(activities=activities) as profiler:
        yield found
    for event in profiler.events() or ():
        is_call = _CALL.match(event.name) is not None
        found.num_calls += is_call
        found.num_waits += is_call and event.name in _WAITS
        found.num_copies_to_host += event.name.startswith("Memcpy DtoH")
    # Ending a profile synchronises the device once, inside the profile.
    last = [e.name for e in profiler.events() or () if e.name == "cudaDeviceSynchronize"]
    found.num_waits -= min(1, len(last))

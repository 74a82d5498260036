"""`fuserl bench` of an op: check, measure, tell."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fuserl.bench import report
from fuserl.bench.case import PASSES, Case
from fuserl.bench.checking import Call, bound_for, measure_error
from fuserl.bench.memory import peak_extra_bytes, why_not_measured
from fuserl.bench.op import BASELINE, Op, Provider, Sizes
from fuserl.bench.ops import default_provider, find_op, providers
from fuserl.bench.output import WrongAnswer, first_line, write_json
from fuserl.bench.problem import Problem
from fuserl.bench.report import CaseReport, Result
from fuserl.bench.rivals import Unavailable
from fuserl.bench.timing import Ceilings, Replay, interleave, measure_ceilings, wall_ms
from fuserl.bench.truth import Error
from fuserl.config import BenchConfig
from fuserl.device import default_device


def run_bench(config: BenchConfig) -> list[CaseReport]:
    """Print the tables, and write the JSON and the plot that were asked for.

    Raises ValueError for an unknown op, provider or option, and WrongAnswer.
    """
    cases = cases_of(config)
    chosen = providers(config.op, config.providers)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device, dtype = cases[0].device, cases[0].dtype
    machine = report.describe_machine(device, torch.get_num_threads())
    ceilings = measure_ceilings(device, dtype)
    print(f"{machine['device']}, {machine['threads']} threads, torch {torch.__version__}")
    print(f"ceilings: {ceilings}\n")
    reports = []
    for case in cases:
        budget = config.budget_seconds / len(cases)
        reports.append(run_case(case, chosen, ceilings, config.rounds, budget))
        print(reports[-1].table(), end="\n\n", flush=True)
    print(report.units())
    if config.json is not None:
        write_json(Path(config.json), report.to_json(machine, reports))
    if config.plot is not None:
        from fuserl.bench.plot import draw

        draw(Path(config.plot), machine, reports)
    return reports


def cases_of(config: BenchConfig) -> list[Case]:
    """The passes asked for, at the sizes asked for or those of the op and device."""
    op = find_op(config.op)
    device = default_device(None if config.device == "auto" else config.device).type
    sizes = _sizes(config, op.defaults[device])
    options = _options(config, op)
    if config.passes == "forward_backward" and not op.has_gradient:
        raise ValueError(f"passes forward_backward makes no sense with {config.op}: no gradient")
    passes = op.passes if config.passes == "all" else (config.passes,)
    if config.inplace_grad:
        if config.passes == "forward":
            raise ValueError("inplace_grad makes no sense with passes forward: no gradient is made")
        passes = ("forward_backward",)
    if config.cuda_graph and device != "cuda":
        raise ValueError(f"cuda_graph needs a CUDA device, not {device}")
    if config.cuda_graph and config.inplace_grad:
        raise ValueError("cuda_graph and inplace_grad exclude each other: a graph keeps its inputs")
    assert set(passes) <= set(PASSES)
    return [
        Case(
            op=config.op,
            pass_name=name,
            device=device,
            dtype=op.dtypes[device] if config.dtype == "auto" else config.dtype,
            **sizes,
            cuda_graph=config.cuda_graph,
            **options,
        )
        for name in passes
    ]


def _sizes(config: BenchConfig, defaults: Sizes) -> dict[str, Any]:
    """Those asked for, else the op's. Raises ValueError for a dimension that it does not have."""
    sizes = asdict(defaults)
    for name, default in sizes.items():
        asked = getattr(config, name)
        if asked is not None and not default:
            raise ValueError(f"{name} makes no sense with {config.op}: it has no such dimension")
        sizes[name] = default if asked is None else asked
    return sizes


def _options(config: BenchConfig, op: Op) -> dict[str, Any]:
    """Those asked for, else the op's. Raises ValueError for one that would do nothing."""
    options = dict(op.options)
    flags = ("with_entropy", "inplace_grad", "with_metrics", "with_residual")
    for name in (*flags, "temperature", "top_p"):
        asked = getattr(config, name)
        if asked is None or asked is False:
            continue
        if name not in options:
            raise ValueError(f"{name} makes no sense with {config.op}: it has no such option")
        options[name] = asked
    return options


def run_case(
    case: Case, chosen: list[Provider], ceilings: Ceilings, rounds: int, budget_seconds: float
) -> CaseReport:
    """Check every provider, then time those that are right, interleaved.

    The ceilings are measured again afterwards; the floor comes from the better of both.
    Raises WrongAnswer if one of ours is wrong or breaks.
    """
    torch.compiler.reset()  # so that the last case's shapes do not make this one's dynamic
    op = find_op(case.op)
    problem = op.problem(case)
    calls: dict[str, Call] = {}
    by_name: dict[str, Result] = {}
    baseline: Error | None = None
    # Plain torch first: its error is the measure of ours.
    for provider in sorted(chosen, key=lambda p: p.name != BASELINE):
        result, call = check(problem, provider, baseline)
        by_name[provider.name] = result
        if call is not None:
            calls[provider.name] = call
            if provider.name == BASELINE:
                baseline = result.error
    results = [by_name[provider.name] for provider in chosen]
    _refuse_wrong(case, results)
    note = why_not_measured(case.device)
    if case.cuda_graph:
        note = "peak memory is not measured: a graph keeps its memory from capture on"
    for name, call in calls.items():
        call.prepare()
        call.run()  # a second warm-up, and memory without what the first call keeps
        if note is None:
            call.prepare()
            by_name[name].peak_extra_bytes = peak_extra_bytes(case.device, call.run)
    samples = interleave(case.device, calls, rounds, budget_seconds)
    for name, times in samples.items():
        by_name[name].samples_ms = times
        if case.device == "cuda" and not case.inplace_grad:
            by_name[name].wall_ms = wall_ms(calls[name], by_name[name].median_ms)
    ceilings = ceilings.better_of(measure_ceilings(case.device, case.dtype))
    floor = ceilings.floor_ms(op.cost(case))
    return CaseReport(
        case,
        ceilings,
        floor,
        problem.required_bytes,
        BASELINE,
        results,
        note,
        default_provider(case),
    )


def check(
    problem: Problem, provider: Provider, baseline: Error | None
) -> tuple[Result, Call | None]:
    """Run a provider once and compare with the truth. The call is None unless it is right."""
    case = problem.case
    result = Result(provider.name, provider.is_ours, "timed")
    try:
        call = Call(problem, provider.make(case), provider.backend)
        call.prepare()
        began = time.perf_counter()
        answer = call.run()
        if case.device == "cuda":
            torch.cuda.synchronize()
        result.first_call_seconds = time.perf_counter() - began
        if case.cuda_graph:
            call = Replay(call)
            answer = call.run()
            torch.cuda.synchronize()
        result.error = measure_error(problem, *answer)
    except Unavailable as reason:
        result.status, result.reason = "unavailable", str(reason)
        return result, None
    except (torch.OutOfMemoryError, MemoryError) as error:
        result.status, result.reason = "out of memory", first_line(error)
        return result, None
    except Exception as error:  # whatever another library raises is told, and the others go on
        result.status = "failed"
        result.reason = f"{type(error).__name__}: {first_line(error)}"
        return result, None
    bound = bound_for(case.dtype, provider.is_ours, baseline)
    if not result.error.within(bound):
        result.status = "wrong"
        result.reason = (
            f"error {result.error.value:.2e} (at most {bound.value:.2e}), "
            f"of gradient {result.error.gradient:.2e} (at most {bound.gradient:.2e})"
        )
        return result, None
    return result, call


def _refuse_wrong(case: Case, results: list[Result]) -> None:
    bad = [r for r in results if r.is_ours and r.status in ("wrong", "failed")]
    if bad:
        told = "; ".join(f"{r.provider}: {r.status}, {r.reason}" for r in bad)
        raise WrongAnswer(f"{case.title}: nothing was timed, because {told}")

"""`fuserl profile`: where a step of RL spends its time, and how far from its limits it is.

Steps of the very run that `fuserl rl` makes of the same options, one after another:

    warm-up   kernels are compiled, decode steps captured, the optimizer's moments made
    timed     the seconds of the table, without a profiler, and on a GPU the peak of memory
    memory    on a CPU alone: the peak of memory, which cannot be watched without disturbing times
    traced    under torch.profiler, each phase a range of its own

Nothing is trained for good: no model and no checkpoint is written.
"""

import gzip
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile

from fuserl.allocator import keep_freed_memory
from fuserl.batch import ShapedBatch
from fuserl.bench.case import DTYPES
from fuserl.bench.output import write_json
from fuserl.bench.phase_costs import phase_costs
from fuserl.bench.phases import UNITS, PhaseClock, phase_results, phase_table
from fuserl.bench.report import describe_machine
from fuserl.bench.timing import as_milliseconds, measure_ceilings
from fuserl.bench.traces import MEMORY_FILES, Operator, Trace, profiled, read_trace, write_memory
from fuserl.data.rows import Source
from fuserl.profile_config import ProfileConfig
from fuserl.rewards import RewardFunction
from fuserl.rollout.collect import choose_prompts
from fuserl.rollout.engine import RolloutFacts
from fuserl.run import holds_model, holds_run
from fuserl.stages.rl_metrics import Clock, lengths_of
from fuserl.stages.rl_opening import OpenedRun, open_run
from fuserl.stages.rl_step import experience, learn

TRACE, TABLE = "trace.json", "profile.json"
FILES = (TRACE, f"{TRACE}.gz", *MEMORY_FILES, TABLE)
"""What a profile leaves, each where it applies."""
FORMAT = 1
LARGE_TRACE = 64 << 20
"""Bytes above which a trace is compressed: viewers open it either way."""
_NAME_WIDTH = 64


def run_profile(config: ProfileConfig) -> None:
    if config.reward_model is None:
        raise ValueError("reward_model is missing (a Python function needs profile_step)")
    profile_step(config, config.data, config.reward_model)


def profile_step(
    config: ProfileConfig, data: Source, reward: str | Path | RewardFunction
) -> dict[str, Any]:
    """Write trace, memory and table into config.out, and print the table. Returns what profile.json
    says.

    data: in the place of config.data; reward: of config.reward_model."""
    out = Path(config.out)
    _refuse_folder(out, overwrite=config.overwrite)
    out.mkdir(parents=True, exist_ok=True)  # where that fails, before minutes are spent
    keep_freed_memory()  # as a run does
    opened = open_run(config, data, reward, num_steps=max(config.steps, config.warmup_steps + 3))
    device = opened.policy.model.device.type
    dtype = next(k for k, v in DTYPES.items() if v == opened.policy.model.trunk.dtype)
    ceilings = measure_ceilings(device, dtype)
    torch.cuda.empty_cache()  # of what they were measured with
    machine = describe_machine(device, torch.get_num_threads())
    print(f"{machine['device']}, {machine['threads']} threads, torch {torch.__version__}")
    print(f"{ceilings}\n", flush=True)

    is_cuda = device == "cuda"
    steps = _Steps(opened)
    for _ in range(config.warmup_steps):
        steps.take(Clock())
    timed = PhaseClock(device) if is_cuda else Clock()
    batch = steps.take(timed)
    facts = steps.facts
    watched = timed
    if not is_cuda:
        watched = PhaseClock(device)
        steps.take(watched)
    with profiled(device) as profiler:
        steps.take(Clock())

    for name in FILES:
        (out / name).unlink(missing_ok=True)
    memory = write_memory(profiler, device, out)  # before anything else takes memory
    files = {"trace": _write_trace(profiler, out).name, "memory": memory.name}
    trace = read_trace(profiler, config.num_operators)

    peaks = watched.peak_bytes if isinstance(watched, PhaseClock) else {}
    lengths = lengths_of(batch, config)
    num_tokens = sum(lengths.completions)
    costs = phase_costs(opened.learner, lengths, facts.num_slots)
    results = phase_results([timed.seconds], costs, num_tokens, peaks, ceilings)
    content = {
        "format": FORMAT,
        "machine": machine,
        "options": asdict(config),
        "ceilings": asdict(ceilings),
        "sequences": len(lengths.prompts),
        "prompt_tokens": sum(lengths.prompts),
        "completion_tokens": num_tokens,
        **facts.metrics(),
        "phases": [result.to_json(ceilings) for result in results],
        "operators": _operators_json(trace.operators),
        "kernels": _operators_json(trace.kernels),
        "files": files,
    }
    write_json(out / TABLE, content)
    print(f"{phase_table(results, ceilings)}\n\n{UNITS}\n\n{_operators_text(trace)}\n")
    print(f"{out}: {', '.join((*files.values(), TABLE))}", flush=True)
    return content


class _Steps:
    """Steps of a run, in its order."""

    def __init__(self, opened: OpenedRun) -> None:
        self._opened, self._taken = opened, 0
        self.facts = RolloutFacts()
        """Of the last rollout."""

    def take(self, clock: Clock) -> ShapedBatch:
        learner, step = self._opened.learner, self._taken
        prompts, self.facts = (
            choose_prompts(self._opened.prompts, learner.config, step),
            RolloutFacts(),
        )
        shaped = experience(learner, prompts, step=step, clock=clock, facts=self.facts)
        learn(learner, shaped, step=step, clock=clock)
        self._taken += 1
        return shaped


def _refuse_folder(out: Path, *, overwrite: bool) -> None:
    """A profile goes into a folder of its own, or over another profile."""
    if holds_run(out) or holds_model(out) or (out / "metrics.jsonl").exists():
        raise ValueError(
            f"{out} holds a run or a model, and a profile is written over neither: choose another "
            "--out"
        )
    if not overwrite and any((out / name).exists() for name in FILES):
        raise ValueError(f"{out} holds a profile: choose another --out, or add --overwrite")


def _write_trace(profiler: profile, out: Path) -> Path:
    path = out / TRACE
    profiler.export_chrome_trace(str(path))
    if path.stat().st_size <= LARGE_TRACE:
        return path
    packed = path.with_name(f"{TRACE}.gz")
    with path.open("rb") as plain, gzip.open(packed, "wb", compresslevel=5) as file:
        shutil.copyfileobj(plain, file)
    path.unlink()
    return packed


def _operators_json(found: Mapping[str, Sequence[Operator]]) -> dict[str, list[dict[str, Any]]]:
    return {phase: [asdict(one) for one in operators] for phase, operators in found.items()}


def _operators_text(trace: Trace) -> str:
    """The longest of each phase, by their own time in the traced step."""
    lines = []
    for what, found in (("operators", trace.operators), ("kernels", trace.kernels)):
        for phase, operators in found.items():
            lines.append(f"{phase}, {what} by their own time in the traced step:")
            lines += [
                f"  {as_milliseconds(1e3 * one.seconds):>8} ms {100 * one.share:5.1f} % "
                f"{one.calls:7d} x {one.name[:_NAME_WIDTH]}"
                for one in operators
            ]
    return "\n".join(lines)

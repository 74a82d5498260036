"""What torch.profiler saw of a step, by phase: the operators that took longest, and memory."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fuserl.bench.output import write_json
from fuserl.stages.rl_metrics import PHASES, range_of

MEMORY_FILES = SNAPSHOT, EVENTS = "memory_snapshot.pickle", "memory_events.json"
OUTSIDE = "(outside operators: Python, native code, waiting)"
SNAPSHOT_ENTRIES = 1_000_000
"""Allocations that a snapshot of a CUDA device's memory goes back, at most."""
FORMAT = 1
_ABOUT = (
    "What torch allocated (bytes above 0) and freed (below 0) on the CPU during one step, in "
    "order: microseconds since the trace began, bytes, phase (null between phases). peak_bytes and "
    "end_bytes of a phase count from the step's beginning. Compiled code that allocates by itself "
    "is not seen. A snapshot as torch.cuda.memory makes it needs CUDA."
)


@dataclass(frozen=True, slots=True)
class Operator:
    """All calls of one name within a phase."""

    name: str
    calls: int
    seconds: float
    """Without the operators that it called."""
    share: float
    """Of the phase's range in the trace."""


@dataclass(frozen=True, slots=True)
class Trace:
    operators: Mapping[str, Sequence[Operator]]
    """By phase, of the host, the longest first."""
    kernels: Mapping[str, Sequence[Operator]]
    """By phase, of a CUDA device; empty on a CPU."""


@contextmanager
def profiled(device: str) -> Iterator[profile]:
    """A profile of the host and, for "cuda", of the device; there the history of its memory is kept
    too, for write_memory."""
    activities = [ProfilerActivity.CPU]
    is_cuda = device == "cuda"
    if is_cuda:
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.memory._record_memory_history(
            max_entries=SNAPSHOT_ENTRIES,
            stacks="python",  # frames of C++ say little here, and their names are slow to find
        )
    try:
        with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
            yield profiler
    except BaseException:
        if is_cuda:
            torch.cuda.memory._record_memory_history(enabled=None)
        raise


def write_memory(profiler: profile, device: str, out: Path) -> Path:
    """Of a step run within `profiled`. Returns the file: a snapshot for torch's memory viewer on a
    CUDA device, else the events of torch's allocator on the CPU."""
    if device == "cuda":
        path = out / SNAPSHOT
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)
        return path
    path = out / EVENTS
    write_json(path, memory_events(profiler))
    return path


def memory_events(profiler: profile) -> dict[str, Any]:
    """See _ABOUT."""
    assert profiler.profiler is not None
    found: Any = profiler.profiler.kineto_results
    began, ranges = found.trace_start_ns(), phase_ranges(profiler)
    events: list[tuple[float, int, str | None]] = []
    for event in found.events():
        if event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
            at = (event.start_ns() - began) / 1e3
            events.append((at, event.nbytes(), _phase_at(at, ranges)))
    events.sort(key=lambda event: event[0])
    phases: dict[str, dict[str, int]] = {}
    total = 0
    for _, num_bytes, phase in events:
        total += num_bytes
        if phase is not None:
            known = phases.setdefault(phase, {"peak_bytes": total, "end_bytes": total})
            known["peak_bytes"] = max(known["peak_bytes"], total)
            known["end_bytes"] = total
    return {
        "format": FORMAT,
        "about": _ABOUT,
        "columns": ["microseconds", "bytes", "phase"],
        "phases": phases,
        "events": events,
    }


Ranges = Mapping[str, tuple[float, float]]


def phase_ranges(profiler: profile) -> Ranges:
    """Begin and end of each phase that ran, in microseconds since the trace began."""
    names = {range_of(phase): phase for phase in PHASES}
    return {
        names[event.name]: (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if event.name in names and event.device_type == DeviceType.CPU
    }


def _phase_at(microseconds: float, ranges: Ranges) -> str | None:
    for phase, (begin, end) in ranges.items():
        if begin <= microseconds < end:
            return phase
    return None


def read_trace(profiler: profile, most: int) -> Trace:
    """most: operators of a phase."""
    ranges = phase_ranges(profiler)
    names = set(map(range_of, PHASES))
    of_host: dict[str, dict[str, list[float]]] = {phase: defaultdict(list) for phase in ranges}
    of_device: dict[str, dict[str, list[float]]] = {phase: defaultdict(list) for phase in ranges}
    for event in profiler.events() or ():
        phase = _phase_at(event.time_range.start, ranges)
        if phase is None:
            continue
        if event.device_type == DeviceType.CPU:
            name = OUTSIDE if event.name in names else event.name
            of_host[phase][name].append(event.self_cpu_time_total)
        elif event.name not in names:  # a range is an event on the device too
            of_device[phase][event.name].append(event.time_range.elapsed_us())

    def longest(found: Mapping[str, Mapping[str, list[float]]]) -> dict[str, list[Operator]]:
        return {
            phase: _longest(times, ranges[phase], most) for phase, times in found.items() if times
        }

    return Trace(longest(of_host), longest(of_device))


def _longest(
    times: Mapping[str, list[float]], span: tuple[float, float], most: int
) -> list[Operator]:
    whole = span[1] - span[0]
    found = [
        Operator(name, len(each), sum(each) / 1e6, sum(each) / whole)
        for name, each in times.items()
    ]
    return sorted(found, key=lambda operator: -operator.seconds)[:most]

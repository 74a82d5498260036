"""What a benchmark found: a table for people, and JSON with every sample."""

import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from fuserl.bench.case import Case
from fuserl.bench.timing import Ceilings, as_milliseconds, quartiles
from fuserl.bench.truth import Error

Status = Literal["timed", "unavailable", "out of memory", "wrong", "failed"]
FORMAT = 1
_PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")
_HEADS = (
    "provider",
    "ms",
    "vs torch",
    "limit",
    "peak MB",
    "beyond",
    "error",
    "of gradient",
    "first",
)
_UNITS = """\
ms: median [quartiles] of interleaved rounds. vs torch: its median over this one. limit: the floor
over the median (a floor of reads alone can pass 100 %, since the copy ceiling also writes).
peak: most memory beyond the inputs during a call, its results counted. beyond: the same less the
gradients that the call must return. errors against float64: largest absolute of the outputs,
relative (2-norm) of the gradients. first: seconds of the first call, compilation included. wall:
of a call among many in a row on a GPU, with the host's part."""


@dataclass(slots=True)
class Result:
    """One provider in one case. Times and memory are there only with status "timed"."""

    provider: str
    is_ours: bool
    status: Status
    reason: str = ""
    error: Error | None = None
    first_call_seconds: float | None = None
    peak_extra_bytes: int | None = None
    samples_ms: list[float] = field(default_factory=list)
    wall_ms: float | None = None
    """A call among many in a row on a CUDA device, the host's part included."""

    @property
    def median_ms(self) -> float:
        return quartiles(self.samples_ms)[1]


@dataclass(frozen=True, slots=True)
class CaseReport:
    """results in the order in which they ran; baseline is the provider others are compared to."""

    case: Case
    ceilings: Ceilings
    floor_ms: float
    required_bytes: int
    baseline: str
    results: list[Result]
    memory_note: str | None = None
    default: str | None = None
    """The provider that a user of the op gets who chooses none."""

    def timed(self) -> list[Result]:
        """The fastest first."""
        return sorted((r for r in self.results if r.samples_ms), key=lambda r: r.median_ms)

    def speedup(self, result: Result) -> float | None:
        """Times as fast as the baseline; None if that was not timed."""
        for other in self.results:
            if other.provider == self.baseline and other.samples_ms:
                return other.median_ms / result.median_ms
        return None

    def to_json(self) -> dict[str, Any]:
        return {
            "case": self.case.to_json(),
            "ceilings": asdict(self.ceilings),
            "floor_ms": self.floor_ms,
            "required_gradient_bytes": self.required_bytes,
            "memory_note": self.memory_note,
            "default": self.default,
            "results": [self._result_json(result) for result in self.results],
        }

    def _result_json(self, result: Result) -> dict[str, Any]:
        record = asdict(result)
        if result.samples_ms:
            low, median, high = quartiles(result.samples_ms)
            record |= {
                "median_ms": median,
                "quartiles_ms": [low, high],
                "speedup": self.speedup(result),
                "share_of_limit": self.floor_ms / median,
            }
            if result.peak_extra_bytes is not None:
                beyond = max(0, result.peak_extra_bytes - self.required_bytes)
                record["peak_beyond_gradients_bytes"] = beyond
        return record

    def table(self) -> str:
        rows: list[tuple[str, ...]] = [(*_HEADS, "wall ms") if self._has_wall else _HEADS]
        rows += [self._row(result) for result in self.timed()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{self.case.title}\nfloor {as_milliseconds(self.floor_ms)} ms; {self.ceilings}"]
        for row in rows:
            cells = [
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append(f"  {'  '.join(cells)}")
        lines += [f"  {r.provider}: {r.status}, {r.reason}" for r in self.results if r.reason]
        if self.memory_note:
            lines.append(f"  {self.memory_note}")
        return "\n".join(lines)

    def _row(self, result: Result) -> tuple[str, ...]:
        low, median, high = quartiles(result.samples_ms)
        speedup, peak, error = self.speedup(result), result.peak_extra_bytes, result.error
        wall = result.wall_ms
        assert error is not None
        assert result.first_call_seconds is not None
        return (
            result.provider,
            "{} [{}, {}]".format(*map(as_milliseconds, (median, low, high))),
            "-" if speedup is None else f"{speedup:.2f}x",
            f"{100 * self.floor_ms / median:.0f} %",
            "-" if peak is None else f"{peak / 1e6:.0f}",
            "-" if peak is None else f"{max(0, peak - self.required_bytes) / 1e6:.0f}",
            f"{error.value:.1e}",
            f"{error.gradient:.1e}" if self.case.backward else "-",
            f"{result.first_call_seconds:.1f} s",
            *(["-" if wall is None else as_milliseconds(wall)] if self._has_wall else []),
        )

    @property
    def _has_wall(self) -> bool:
        return any(result.wall_ms is not None for result in self.results)


def units() -> str:
    """The words under the tables."""
    return _UNITS


def describe_machine(device: str, num_threads: int) -> dict[str, Any]:
    """Device, versions, and the commit where the code lies in a git tree."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "threads": num_threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def to_json(machine: dict[str, Any], reports: list[CaseReport]) -> dict[str, Any]:
    cases = [report.to_json() for report in reports]
    return {"format": FORMAT, "machine": machine, "cases": cases}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} ({len(names)} cores)" if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return torch.__version__ if package == "torch" else version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the tree this file is tracked in, with "+" after local changes."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return f"{commit}+" if changes else commit

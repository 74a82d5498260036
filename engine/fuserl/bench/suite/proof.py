"""What the GPU tests say of each op: the licence to show a number.

The tests name the ops they cover and write their outcomes line by line (tests/outcome_report.py).
An op is green where every test that covers it has run and none failed; all others are red, each
with its reason. Outcomes are kept beside the build, and hold until the sources, what was built of
them, the device or a version change.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fuserl.bench.output import write_json
from fuserl.bench.suite.processes import Job, run_until

_RUNS = {"small": ("gpu and not large", 6), "large": ("gpu and large", 1)}
"""Selections of pytest's -m, each with its workers: a worker that loses its device is replaced."""
_ONE_TEST_SECONDS = 120
_KEPT_FAILURES = 20


def in_cuda(op: str) -> str:
    """What tests of an op's CUDA C++ say that they cover."""
    return f"native {op}"


@dataclass(frozen=True, slots=True)
class Proof:
    key: Mapping[str, Any]
    """What the outcomes hold for: sources, built modules, device, versions."""
    is_whole: bool
    """Whether all tests were asked for, or only those of some ops."""
    is_complete: bool
    """Whether they ran to their end."""
    green: Mapping[str, int]
    """Tests that passed, of each op that all of them prove."""
    red: Mapping[str, str]
    """Why, of each op that is covered and not proven."""
    failures: Sequence[Mapping[str, str]] = ()
    """The first failed tests: id and reason."""
    errors: Sequence[str] = ()
    """Of collection: there are tests that nobody knows, and nothing is proven."""
    seconds: float = 0.0

    def why_red(self, ops: Iterable[str]) -> str | None:
        """Why numbers that rest on these ops must not be shown; None if they may."""
        if self.errors:
            return f"tests could not be collected: {self.errors[0]}"
        for op in ops:
            if op in self.red:
                return f"{op}: {self.red[op]}"
            if op not in self.green:
                return f"{op}: no test of it has run"
        return None

    def answers(self, ops: Collection[str]) -> bool:
        """Whether there is nothing to run for these (all, where there are none)."""
        known = self.is_whole or (bool(ops) and set(ops) <= {*self.green, *self.red})
        return self.is_complete and known

    def over(self, before: "Proof") -> "Proof":
        """These outcomes, and those of before for ops that these say nothing of."""
        known = {*self.green, *self.red}
        return Proof(
            self.key,
            self.is_whole or before.is_whole,
            self.is_complete and before.is_complete,
            {**{op: n for op, n in before.green.items() if op not in known}, **self.green},
            {**{op: why for op, why in before.red.items() if op not in known}, **self.red},
            [*self.failures, *before.failures][:_KEPT_FAILURES],
            [*self.errors, *before.errors],
            self.seconds + before.seconds,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"GPU tests ({self.seconds:.0f} s): {sum(self.green.values())} green by op"]
        lines.append(", ".join(f"{op} {number}" for op, number in sorted(self.green.items())))
        lines += [f"RED {op}: {reason}" for op, reason in sorted(self.red.items())]
        lines += [f"RED: not collected, {error}" for error in self.errors]
        return "\n".join(line for line in lines if line)


def prove(
    root: Path, ops: Collection[str], deadline: float, kept: Path, key: Mapping[str, Any]
) -> Proof:
    """Run the GPU tests of the tree at `root` (those that cover one of `ops`; all where it is
    empty) until the deadline of time.monotonic(), unless the file `kept` knows it all. What ran out
    of time is red."""
    before = _read(kept, key)
    if before is not None and before.answers(ops):
        print(f"GPU tests: as they were, for the same sources ({kept})")
        return before
    began = time.monotonic()
    kept.parent.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for name, (selection, workers) in _RUNS.items():
        report = kept.with_name(f"{name}.jsonl")
        report.unlink(missing_ok=True)
        if run_until(_job(root, selection, workers, ops, report), deadline, root) is None:
            print(f"the {name} GPU tests ran out of time", flush=True)
        lines += _lines(report)
    found = judge(lines, key, is_whole=not ops, seconds=time.monotonic() - began)
    if before is not None and before.is_complete:
        found = found.over(before)
    write_json(kept, found.to_json())
    return found


def judge(
    lines: Sequence[Mapping[str, Any]],
    key: Mapping[str, Any],
    *,
    is_whole: bool,
    seconds: float = 0.0,
) -> Proof:
    """lines: of reports of tests/outcome_report.py, which may have been cut off. Each report
    begins with all tests, also those that another run takes."""
    collected: dict[str, Sequence[str]] = {}
    outcomes: dict[str, str] = {}
    failures: list[dict[str, str]] = []
    errors: list[str] = []
    for line in lines:
        if line["kind"] == "collected":
            collected[line["id"]] = line["ops"]
        elif line["kind"] == "collection_error":
            errors.append(f"{line['id']}: {_last_line(line['reason'])}")
        elif line["kind"] == "outcome":
            if outcomes.get(line["id"]) != "failed":  # it may have failed before its teardown
                outcomes[line["id"]] = line["outcome"]
            if line["outcome"] == "failed":
                failures.append({"id": line["id"], "reason": line["reason"]})
    if not collected:
        errors.append("none was found")
    green, red = {}, {}
    for op in sorted({op for ops in collected.values() for op in ops}):
        ids = [name for name, ops in collected.items() if op in ops]
        failed = [name for name in ids if outcomes.get(name) == "failed"]
        left = [name for name in ids if name not in outcomes]
        passed = sum(outcomes.get(name) == "passed" for name in ids)
        if failed:
            red[op] = f"{len(failed)} of {len(ids)} tests failed, first {failed[0]}"
        elif left:
            red[op] = f"{len(left)} of {len(ids)} tests did not run to their end, first {left[0]}"
        elif not passed:
            red[op] = f"all of {len(ids)} tests were skipped"
        else:
            green[op] = passed
    is_complete = all(name in outcomes for name in collected) and not errors
    return Proof(key, is_whole, is_complete, green, red, failures[:_KEPT_FAILURES], errors, seconds)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def _read(path: Path, key: Mapping[str, Any]) -> Proof | None:
    if not path.exists():
        return None
    kept = Proof(**json.loads(path.read_text()))
    return kept if dict(kept.key) == dict(key) else None


def _lines(report: Path) -> list[dict[str, Any]]:
    """Without a last one that was cut off."""
    if not report.exists():
        return []
    return [json.loads(line) for line in report.read_text().split("\n")[:-1]]


def _job(root: Path, selection: str, workers: int, ops: Collection[str], report: Path) -> Job:
    """pytest, its output passed on."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", selection]
    names = [*ops, *map(in_cuda, ops)]
    command += ["--tb=short", *(f"--covers={name}" for name in sorted(names))]
    has_workers = importlib.util.find_spec("xdist") is not None
    if has_workers:
        command += ["-n", str(min(workers, os.cpu_count() or 1))]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += [f"--timeout={_ONE_TEST_SECONDS}"]
        # A wait for a kernel that never ends hears no signal: only the end of its process helps,
        # and a worker that ends is replaced.
        command += ["--timeout-method=thread"] if has_workers else []
    sources = [str(root / "engine"), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sources)),
        "FUSERL_TEST_REPORT": str(report),
    }
    print(f"$ {' '.join(command[1:])} tests", flush=True)
    return Job([*command, "tests"], environment)

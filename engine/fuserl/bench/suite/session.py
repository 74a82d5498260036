"""A run of the suite: build, prove, measure the ceilings, time a part, sum up."""

import contextlib
import faulthandler
import os
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import torch

from fuserl.bench.suite import extension, machine
from fuserl.bench.suite.cases import PARTS
from fuserl.bench.suite.part import Record, time_part
from fuserl.bench.suite.proof import prove
from fuserl.bench.suite.tables import write_summary
from fuserl.bench.timing import measure_ceilings

PART_SECONDS = 480.0
"""A part takes no longer, whatever the budget."""
_GRACE_SECONDS = 60.0
"""For the last case of a part. Then the process ends: what it has is written."""
_TEST_SHARE = 0.7
"""Of the time that is left, for the tests at most."""


def run_all(root: Path, arguments: Sequence[str], deadline: float) -> int:
    """Each part in a process of its own, which a broken device of another leaves alone, with an
    equal share of the seconds that are left. arguments: those of benchmarks/gpu, but for the part
    and the budget. Returns the exit code."""
    worst = 0
    for number, part in enumerate(PARTS):
        seconds = (deadline - time.monotonic()) / (len(PARTS) - number)
        if seconds <= 0:
            print(f"{part}: the seconds were used up")
            worst = 1
            continue
        chosen = ["--part", part, "--budget", f"{seconds:.0f}"]
        command = [sys.executable, str(root / "benchmarks" / "gpu"), *chosen, *arguments]
        worst = max(worst, subprocess.run(command).returncode)
    return worst


def run_session(
    root: Path,
    *,
    part: str,
    ops: Collection[str],
    deadline: float,
    out: Path,
    commit: str | None,
) -> int:
    """part: a key of PARTS. ops: only those. deadline: of time.monotonic(). Returns the exit code:
    0 where all asked for was proven and right."""
    out.mkdir(parents=True, exist_ok=True)  # where that fails, before minutes are spent
    deadline = min(deadline, time.monotonic() + PART_SECONDS)
    print(extension.build(root), flush=True)
    found = machine.describe(root, "cuda", commit)
    print("\n".join(f"{name}: {value}" for name, value in found.items()), end="\n\n", flush=True)
    proof = prove(
        root,
        ops,
        time.monotonic() + _TEST_SHARE * (deadline - time.monotonic()),
        root / "build" / "gpu" / "proof.json",
        {name: found[name] for name in ("sources", "modules", "device", "versions")},
    )
    print(f"{proof}\n", flush=True)
    torch.manual_seed(0)
    ceilings = measure_ceilings("cuda", "bf16")
    print(f"ceilings: {ceilings}\n", flush=True)
    record = Record(out / f"{part}.json", part, found, ceilings, proof)
    with _ended_after(deadline + _GRACE_SECONDS, out):
        wrong = time_part(PARTS[part], record, deadline, ops)
    print(write_summary(out))
    return int(bool(wrong or proof.red or proof.errors))


@contextlib.contextmanager
def _ended_after(end: float, out: Path) -> Iterator[None]:
    """Ends the process where the block runs beyond `end` (of time.monotonic()): a kernel that never
    ends, or a rival that compiles for minutes, must not take the summary along."""
    timer = threading.Timer(max(0.0, end - time.monotonic()), _give_up, (out,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(out: Path) -> None:
    faulthandler.dump_traceback()
    print("the last case did not end, and is given up", flush=True)
    print(write_summary(out), flush=True)
    os._exit(1)

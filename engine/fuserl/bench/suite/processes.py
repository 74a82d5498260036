"""Commands with an end: what they started themselves ends with them."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True, slots=True)
class Job:
    command: Sequence[str]
    environment: Mapping[str, str]
    output: IO[str] | None = None
    """A file for what it prints; passed on without one."""


def run_until(job: Job, deadline: float, cwd: Path) -> int | None:
    """Its exit code; None where it was killed at the deadline of time.monotonic()."""
    process = subprocess.Popen(
        job.command,
        cwd=cwd,
        env=dict(job.environment),
        stdout=job.output,
        stderr=None if job.output is None else subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

"""Builds the native modules in place, where a machine has the compilers."""

import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from fuserl.bench.suite.processes import Job, run_until
from fuserl_kernels import cuda_build

_LONGEST_SECONDS = 240.0
_KEPT_LINES = 15


@dataclass(frozen=True, slots=True)
class Build:
    """What came of it."""

    mode: str
    """FUSERL_BUILD: cuda, cpu, or none where nothing was tried."""
    is_built: bool
    seconds: float
    said: str
    """Why not, or the end of what a failing compiler printed."""

    def __str__(self) -> str:
        if self.is_built:
            return f"native modules ({self.mode}): built in place, {self.seconds:.0f} s"
        return f"native modules ({self.mode}): not built, {self.said}"


def build(root: Path) -> Build:
    """The CPU's and, with nvcc, CUDA's. A failure is told, not raised: Triton's kernels need none
    of it. To be called before anything looks for the modules."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        return Build("none", False, 0.0, "there is no C++ compiler")
    mode = "cuda" if cuda_build.nvcc() else "cpu"
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--parallel", "8"]
    environment = {**os.environ, "FUSERL_BUILD": mode}
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        code = run_until(Job(command, environment, output), began + _LONGEST_SECONDS, root)
        output.seek(0)
        said = output.read()
    seconds = time.monotonic() - began
    if code is None:
        return Build(mode, False, seconds, f"not done after {_LONGEST_SECONDS:.0f} s")
    if code == 0:
        return Build(mode, True, seconds, "")
    end = "\n".join(said.strip().splitlines()[-_KEPT_LINES:])
    return Build(mode, False, seconds, f"the build failed:\n{end}")

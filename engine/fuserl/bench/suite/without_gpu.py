"""What can be known of the GPU paths on a machine without one."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fuserl.bench.output import write_json
from fuserl.bench.suite import machine


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    command: tuple[str, ...]
    interpreted: bool = False


CHECKS = (
    Check("every Triton kernel, compiled for every target", ("-m", "fuserl_kernels.compile_gate")),
    Check("every CUDA kernel, compiled by nvcc", ("-m", "fuserl_kernels.cuda_gate")),
    Check(
        "the kernels in Triton's interpreter, CUDA's on emulated threads",
        ("-m", "pytest", "-q", "tests/kernels", "-k", "triton or cuda"),
        interpreted=True,
    ),
    Check(
        "captured steps, polling, and the suite itself on tiny cases",
        ("-m", "pytest", "-q", "tests/engine", "-k", "captured or device_step or suite or bench"),
        interpreted=True,
    ),
)


def run_without_gpu(root: Path, out: Path) -> int:
    """Run the checks, and say plainly that nothing was timed. Returns the exit code."""
    passed = {check.name: _passes(root, check) for check in CHECKS}
    write_json(
        out / "without_gpu.json",
        {"machine": machine.describe(root, "cpu", None), "passed": passed},
    )
    for name, is_good in passed.items():
        print(f"{'passed' if is_good else 'FAILED'}: {name}")
    print("torch sees no CUDA device: nothing was timed, and no GPU test has run.")
    return 0 if all(passed.values()) else 1


def _passes(root: Path, check: Check) -> bool:
    sources = [str(root / "engine"), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sources))}
    if check.interpreted:
        environment["TRITON_INTERPRET"] = "1"
    print(f"$ python {' '.join(check.command)}", flush=True)
    command = [sys.executable, *check.command]
    return subprocess.run(command, cwd=root, env=environment).returncode == 0

"""How csrc/cuda is compiled: for setup.py, which loads this file alone, and for the gate.

Imports nothing but the standard library. An NVIDIA GPU is not needed to compile for one.
"""

import importlib.util
import os
import runpy
import shutil
import subprocess
from pathlib import Path

ARCHITECTURES = ("80", "90", "100")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fmad=false",  # the bits of a row's statistics are those of kernels compiled without fusion
)


def nvcc() -> Path | None:
    """NVIDIA's compiler: that of CUDA_HOME, else on the path, else in the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [os.path.join(home, "bin")] if home else [None, "/usr/local/cuda/bin"]
    found = (shutil.which("nvcc", path=place) for place in places)
    return next((Path(compiler) for compiler in found if compiler), None)


def torch_cuda() -> str | None:
    """The CUDA version that the installed torch was built for: None for a CPU build, or no torch.

    Read from torch's version file: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version = Path(spec.origin).with_name("version.py")
    return runpy.run_path(str(version)).get("cuda") if version.exists() else None


def architectures(compiler: Path) -> tuple[str, ...]:
    """Those of ARCHITECTURES that a compiler knows."""
    listed = subprocess.run(
        [compiler, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    return tuple(name for name in ARCHITECTURES if f"sm_{name}" in listed)


def version(compiler: Path) -> str:
    """Of the compiler, as it gives it: 13.0.88."""
    told = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    return told.stdout.rpartition(" V")[2].split()[0]


def targets(names: tuple[str, ...]) -> list[str]:
    """Options for machine code of each architecture, and for later GPUs the newest's PTX."""
    codes = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [*codes, f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]


def build_module(sources: list[str], include: list[str], target: Path) -> None:
    """Compile and link a Python extension; what the compiler says goes to the terminal.

    Raises FileNotFoundError without a compiler, ValueError for one that is too old for
    ARCHITECTURES, subprocess.CalledProcessError when it fails."""
    compiler = nvcc()
    if compiler is None:
        raise FileNotFoundError(
            "nvcc is neither in CUDA_HOME, nor on the PATH, nor in /usr/local/cuda"
        )
    names = architectures(compiler)
    if not names:
        raise ValueError(f"{compiler} compiles for none of sm_{', sm_'.join(ARCHITECTURES)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    command: list[str | Path] = [compiler, "-shared", *FLAGS, *targets(names), "--threads", "0"]
    command.append(f'-DFUSERL_ARCHITECTURES="{" ".join(f"sm_{name}" for name in names)}"')
    command += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    for folder in include:
        command += ["-I", folder]
    subprocess.run([*command, *sources, "-o", target], check=True)

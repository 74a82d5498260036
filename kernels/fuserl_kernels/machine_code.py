"""What an NVIDIA binary needs and does, read with the tools of Triton's wheel."""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

from fuserl_kernels.triton_runtime import triton

# Global memory (LDGSTS: straight into shared memory, UTMALDG: a tile by the copy engine), local
# memory, and the tensor cores (HGMMA: of four warps, HMMA: of one).
_ACCESSES = {"LDG": "load", "LDGSTS": "load", "STG": "store"}
_NAMES = ("UTMALDG", "LDL", "STL", "HGMMA", "HMMA")
_BITS = {"128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)([.\w]*)", re.M)


def tool(name: str) -> Path:
    """Where Triton's wheel has one of NVIDIA's programs."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _run(name: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool(name), *options, file.name], capture_output=True, text=True, check=True
        )
    return done.stdout


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of a thread."""
    report = _run("cuobjdump", cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resource usage: {report!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def instructions(cubin: bytes) -> dict[str, int]:
    """How many there are of those that matter: "load 128" and the like by their bits a thread, and
    others by their name. Not how often they run.

    Takes a tenth of a second or two, beside half a second for the compiler."""
    counts: Counter[str] = Counter()
    for name, modifiers in _INSTRUCTION.findall(_run("nvdisasm", cubin, "-c", "-ndf")):
        if name in _ACCESSES:
            bits = next((_BITS[part] for part in modifiers.split(".") if part in _BITS), 32)
            counts[f"{_ACCESSES[name]} {bits}"] += 1
        elif name in _NAMES:
            counts[name] += 1
    return dict(sorted(counts.items()))


def narrow_loads(counts: dict[str, int], bits: int) -> int:
    """Loads of global memory of fewer bits a thread."""
    return sum(
        count
        for name, count in counts.items()
        if name.startswith("load ") and int(name.removeprefix("load ")) < bits
    )

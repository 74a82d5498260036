"""`python -m fuserl_kernels.cuda_gate`: every CUDA C++ kernel compiles for every target, and fits.

In the repository's root, on any machine with nvcc, with or without a GPU. Registers, spills and
shared memory are ptxas's own account, the occupancy is computed from them, and the machine code is
searched for the 128-bit loads that a row should be read with (by the cuobjdump of the toolkit or
of Triton's wheel). A row of the table fails where a kernel breaks its bounds. Exit code 1 then, or
when nvcc fails; without nvcc nothing is compiled, and that is said.

    --sources FOLDER   default csrc/cuda
    --json FILE        the rows as JSON
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fuserl_kernels import cuda_build
from fuserl_kernels.compile_gate import occupancy
from fuserl_kernels.machine_code import tool
from fuserl_kernels.triton_runtime import why_no_compiler

_READ: Any = {"capture_output": True, "text": True}


@dataclass(frozen=True)
class Bounds:
    """What each instantiation of a kernel must keep to. Nothing may spill."""

    num_warps: int  # of a block
    min_warps: int  # resident on a multiprocessor
    min_wide_loads: int  # 128-bit loads from global memory in the code


BOUNDS = {
    # Two blocks hide what one waits for; four turns of a row are loaded at once.
    "sample_row": Bounds(num_warps=8, min_warps=16, min_wide_loads=4),
}


@dataclass(frozen=True)
class Row:
    """One kernel for one target. Counts are a thread's (registers, spills), a block's (shared
    memory) or a multiprocessor's (blocks, warps); None where no disassembler was found."""

    kernel: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    blocks: int
    warps: int
    wide_loads: int | None
    failures: tuple[str, ...]


def _cuobjdump(compiler: Path) -> Path | None:
    candidates = [compiler.resolve().with_name("cuobjdump")]
    if why_no_compiler() is None:
        candidates.append(tool("cuobjdump"))
    return next((path for path in candidates if path.exists()), None)


def readable(symbols: list[str]) -> dict[str, str]:
    """Each kernel's name as written in C++, without namespaces and parameters."""
    names = symbols
    if symbols and (demangler := shutil.which("c++filt")) is not None:
        done = subprocess.run([demangler, *symbols], **_READ, check=True)
        names = done.stdout.splitlines()
    pattern = re.compile(r"\w+::|\(anonymous namespace\)::|void ")
    short = [pattern.sub("", name).partition("(")[0] for name in names]
    return dict(zip(symbols, short, strict=True))


def resources(report: str) -> Iterator[tuple[str, int, int, int]]:
    """(symbol, registers, spilled bytes, shared bytes) of each kernel in what `ptxas -v` says."""
    for part in re.split(r"Compiling entry function '", report)[1:]:
        symbol = part.partition("'")[0]
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part)
        used = re.search(r"Used (\d+) registers", part)
        if stack is None or used is None:
            raise RuntimeError(f"ptxas reported no resources of {symbol}: {part!r}")
        shared = re.search(r"(\d+) bytes smem", part)
        yield symbol, int(used[1]), sum(map(int, stack.groups())), int(shared[1]) if shared else 0


def wide_loads(assembly: str) -> dict[str, int]:
    """128-bit loads from global memory in each function that cuobjdump prints."""
    functions = re.split(r"Function : ", assembly)[1:]
    return {text.split()[0]: len(re.findall(r"\bLDG\.E\S*\.128", text)) for text in functions}


def judge(
    kernel: str,
    target: str,
    registers: int,
    spill_bytes: int,
    shared_bytes: int,
    num_wide_loads: int | None,
) -> Row:
    """A kernel without bounds fails: each is to have its own."""
    name = kernel.partition("<")[0]
    bounds = BOUNDS.get(name)
    failures, blocks, warps = [], 0, 0
    if bounds is None:
        failures.append(f"BOUNDS has no {name}")
    else:
        blocks, warps = occupancy(target, registers, shared_bytes, bounds.num_warps)
        if warps < bounds.min_warps:
            failures.append(f"{warps} warps resident, fewer than {bounds.min_warps}")
        if num_wide_loads is not None and num_wide_loads < bounds.min_wide_loads:
            failures.append(f"{num_wide_loads} loads of 128 bits, not {bounds.min_wide_loads}")
    if spill_bytes:
        failures.append(f"{spill_bytes} bytes spilled")
    return Row(
        kernel,
        target,
        registers,
        spill_bytes,
        shared_bytes,
        blocks,
        warps,
        num_wide_loads,
        tuple(failures),
    )


def measure(compiler: Path, source: Path, architecture: str) -> list[Row]:
    """Compile one file for one target. Raises RuntimeError with the compiler's message."""
    target = f"sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [str(compiler), "-cubin", *cuda_build.FLAGS, f"-arch={target}", "-Xptxas", "-v"]
        command += ["-I", str(source.parents[1]), str(source), "-o", str(cubin)]
        done = subprocess.run(command, **_READ, check=False)
        if done.returncode:
            raise RuntimeError(f"{source} does not compile for {target}:\n{done.stderr}")
        loads: dict[str, int] = {}
        if (disassembler := _cuobjdump(compiler)) is not None:
            sass = [str(disassembler), "-sass", str(cubin)]
            loads = wide_loads(subprocess.run(sass, **_READ, check=True).stdout)
    found = list(resources(done.stderr))
    names = readable([symbol for symbol, *_ in found])
    return [
        judge(names[symbol], target, registers, spilled, shared, loads.get(symbol))
        for symbol, registers, spilled, shared in found
    ]


def _print_table(rows: list[Row]) -> None:
    print(
        f"{'kernel':44} {'target':7} {'regs':>4} {'spill':>5} {'shared':>7} {'blocks':>6} "
        f"{'warps':>5} {'wide':>5}"
    )
    for row in rows:
        print(
            f"{row.kernel:44} {row.target:7} {row.registers:4} {row.spill_bytes:5} "
            f"{row.shared_bytes:7} {row.blocks:6} {row.warps:5} "
            f"{'-' if row.wide_loads is None else row.wide_loads:>5}"
            + "".join(f"\n    FAILS: {failure}" for failure in row.failures)
        )
    print(
        "regs, spill (bytes): a thread; shared (bytes): a block; blocks, warps: resident on a "
        "multiprocessor;\nwide: 128-bit loads in the code."
    )


def main() -> int:
    """Compile, print, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fuserl_kernels.cuda_gate", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--sources", type=Path, default=Path("csrc/cuda"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sources = sorted(options.sources.glob("*.cu"))
    if not sources:
        parser.error(f"{options.sources} holds no .cu file; run in the repository's root")
    compiler = cuda_build.nvcc()
    if compiler is None:
        print("nvcc is not installed, so no CUDA kernel was compiled")
        return 0
    jobs = [
        (compiler, source, name)
        for source in sources
        for name in cuda_build.architectures(compiler)
    ]
    with ThreadPoolExecutor(2) as pool:
        try:
            rows = [row for part in pool.map(lambda job: measure(*job), jobs) for row in part]
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    _print_table(rows)
    failed = sum(bool(row.failures) for row in rows)
    version = cuda_build.version(compiler)
    print(f"{len(rows)} compiled with nvcc {version}, {failed} failed")
    if options.json:
        report = {"nvcc": version, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())

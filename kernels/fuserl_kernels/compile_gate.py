"""`python -m fuserl_kernels.compile_gate`: every Triton kernel compiles for every target, and fits.

Each kernel, configuration and typical signature (compile_cases/) is compiled ahead of time on any
machine, with or without a GPU. For NVIDIA targets registers and stack are read from the cubin,
shared memory from Triton's metadata, and the occupancy is computed from the three; for AMD the
assembler's own counts are read. Where a case expects any of Hopper's instructions, they are
counted. A row fails where it does not compile, spills more than its case allows, keeps fewer warps
resident, reads its tensors in narrower pieces, or leaves the tensor cores that its case names. Exit
code 1 then.

    --op NAME --target NAME   only these (repeatable)
    --first                   only the first case of each op and target
    --json FILE               the rows as JSON
"""

import argparse
import json
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fuserl_kernels.compile_cases import TARGETS, Case, cases
from fuserl_kernels.machine_code import instructions, narrow_loads, resources
from fuserl_kernels.triton_runtime import triton, why_no_compiler

_REGISTERS = 65536  # of a multiprocessor, on each NVIDIA target
_MAX_WARPS, _MAX_BLOCKS = 64, 32
_RESERVED_SHARED = 1024  # bytes the driver keeps of each block's shared memory
_SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
_DISASSEMBLED = "sm_90"  # the target whose instructions are counted
_SCALAR_LOADS = 8  # of a kernel that reads its tensors in wide ones
_LDS = 64 * 1024  # bytes of a compute unit of gfx942


@dataclass(frozen=True)
class Row:
    """What one case became. Counts are a thread's (registers, spills), a block's (shared memory) or
    a multiprocessor's (blocks, warps); for AMD the occupancy is left out. instructions: as
    machine_code counts them, where the case expects any."""

    op: str
    variant: str
    target: str
    configuration: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    blocks: int | None
    warps: int | None
    bytes_moved: float
    floor_ms: float
    instructions: dict[str, int]
    failures: tuple[str, ...]


def _compile(case: Case) -> Any:
    """The kernel compiled for the case's target."""
    compiler = import_module("triton.compiler")
    target = import_module("triton.backends.compiler").GPUTarget
    options = case.configuration.arguments()
    arguments = case.arguments | {name: options.pop(name) for name in case.configuration.constants}
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(case.function.arg_names):
        value = arguments[name]
        is_type = isinstance(value, str) and not case.function.params[position].is_constexpr
        signature[name] = value.removesuffix(":16") if is_type else "constexpr"
        if not is_type:
            constants[name] = value
        elif value.endswith(":16"):
            attributes[(position,)] = [["tt.divisibility", 16]]
    if case.target.startswith("sm_"):
        gpu = target("cuda", int(case.target.removeprefix("sm_")), 32)
    else:
        gpu = target("hip", case.target, 64)
    source = compiler.ASTSource(case.function, signature, constants, attributes)
    return compiler.compile(source, target=gpu, options=options)


def occupancy(target: str, registers: int, shared_bytes: int, num_warps: int) -> tuple[int, int]:
    """(blocks, warps) resident on a multiprocessor of an NVIDIA target.

    Registers go to a warp in units of 256, and each quarter of the processor holds a quarter."""
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = _REGISTERS // 4 // per_warp * 4 // num_warps
    by_shared = _SHARED[target] // (shared_bytes + _RESERVED_SHARED)
    blocks = min(by_registers, by_shared, _MAX_WARPS // num_warps, _MAX_BLOCKS)
    return blocks, blocks * num_warps


def _amd_count(assembly: str, name: str) -> int:
    return max(map(int, re.findall(rf"\.{name}:\s*(\d+)", assembly)))


def _wrong_instructions(case: Case, counts: dict[str, int]) -> list[str]:
    """What a case expects of its instructions and does not find."""
    failures = []
    narrow = narrow_loads(counts, case.load_bits)
    if narrow > _SCALAR_LOADS:
        failures.append(f"{narrow} loads of fewer than {case.load_bits} bits")
    if case.load_bits and narrow == narrow_loads(counts, 1024):
        failures.append(f"no loads of {case.load_bits} bits")
    if case.tensor_cores and case.tensor_cores not in counts:
        failures.append(f"no {case.tensor_cores} instruction")
    if case.max_spill_bytes == 0 and ("LDL" in counts or "STL" in counts):
        failures.append("local memory is read or written")
    return failures


def measure(case: Case) -> Row:
    """Compile one case and judge it; a compiler's error becomes a failure of the row."""
    failures = []
    registers = spill_bytes = shared_bytes = 0
    blocks = warps = None
    counts: dict[str, int] = {}
    try:
        kernel = _compile(case)
    except Exception as error:
        failures.append(f"does not compile: {type(error).__name__}: {str(error)[:200]}")
    else:
        shared_bytes = kernel.metadata.shared
        if case.target in _SHARED:
            registers, spill_bytes = resources(kernel.asm["cubin"])
            blocks, warps = occupancy(
                case.target, registers, shared_bytes, kernel.metadata.num_warps
            )
            if warps < case.min_warps:
                failures.append(f"{warps} warps resident, fewer than {case.min_warps}")
            if case.target == _DISASSEMBLED and (case.load_bits or case.tensor_cores):
                counts = instructions(kernel.asm["cubin"])
                failures += _wrong_instructions(case, counts)
        else:
            registers = _amd_count(kernel.asm["amdgcn"], "vgpr_count")
            spill_bytes = 4 * _amd_count(kernel.asm["amdgcn"], "vgpr_spill_count")
            if shared_bytes > _LDS:
                failures.append(f"{shared_bytes} bytes of LDS, more than {_LDS}")
        if spill_bytes > case.max_spill_bytes:
            failures.append(f"{spill_bytes} bytes spilled, more than {case.max_spill_bytes}")
    return Row(
        case.op,
        case.variant,
        case.target,
        str(case.configuration),
        registers,
        spill_bytes,
        shared_bytes,
        blocks,
        warps,
        case.num_bytes,
        case.floor_ms(),
        counts,
        tuple(failures),
    )


def _selected(ops: list[str], targets: list[str], first: bool) -> list[Case]:
    chosen: list[Case] = []
    for target in targets or TARGETS:
        for case in cases(target):
            wanted = not ops or case.op in ops
            seen = any((c.op, c.target) == (case.op, case.target) for c in chosen)
            if wanted and not (first and seen):
                chosen.append(case)
    return chosen


def _measure_one(ops: list[str], targets: list[str], first: bool, position: int) -> Row:
    """In a worker: kernels do not travel between processes, their positions do."""
    return measure(_selected(ops, targets, first)[position])


def _print_table(rows: list[Row]) -> None:
    print(
        f"{'op':22} {'variant':28} {'target':7} {'configuration':56} "
        f"{'regs':>4} {'spill':>5} {'shared':>7} {'blocks':>6} {'warps':>5} {'MB':>6} {'ms':>6}"
    )
    for row in rows:
        print(
            f"{row.op:22} {row.variant:28} {row.target:7} {row.configuration:56} "
            f"{row.registers:4} {row.spill_bytes:5} {row.shared_bytes:7} "
            f"{'-' if row.blocks is None else row.blocks:>6} "
            f"{'-' if row.warps is None else row.warps:>5} "
            f"{row.bytes_moved / 1e6:6.0f} {row.floor_ms:6.2f}  "
            + " ".join(f"{name.replace(' ', '')}:{n}" for name, n in row.instructions.items())
            + "".join(f"\n    FAILS: {failure}" for failure in row.failures)
        )
    print(
        "regs, spill (bytes): a thread; shared (bytes): a block; blocks, warps: resident on a "
        "multiprocessor.\nMB: device memory by design, ms: at an H200's measured limits; both at "
        "N=8192, V=128256, D=4096, for ops on [B, T] at B=512, T=1024, for the sampler at B=256.\n"
        f"Behind these, for {_DISASSEMBLED}: instructions; load128: of 128 bits a thread."
    )


def main() -> int:
    """Compile, print, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fuserl_kernels.compile_gate", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--op", action="append", default=[])
    parser.add_argument("--target", action="append", default=[], choices=TARGETS)
    parser.add_argument("--first", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if (reason := why_no_compiler()) is not None:
        print(reason, file=sys.stderr)
        return 1
    selection = (options.op, options.target, options.first)
    count = len(_selected(*selection))
    if count == 0:
        parser.error(f"no kernel belongs to {options.op}")
    with tempfile.TemporaryDirectory() as cache:
        # Nothing stale may pass: compile always, and into a folder of this run.
        os.environ |= {
            "TRITON_INTERPRET": "0",
            "TRITON_ALWAYS_COMPILE": "1",
            "TRITON_CACHE_DIR": cache,
        }
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            rows = list(pool.map(partial(_measure_one, *selection), range(count)))
    _print_table(rows)
    failed = sum(bool(row.failures) for row in rows)
    print(f"{count} compiled with Triton {triton.__version__}, {failed} failed")
    if options.json:
        report = {"triton": triton.__version__, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

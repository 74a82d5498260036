"""Triton in one place: imported or explained, and which configuration a kernel runs with.

Where Triton cannot be imported (macOS), `triton` and `tl` are stand-ins that let device code be
defined and never run. Under TRITON_INTERPRET=1, set before the first import, kernels run on CPU
tensors in Triton's interpreter: slow, for tests. `python -m fuserl_kernels.compile_gate` builds
every kernel for every target ahead of time, on a machine without a GPU.
"""

import importlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


class _Absent:
    """Stands for any name of Triton: decorates to itself, and has every attribute."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *_: object, **__: object) -> "_Absent":
        return self


triton: Any = _Absent()
tl: Any = _Absent()
_reason: str | None = None
try:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
except ImportError as error:
    _reason = f"Triton is not usable ({error}); on Linux: pip install triton"

INTERPRETING: bool = _reason is None and bool(triton.knobs.runtime.interpret)


def why_no_compiler() -> str | None:
    """None where Triton can be imported, else the reason and the remedy."""
    return _reason


def why_absent() -> str | None:
    """None where kernels can run, else the reason and the remedy."""
    if _reason is not None or INTERPRETING or torch.cuda.is_available():
        return _reason
    return "torch finds no GPU; for tests on the CPU set TRITON_INTERPRET=1 before the import"


def device_type() -> str:
    """The type of device whose tensors the kernels take: "cpu" under the interpreter."""
    return "cpu" if INTERPRETING else "cuda"


def describe() -> str:
    """Version and way of running, for a doctor command."""
    return f"version {triton.__version__}" + (", interpreter on the CPU" if INTERPRETING else "")


@dataclass(frozen=True)
class Configuration:
    """One way to compile a kernel: warps a program, depth of the pipeline, block sizes."""

    num_warps: int
    num_stages: int
    constants: dict[str, int | bool] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a launch. Fusing a * b + c is left to tl.fma in the source, so that
        two kernels that share a device function share its bits."""
        return {
            **self.constants,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": False,
        }

    def __str__(self) -> str:
        blocks = " ".join(
            f"{name.removeprefix('BLOCK_')}={int(size)}" for name, size in self.constants.items()
        )
        return f"{blocks} warps={self.num_warps} stages={self.num_stages}".strip()


# A choice made with this many rows holds for more: enough to fill a GPU several times, few enough
# for a small scratch buffer.
TUNING_ROWS = 1024

_fastest: dict[Hashable, Configuration] = {}


def fastest(
    key: Hashable, configurations: Sequence[Configuration], launch: Callable[[Configuration], None]
) -> Configuration:
    """The configuration with the lowest median time, measured once a key and process.

    launch: runs the kernel; it is called many times, so it writes into scratch memory where the
        real call works in place. Used only for kernels whose bits are equal in every configuration.
    The interpreter and a stream under capture, where nothing can be timed, take the first one
    unless the choice was made before.
    """
    if len(configurations) == 1 or INTERPRETING:
        return configurations[0]
    if key not in _fastest:
        if torch.cuda.is_current_stream_capturing():
            return configurations[0]
        testing = importlib.import_module("triton.testing")
        times = [
            testing.do_bench(lambda c=c: launch(c), warmup=5, rep=30, return_mode="median")
            for c in configurations
        ]
        _fastest[key] = configurations[times.index(min(times))]
    return _fastest[key]


def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU: the size of a persistent grid. The interpreter has one
    thread, and two programs there are enough to make them share the work."""
    if INTERPRETING:
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count

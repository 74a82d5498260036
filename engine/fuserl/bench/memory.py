"""Peak memory of one call, and what many leave behind: allocated on a CUDA device, resident on a
Linux CPU."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # writing this makes the high-water mark the present size
_WARM_UPS = 3


def _resident_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def why_not_measured(device: str) -> str | None:
    """None where peak_extra_bytes works."""
    if device == "cuda" or (_CLEAR.exists() and _STATUS.exists()):
        return None
    return "peak memory needs /proc/self/clear_refs (Linux)"


def peak_extra_bytes(device: str, run: Callable[[], object]) -> int:
    """The most memory in use during run() beyond what was in use before it; its result counts.

    Needs why_not_measured(device) to be None.
    """
    gc.collect()
    before = reset_peak(device)
    result = run()
    peak = peak_bytes(device)
    del result
    return max(0, peak - before)


def reset_peak(device: str) -> int:
    """Watch for the most memory in use from here on. Returns what is in use now.

    On the CPU what earlier calls left in the allocator is given back first, so that it is counted
    when it is used again (which takes time). Needs why_not_measured(device) to be None.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    _trim()
    _CLEAR.write_text(_RESET_PEAK)
    return _resident_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    """The most memory in use since reset_peak."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _resident_bytes("VmHWM")


def growth_bytes(device: str, run: Callable[[], object], num_calls: int) -> int:
    """How much more memory is in use after num_calls of run() than after a few, what the allocator
    keeps apart: near 0 unless something is held. Needs why_not_measured(device) to be None."""
    for _ in range(_WARM_UPS):
        run()
    before = _in_use(device)
    for _ in range(num_calls):
        run()
    return _in_use(device) - before


def _in_use(device: str) -> int:
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    _trim()
    return _resident_bytes("VmRSS")


def _trim() -> None:
    """Give back what the allocator keeps; glibc alone has it, others do so by themselves."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

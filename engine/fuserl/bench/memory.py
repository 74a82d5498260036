"""Peak memory of one call: allocated on a CUDA device, resident on a Linux CPU."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"  # writing this makes the high-water mark the present size


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

    On the CPU what earlier calls left in the allocator is given back first, so that it is counted
    when it is used again. Needs why_not_measured(device) to be None.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # glibc alone has it; others give memory back by themselves
            trim(0)
        _CLEAR.write_text(_RESET_PEAK)
        before = _resident_bytes("VmRSS")
        result = run()
        peak = _resident_bytes("VmHWM")
    del result
    return max(0, peak - before)

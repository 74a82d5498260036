"""Which implementation of an op runs: one process-wide choice, read each time an op runs.

The choice is not thread local, because autograd runs backward passes in threads of its own.
`auto` takes triton for CUDA tensors and native for CPU tensors where the op has them and they
take the dtype, and the reference otherwise. An explicit choice never falls back: it runs or
raises RuntimeError. An op whose native implementation has a CUDA half runs it by that choice only:
none has been timed against Triton's on a GPU yet.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fuserl_kernels import native, triton_runtime

CHOICES = ("auto", "triton", "native", "reference")
Table = Mapping[str, Callable]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of all but the reference


class PerDevice:
    """An implementation with a function for each type of device."""

    def __init__(self, **functions: Callable) -> None:
        self.functions = functions

    def __call__(self, tensor: torch.Tensor, *rest: Any) -> Any:
        return self.functions[tensor.device.type](tensor, *rest)


def _valid(choice: str, source: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{source} must be one of {', '.join(CHOICES)}, not {choice!r}")
    return choice


_choice = _valid(os.environ.get("FUSERL_BACKEND", "auto"), "FUSERL_BACKEND")


@contextlib.contextmanager
def use_backend(choice: str) -> Iterator[None]:
    """Run every op inside the block with one implementation, in all threads of the process.

    choice: "auto", "triton", "native" or "reference"; the default outside any block is the
    environment variable FUSERL_BACKEND, else "auto". Under an explicit choice an op that has no
    such implementation, or cannot run it on its device or dtype, raises RuntimeError.
    Raises ValueError for any other name.
    """
    global _choice
    previous, _choice = _choice, _valid(choice, "backend")
    try:
        yield
    finally:
        _choice = previous


def _device_types(choice: str, implementation: Callable) -> list[str]:
    """Where an implementation other than the reference runs."""
    if isinstance(implementation, PerDevice):
        return list(implementation.functions)
    return ["cpu"] if choice == "native" else [triton_runtime.device_type()]


def _why_not(choice: str, table: Table, tensor: torch.Tensor) -> str | None:
    """The reason `choice` cannot run an op on `tensor`, with its remedy; None if it can."""
    if choice not in table:
        return f"the op has no such implementation; choose one of {', '.join(('auto', *table))}"
    if choice == "reference":
        return None
    if choice == "triton" and (absent := triton_runtime.why_absent()) is not None:
        return absent
    devices = _device_types(choice, table[choice])
    if tensor.device.type not in devices:
        needed = " or ".join(devices)
        return f"it needs a {needed} tensor, not {tensor.device}; move the tensors or choose auto"
    if tensor.dtype not in _DTYPES:
        names = ", ".join(str(dtype) for dtype in _DTYPES)
        return f"it takes {names}, not {tensor.dtype}; convert the tensors or choose auto"
    return native.why_absent(tensor.device.type) if choice == "native" else None


def select(op: str, table: Table, tensor: torch.Tensor) -> Callable:
    """The entry of `table` that runs now for an op whose main tensor is `tensor`."""
    if _choice == "auto":
        preferred = "triton" if tensor.device.type == "cuda" else "native"
        if preferred in table and _why_not(preferred, table, tensor) is None:
            return table[preferred]
        return table["reference"]
    reason = _why_not(_choice, table, tensor)
    if reason is not None:
        raise RuntimeError(f"fuserl_kernels::{op} cannot run with backend {_choice!r}: {reason}")
    return table[_choice]


def available() -> dict[str, str]:
    """For each implementation whether it can run here: "yes" with details, or "no" and why."""
    report = {"reference": "yes"}
    for name, device_type in (("native", "cpu"), ("native cuda", "cuda")):
        reason = native.why_absent(device_type)
        report[name] = f"no: {reason}" if reason else f"yes ({native.describe(device_type)})"
    reason = triton_runtime.why_absent()
    report["triton"] = f"no: {reason}" if reason else f"yes ({triton_runtime.describe()})"
    return report

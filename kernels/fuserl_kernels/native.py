"""Loads the optional compiled modules, `fuserl_kernels._native` for the CPU and `_cuda` for CUDA
tensors, and says why one is absent. The functions speak of the CPU's unless told otherwise."""

import functools
import importlib
from typing import Any

import torch

_MODULES = {
    "cpu": ("_native", "CPU", "with FUSERL_BUILD=require to see the compiler's message"),
    "cuda": ("_cuda", "CUDA", "with FUSERL_BUILD=cuda, where nvcc and a C++ compiler are"),
}


@functools.cache
def _load(device_type: str) -> tuple[Any, str | None]:
    name, kernels, remedy = _MODULES[device_type]
    try:
        return importlib.import_module(f"fuserl_kernels.{name}"), None
    except ImportError as error:
        return None, (
            f"the compiled {kernels} kernels are not usable ({error}); install again {remedy}"
        )


def why_absent(device_type: str = "cpu") -> str | None:
    """None when the compiled module is loaded, else the reason and the remedy."""
    return _load(device_type)[1]


def module(device_type: str = "cpu") -> Any:
    """The compiled module; raises RuntimeError with the reason when it is absent."""
    loaded, reason = _load(device_type)
    if reason is not None:
        raise RuntimeError(reason)
    return loaded


def address(tensor: torch.Tensor | None) -> int:
    """Where a tensor's memory starts; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype(tensor: torch.Tensor) -> Any:
    """The name its device's module has for the dtype of a float32, bf16 or fp16 tensor."""
    return getattr(module(tensor.device.type).Dtype, str(tensor.dtype).removeprefix("torch."))


def advise_large_pages(tensor: torch.Tensor) -> None:
    """Ask for large pages under a new tensor on the CPU that nobody has written to: walks over
    memory by small pages spend much of their time on finding them. Without the compiled module
    nothing happens."""
    if tensor.device.type == "cpu" and why_absent() is None:
        module().advise_large_pages(tensor.data_ptr(), tensor.nbytes)


def describe(device_type: str = "cpu") -> str:
    """Compiler, and instruction set or architectures, for a doctor command."""
    return ", ".join(f"{key} {value}" for key, value in module(device_type).build_info().items())

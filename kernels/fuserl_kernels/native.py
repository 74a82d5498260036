"""Loads the optional compiled module `fuserl_kernels._native` and says why when it is absent."""

import functools
import importlib
from typing import Any

import torch


@functools.cache
def _load() -> tuple[Any, str | None]:
    try:
        return importlib.import_module("fuserl_kernels._native"), None
    except ImportError as error:
        return None, (
            f"the compiled CPU kernels are not usable ({error}); install again with "
            "FUSERL_BUILD=require to see the compiler's message"
        )


def why_absent() -> str | None:
    """None when the compiled module is loaded, else the reason and the remedy."""
    return _load()[1]


def module() -> Any:
    """The compiled module; raises RuntimeError with the reason when it is absent."""
    loaded, reason = _load()
    if reason is not None:
        raise RuntimeError(reason)
    return loaded


def address(tensor: torch.Tensor | None) -> int:
    """Where a tensor's memory starts; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype(tensor: torch.Tensor) -> Any:
    """The module's name for the dtype of a float32, bf16 or fp16 tensor."""
    return getattr(module().Dtype, str(tensor.dtype).removeprefix("torch."))


def advise_large_pages(tensor: torch.Tensor) -> None:
    """Ask for large pages under a new tensor on the CPU that nobody has written to: walks over
    memory by small pages spend much of their time on finding them. Without the compiled module
    nothing happens."""
    if tensor.device.type == "cpu" and why_absent() is None:
        module().advise_large_pages(tensor.data_ptr(), tensor.nbytes)


def describe() -> str:
    """Compiler and instruction set in use, for a doctor command."""
    return ", ".join(f"{key} {value}" for key, value in module().build_info().items())

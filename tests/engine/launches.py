"""What a CUDA device would be given to run, counted without one: on torch's meta device, where
kernels of ours are named in place of being launched, and each op of torch's is one launch.

A library may split a product in two, and some ops of torch are several launches: on a GPU there are
a few more."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fuserl_kernels import backend, registration, triton_runtime
from fuserl_kernels.triton_runtime import triton

NO_LAUNCH = {"empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like", "detach"}
"""Ops that are no views and compute nothing."""


class Launches(TorchDispatchMode):
    """The names of what was launched, in order: kernels of Triton, and ops of torch as `aten.x`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = str(func.overloadpacket).partition(".")
        if namespace == "fuserl_kernels":
            table = registration.tables()[name]
            with self:
                return backend.select(name, table, args[0])(*args)
        out = func(*args, **(kwargs or {}))
        if not func.is_view and name not in NO_LAUNCH:
            leaves = torch.utils._pytree.tree_leaves(out)
            if any(isinstance(leaf, Tensor) and leaf.device.type != "cpu" for leaf in leaves):
                self.names.append(f"aten.{name}")
        return out


@contextmanager
def counted_launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of what is launched within, by tensors of the meta device."""
    launches = Launches()

    def run(kernel: Any, *_: Any, **__: Any) -> None:
        launches.names.append(kernel.fn.__name__)

    kinds = [triton.runtime.jit.JITFunction]
    if triton_runtime.INTERPRETING:
        kinds.append(triton.runtime.interpreter.InterpretedFunction)
    with monkeypatch.context() as patch:
        for kind in kinds:
            patch.setattr(kind, "run", run)
        patch.setattr(triton_runtime, "device_type", lambda: "meta")
        patch.setattr(triton_runtime, "INTERPRETING", True)  # nothing is timed
        with launches, backend.use_backend("triton"):
            yield launches.names

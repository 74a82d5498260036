"""Registers an op with torch.library in one call: schema, implementation, fake and autograd.

`Library.define` and `impl` cost about 7 us a call where `torch.library.custom_op` costs 18.
The implementation is opaque to torch.compile, so choosing from the table and checking data
inside it breaks no graph.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from fuserl_kernels import backend

_NAMESPACE = "fuserl_kernels"
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")
_tables: dict[str, backend.Table] = {}


def tables() -> dict[str, backend.Table]:
    """Every registered op with its implementations by name."""
    return dict(_tables)


def not_twice(ctx: Any, *_: Any) -> NoReturn:
    """The backward of an op that is a backward pass itself."""
    raise RuntimeError("the gradients of fuserl_kernels' ops cannot be differentiated once more")


def register(
    schema: str,
    table: backend.Table,
    fake: Callable,
    *,
    check: Callable | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Define `fuserl_kernels::<schema>` and return the callable op.

    table: implementation name -> function with the op's positional arguments. The first argument
        is the tensor whose device and dtype decide which entry runs.
    fake: shapes and dtypes of the outputs, without data.
    check: called with the same arguments before an implementation, for CPU tensors only
        (on CUDA looking at data would wait for the device); raises ValueError.
    setup_context, backward: as in torch.library.register_autograd, backward returning a tuple;
        `not_twice` for the op of a backward pass.
    """
    name = schema.partition("(")[0]

    def run(*arguments):  # type: ignore[no-untyped-def]
        device = arguments[0].device
        if check is not None and device.type == "cpu":
            check(*arguments)
        implementation = backend.select(name, table, arguments[0])
        with contextlib.ExitStack() as stack:
            if torch.is_autocast_enabled(device.type):  # the op chooses its own precision
                stack.enter_context(torch.autocast(device.type, enabled=False))
            if device.type == "cuda":  # kernels launch on the current device
                stack.enter_context(torch.cuda.device(device))
            return implementation(*arguments)

    _tables[name] = table
    _library.define(schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    qualified = f"{_NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_library)
    op = getattr(getattr(torch.ops, _NAMESPACE), name).default
    if backward is not None:
        _register_autograd(op, name, setup_context, backward)
    return op


def _register_autograd(
    op: Any, name: str, setup_context: Callable | None, backward: Callable
) -> None:
    """What torch.library.register_autograd does, without its cost: that looks at the schema for
    each argument of each call, 270 us for the 36 arguments of a loss where this takes 30."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs_and_keyset: Any) -> Any:
            *inputs, keyset = inputs_and_keyset  # inputs first, as ctx.needs_input_grad counts
            output = below_autograd(keyset, *inputs)
            if setup_context is not None:
                setup_context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> tuple:
            return *backward(ctx, *gradients), None

    def below_autograd(keyset: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    def run(keyset: Any, *inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(x, torch.Tensor) and x.requires_grad for x in inputs
        ):
            return Function.apply(*inputs, keyset)
        return below_autograd(keyset, *inputs)

    _library.impl(name, run, "Autograd", with_keyset=True)

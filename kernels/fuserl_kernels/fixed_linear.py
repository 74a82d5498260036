"""y = x weight^T + bias, every number of y summed in one order, however many rows there are.

x [N, K], weight [M, K], bias [M]: y [N, M] in the dtype of x, which is the weight's. On a CPU each
number is a chain of fused multiply-adds over k in ascending order in float32, broken at multiples
of 512: its bits depend on its row of x and its row of the weight alone. A library's product takes
another order for one row than for many, so what a decoder says of a token depends on the batch
around it; through this one it does not. In float32 it is the faster one, too, on processors whose
AVX-512 a library does not use.
"""

from typing import Any

import torch

from fuserl_kernels import backend, checks
from fuserl_kernels.packed_weight import PackedWeight
from fuserl_kernels.reference.linear import linear_bwd, linear_fwd
from fuserl_kernels.registration import not_twice, register


def _forward_native(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return PackedWeight.of(weight).linear(x, bias)


def _backward_native(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, wants_x: bool, wants_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if x.dtype == torch.bfloat16:  # torch's products of bf16 are faster than packing both ways
        grad_x = torch.mm(grad, weight) if wants_x else x.new_empty(0)
        grad_weight = torch.mm(grad.t(), x) if wants_weight else x.new_empty(0)
    else:
        grad_x = PackedWeight.of(weight.t()).linear(grad) if wants_x else x.new_empty(0)
        grad_weight = PackedWeight.of(x.t()).linear(grad.t()) if wants_weight else x.new_empty(0)
    return grad_x, grad_weight


FORWARD: backend.Table = {"reference": linear_fwd, "native": _forward_native}
BACKWARD: backend.Table = {"reference": linear_bwd, "native": _backward_native}


def _fake_fwd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_bwd(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, wants_x: bool, wants_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape if wants_x else 0),
        x.new_empty(weight.shape if wants_weight else 0),
    )


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
    grad_x, grad_weight = _op_bwd(x, weight, grad, wants_x, wants_weight)
    return (
        grad_x if wants_x else None,
        grad_weight if wants_weight else None,
        grad.sum(0) if wants_bias else None,
    )


_op_bwd = register(
    "fixed_linear_bwd(Tensor x, Tensor weight, Tensor grad, bool wants_x, bool wants_weight)"
    " -> (Tensor, Tensor)",
    BACKWARD,
    _fake_bwd,
    backward=not_twice,
)
_op = register(
    "fixed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    FORWARD,
    _fake_fwd,
    setup_context=_setup_context,
    backward=_backward,
)


# --- public


def fixed_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x weight^T + bias, with gradients.

    x: [N, K]; weight: [M, K]; bias: [M] or None; one floating dtype. Returns [N, M] of that dtype,
    summed in float32 (float64 for float64) and rounded once.

    With the native implementation row n of the result has the same bits whatever N is and whatever
    the other rows hold. The reference gives no such promise: it is torch's product. There is no
    implementation for GPUs yet: a CUDA tensor takes the reference.

    Raises ValueError for shapes or dtypes that do not fit.
    """
    checks.floating("x", x)
    if x.dim() != 2:
        raise ValueError(f"x must have shape [N, K], not {list(x.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight must have shape [M, {x.shape[1]}], not {list(weight.shape)}")
    vectors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    if bias is not None:
        checks.shape("bias", bias, weight.shape[:1], "one for each row of weight")
    for name, tensor in vectors.items():
        checks.device(name, tensor, "x", x)
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} must be {x.dtype} like x, not {tensor.dtype}")
    return _op(x, weight, bias)

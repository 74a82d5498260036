"""RMSNorm and LayerNorm of rows, alone or fused with the addition in front: y = norm(x + residual).

x [..., D] of any floating dtype; results in its dtype, computed in float32 (float64 for float64)
and rounded once. Saved for backward: the normalised rows (x, or the sum that is returned anyway),
weight, bias, and a float32 or two a row. Forward moves 2 N D elements, or 4 N D with a residual;
backward reads rows and gradient and writes one: 3 N D, or 4 N D with a gradient to the sum.
Formulas: reference/norms.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, overload

import torch

from fuserl_kernels import checks
from fuserl_kernels.native_norms import backward_native, forward_native
from fuserl_kernels.reference.norms import norm_bwd, norm_fwd
from fuserl_kernels.reference.sequences import compute_dtype
from fuserl_kernels.registration import not_twice, register
from fuserl_kernels.triton_norms import backward_triton, forward_triton

FORWARD = {"reference": norm_fwd, "triton": forward_triton, "native": forward_native}
BACKWARD = {"reference": norm_bwd, "triton": backward_triton, "native": backward_native}


def _fake_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    centered: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = x.shape[:-1]
    return (
        x.new_empty(x.shape),
        x.new_empty(0 if residual is None else x.shape),
        x.new_empty((2 if centered else 1, *shape), dtype=compute_dtype(x)),
    )


def _fake_bwd(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stats: torch.Tensor,
    grad_y: torch.Tensor,
    grad_summed: torch.Tensor | None,
    weight_offset: float,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        rows.new_empty(rows.shape),
        weight.new_empty(weight.shape if weight_grad else 0),
        weight.new_empty(0) if bias is None or not weight_grad else bias.new_empty(bias.shape),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, residual, _, weight_offset = inputs
    _, summed, stats = output
    ctx.weight_offset = weight_offset
    ctx.mark_non_differentiable(*((summed, stats) if residual is None else (stats,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else summed, weight, bias, stats)


def _backward(
    op_bwd: Callable,
    ctx: Any,
    grad_y: torch.Tensor | None,
    grad_summed: torch.Tensor | None,
    _: Any,
) -> tuple:
    rows, weight, bias, stats = ctx.saved_tensors
    if grad_y is None:  # the sum alone was used
        grad_y = torch.zeros_like(rows)
    weight_grad = any(ctx.needs_input_grad[1:3])
    grad_x, grad_weight, grad_bias = op_bwd(
        rows, weight, bias, stats, grad_y, grad_summed, ctx.weight_offset, weight_grad
    )
    return (
        grad_x,
        grad_weight if weight_grad else None,
        grad_bias if weight_grad and bias is not None else None,
        grad_x if ctx.needs_input_grad[3] else None,
        None,
        None,
    )


def _register(name: str, centered: bool) -> Callable:
    """The op of one of the two norms, and that of its backward pass."""
    op_bwd = register(
        f"{name}_bwd(Tensor rows, Tensor weight, Tensor? bias, Tensor stats, Tensor grad_y, "
        "Tensor? grad_summed, float weight_offset, bool weight_grad) -> (Tensor, Tensor, Tensor)",
        {key: partial(function, centered=centered) for key, function in BACKWARD.items()},
        _fake_bwd,
        backward=not_twice,
    )
    return register(
        f"{name}(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, float eps, "
        "float weight_offset) -> (Tensor, Tensor, Tensor)",
        {key: partial(function, centered=centered) for key, function in FORWARD.items()},
        partial(_fake_fwd, centered=centered),
        setup_context=_setup_context,
        backward=partial(_backward, op_bwd),
    )


_rms_op = _register("rms_norm", centered=False)
_layer_op = _register("layer_norm", centered=True)


# --- public


def _vector(name: str, vector: torch.Tensor, x: torch.Tensor) -> None:
    checks.floating(name, vector)
    checks.shape(name, vector, x.shape[-1:], "the last dimension of x")
    checks.device(name, vector, "x", x)


def _check(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None, eps: float
) -> None:
    checks.floating("x", x)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must have shape [..., D] with D > 0, not {list(x.shape)}")
    _vector("weight", weight, x)
    if residual is not None:
        checks.like("residual", residual, "x", x)
        if residual.dtype != x.dtype:
            raise ValueError(f"residual must be {x.dtype} like x, not {residual.dtype}")
    checks.at_least("eps", eps, 0.0)


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    residual: None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> torch.Tensor: ...


@overload
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    residual: torch.Tensor,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """s / sqrt(mean(s^2) + eps) * (weight_offset + weight) over the last dimension, with s = x, or
    x + residual rounded to the dtype of x.

    x: [..., D] floating point; views with whole rows are read where they lie. weight: [D], of any
        floating dtype. residual: [..., D], the dtype of x.
    weight_offset: 1 for checkpoints of Gemma.

    Returns y [..., D] in the dtype of x, or with a residual (y, s): the normalised branch, and the
    stream that the next addition goes to. Computed in float32 (float64 for float64) and rounded
    once. Gradients to x, weight and residual; those of the weight in one fixed order of rows.
    Squares overflow above 1.8e19: such a row gives zeros, as torch's.
    Raises ValueError for wrong dtypes, shapes or devices, and eps below 0.
    """
    _check(x, weight, residual, eps)
    checks.finite("weight_offset", weight_offset)
    y, summed, _ = _rms_op(x, weight, None, residual, eps, weight_offset)
    return y if residual is None else (y, summed)


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: None = None,
    eps: float = 1e-5,
) -> torch.Tensor: ...


@overload
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """(s - mean(s)) / sqrt(var(s) + eps) * weight + bias over the last dimension, with s = x, or
    x + residual rounded to the dtype of x; var is the biased one.

    Arguments, results, rounding and errors as for rms_norm; bias: [D] of any floating dtype.
    """
    _check(x, weight, residual, eps)
    if bias is not None:
        _vector("bias", bias, x)
    y, summed, _ = _layer_op(x, weight, bias, residual, eps, 0.0)
    return y if residual is None else (y, summed)

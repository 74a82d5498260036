"""Losses whose forward pass makes the gradients: shapes without data, what is saved, backward."""

from typing import Any

import torch

from fuserl_kernels.reference.sequences import compute_dtype
from fuserl_kernels.registration import not_twice


def fake_loss(like: torch.Tensor, num_metrics: int) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = compute_dtype(like)
    return like.new_empty((), dtype=dtype), like.new_empty(num_metrics, dtype=dtype)


def fake_gradient(tensor: torch.Tensor | None, wanted: bool, like: torch.Tensor) -> torch.Tensor:
    if tensor is None or not wanted:
        return like.new_empty(0)
    return tensor.new_empty(tensor.shape)


def save_gradients(ctx: Any, output: tuple, made: tuple[bool, ...]) -> None:
    """Keep what follows (loss, metrics) in an op's output: scales, and gradients still to be
    multiplied by them; `made` says which of those there are. All get no gradient."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])
    ctx.made = made


def scaled_gradients(
    ctx: Any, grad_loss: torch.Tensor | None, scale_of: tuple[int, ...]
) -> tuple[torch.Tensor | None, ...]:
    """The saved gradients times their scale and the gradient of the loss; None for those never
    made. scale_of: for each gradient, the number of its scale."""
    if grad_loss is None:
        return (None,) * len(scale_of)
    refuse_create_graph(ctx, grad_loss)
    scales, *gradients = ctx.saved_tensors
    factors = (scales * grad_loss).unbind()
    return tuple(
        _multiplied(gradient, factors[scale]) if made else None
        for gradient, made, scale in zip(gradients, ctx.made, scale_of, strict=True)
    )


def refuse_create_graph(ctx: Any, grad_loss: torch.Tensor) -> None:
    """The saved gradients are constants to autograd: a second derivative would miss their part.
    Other types of tensor are a tracer's, whose grad mode says nothing of the backward pass."""
    if torch.is_grad_enabled() and type(grad_loss) is torch.Tensor:
        not_twice(ctx)


def _multiplied(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """gradient * factor, or the gradient itself where a number on the CPU is seen to be 1: with
    native gradients, which are multiplied by 1 / denominator already, that saves a walk over them
    and their copy. Under retain_graph the saved gradient stays here, for the next backward pass.
    Other types of tensor stand for values not known yet (torch.compile tracing)."""
    known = type(factor) is torch.Tensor and factor.device.type == "cpu"
    if known and factor == 1 and not torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient
    # A 0-d factor is a number to type promotion: the product keeps the gradient's dtype.
    return gradient * factor

"""Clipped value loss: .5 * max((v - R)^2, (clip(v, old - c, old + c) - R)^2) over value slots.

The forward pass makes the gradient; backward scales it. Formula: reference/value.py.
"""

import math
from typing import Any

import torch

from fuserl_kernels import checks
from fuserl_kernels.loss_gradients import fake_gradient, fake_loss, save_gradients, scaled_gradients
from fuserl_kernels.native_losses import value_loss_native
from fuserl_kernels.reference.value import METRICS, value_loss_fwd
from fuserl_kernels.registration import register
from fuserl_kernels.scalars import denominator_tensor
from fuserl_kernels.triton_losses import value_loss_triton

FORWARD = {"reference": value_loss_fwd, "native": value_loss_native, "triton": value_loss_triton}


def _fake(new_values: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    loss, metrics = fake_loss(new_values, len(METRICS))
    return loss, metrics, loss.new_empty(1), fake_gradient(new_values, rest[-1], new_values)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    save_gradients(ctx, output, (inputs[-1],))


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple:
    return (*scaled_gradients(ctx, grad_loss, (0,)), None, None, None, None, None, None)


_op = register(
    "value_loss(Tensor new_values, Tensor values, Tensor returns, Tensor loss_mask, "
    "float clip_range, Tensor? denominator, bool needs_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    FORWARD,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


def checked_clip_range(name: str, clip_range: float | None) -> float:
    """None, for no clipping, becomes infinity."""
    if clip_range is None:
        return math.inf
    checks.above(name, clip_range, 0.0)
    return float(clip_range)


def value_loss(
    new_values: torch.Tensor,
    values: torch.Tensor,
    returns: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    clip_range: float | None = 0.2,
    denominator: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Value loss of one microbatch; the gradient reaches new_values only.

    new_values, values, returns: any one shape; of the critic being updated, of the critic at the
        rollout, and the targets. loss_mask: bool, the slots that have a value.
    clip_range: how far a new value may leave the old one; None for no limit.
    denominator: number or 0-d tensor, the slot count of the whole optimizer step; default this
        call's.

    Returns the 0-d loss, float32 (float64 for float64), and 0-d metrics over this call's slots:
    "value/loss", "value/clipfrac", "value/explained_variance" (1 - var(new_values - returns) /
    var(returns); 0 where the returns do not vary) and "num_tokens", the number of slots.
    """
    checks.floating("new_values", new_values)
    checks.mask("loss_mask", loss_mask, "new_values", new_values)
    checks.like("values", values, "new_values", new_values)
    checks.like("returns", returns, "new_values", new_values)
    loss, metrics, *_ = _op(
        new_values,
        checks.detached(values),
        checks.detached(returns),
        loss_mask,
        checked_clip_range("clip_range", clip_range),
        denominator_tensor("denominator", denominator, new_values),
        checks.wants_grad(new_values),
    )
    named = dict(zip(METRICS, metrics.unbind(), strict=True))
    named["num_tokens"] = named.pop("value/num_tokens")
    return loss, named

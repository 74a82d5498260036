"""Pairwise preference loss of a reward model: mean(-log sigmoid(chosen - rejected - margin)).

The forward pass makes the gradients; backward scales them. Formula: reference/pairwise.py.
"""

from typing import Any

import torch

from fuserl_kernels import checks
from fuserl_kernels.loss_gradients import fake_loss, refuse_create_graph
from fuserl_kernels.native_losses import pairwise_loss_native
from fuserl_kernels.reference.pairwise import METRICS, pairwise_loss_fwd
from fuserl_kernels.registration import register
from fuserl_kernels.scalars import scalar_tensor
from fuserl_kernels.triton_pairwise import pairwise_loss_triton

FORWARD = {
    "reference": pairwise_loss_fwd,
    "native": pairwise_loss_native,
    "triton": pairwise_loss_triton,
}


def _fake(
    chosen_scores: torch.Tensor,
    rejected_scores: torch.Tensor,
    margin: torch.Tensor | None,
    center_coef: float,
    needs_grad: bool,
) -> tuple[torch.Tensor, ...]:
    wide = rejected_scores if rejected_scores.dtype == torch.float64 else chosen_scores
    return (
        *fake_loss(wide, len(METRICS)),
        chosen_scores.new_empty(chosen_scores.shape if needs_grad else (0,)),
        rejected_scores.new_empty(rejected_scores.shape if needs_grad else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[2:])


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple:
    if grad_loss is None:
        return None, None, None, None, None
    refuse_create_graph(ctx, grad_loss)
    grad_chosen, grad_rejected = ctx.saved_tensors
    return grad_chosen * grad_loss, grad_rejected * grad_loss, None, None, None


_op = register(
    "pairwise_loss(Tensor chosen_scores, Tensor rejected_scores, Tensor? margin, "
    "float center_coef, bool needs_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    FORWARD,
    _fake,
    setup_context=_setup_context,
    backward=_backward,
)


def pairwise_loss(
    chosen_scores: torch.Tensor,
    rejected_scores: torch.Tensor,
    *,
    margin: float | torch.Tensor | None = None,
    center_coef: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """mean(-log sigmoid(chosen - rejected - margin)) + center_coef * mean((chosen + rejected)^2).

    chosen_scores, rejected_scores: [N]. margin: a number or [N], a constant.

    Returns the 0-d loss, float32 (float64 for float64), and 0-d metrics: "reward/accuracy" (a tie
    is half), "reward/margin" (mean of chosen - rejected), "reward/chosen", "reward/rejected" and
    "num_pairs". No pairs: everything is zero. Gradients reach both score tensors.
    """
    checks.floating("chosen_scores", chosen_scores)
    if chosen_scores.dim() != 1:
        raise ValueError(f"chosen_scores must have shape [N], not {list(chosen_scores.shape)}")
    checks.like("rejected_scores", rejected_scores, "chosen_scores", chosen_scores)
    checks.finite("center_coef", center_coef)
    if isinstance(margin, torch.Tensor) and margin.dim() > 0:
        checks.like("margin", margin, "chosen_scores", chosen_scores)
        margin = checks.detached(margin)
    else:
        margin = scalar_tensor("margin", margin, chosen_scores)
    loss, metrics, _, _ = _op(
        chosen_scores,
        rejected_scores,
        margin,
        float(center_coef),
        checks.wants_grad(chosen_scores, rejected_scores),
    )
    return loss, dict(zip(METRICS, metrics.unbind(), strict=True))

"""Clipped value loss with its gradient.

Per value slot: .5 * max((v - R)^2, (clip(v, old - c, old + c) - R)^2), summed and divided by the
denominator (default: the slots of the mask).
"""

import torch

from fuserl_kernels.reference.sequences import compute_dtype

METRICS = ("value/loss", "value/clipfrac", "value/explained_variance", "value/num_tokens")
LEAST_SPREAD = 1e-14  # variance over mean square of returns; below, it is the rounding of sums


def value_loss_fwd(
    new_values: torch.Tensor,
    values: torch.Tensor,
    returns: torch.Tensor,
    loss_mask: torch.Tensor,
    clip_range: float,  # infinite for none
    denominator: torch.Tensor | None,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns loss, metrics in the order of METRICS, scale [1] = 1 / denominator, and the gradient
    of new_values, still to be multiplied by scale."""
    dtype = compute_dtype(new_values)
    new, old, target = (
        torch.where(loss_mask, x.to(dtype), 0) for x in (new_values, values, returns)
    )
    bounded = new.clamp(old - clip_range, old + clip_range)
    error, clipped_error = new - target, bounded - target
    clipped = clipped_error.square() > error.square()
    worst = torch.where(clipped, clipped_error, error)

    num_tokens = loss_mask.sum().to(dtype)
    count = num_tokens.clamp(min=1)
    divisor = num_tokens if denominator is None else denominator.to(dtype)
    divisor = torch.where(divisor == 0, 1, divisor)
    squares = 0.5 * worst.square()
    loss, scale = squares.sum() / divisor, (1 / divisor).view(1)

    def variance(x: torch.Tensor) -> torch.Tensor:
        deviation = torch.where(loss_mask, x - x.sum() / count, 0)
        return deviation.square().sum() / count

    wide = target.double()
    spread = variance(wide)
    varies = spread > LEAST_SPREAD * wide.square().sum() / count
    explained = torch.where(varies, 1 - variance(error.double()) / spread, 0).to(dtype)
    metrics = torch.stack(
        [squares.sum() / count, clipped.to(dtype).sum() / count, explained, num_tokens]
    )
    if not needs_grad:
        return loss, metrics, scale, new_values.new_empty(0)
    slope = torch.where(clipped & (bounded != new), 0, worst)
    return loss, metrics, scale, slope.to(new_values.dtype).contiguous()

"""RMSNorm and LayerNorm of rows, alone or of the sum of two.

With s = x + residual, rounded to the dtype of x, or x itself, over the last dimension D:
    RMSNorm     n = s rstd             rstd = 1 / sqrt(mean(s^2) + eps)
    LayerNorm   n = (s - mean) rstd    rstd = 1 / sqrt(mean((s - mean)^2) + eps)
    y = n (weight_offset + weight) + bias
Both norms see the rounded sum, so that adding first gives the same bits, and y is rounded once.
For gradients g to y and h to s, with v = g (weight_offset + weight),
    grad_x = grad_residual = rstd (v - n mean(v n) - mean(v)) + h      (mean(v): LayerNorm only)
    grad_weight = sum over rows of g n        grad_bias = sum over rows of g
RMSNorm: Zhang and Sennrich 2019; weight_offset 1 is Gemma's. LayerNorm: Ba, Kiros and Hinton 2016.
"""

import torch

from fuserl_kernels.reference.sequences import compute_dtype


def norm_fwd(
    x: torch.Tensor,  # [..., D]
    weight: torch.Tensor,  # [D]
    bias: torch.Tensor | None,  # [D]
    residual: torch.Tensor | None,  # [..., D], the dtype of x
    eps: float,
    weight_offset: float,
    centered: bool,  # LayerNorm
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns y [..., D] and s [..., D] (or [0] without a residual) in the dtype of x, and stats
    [2 if centered else 1, ...] = (rstd, mean) in the compute dtype."""
    dtype = compute_dtype(x)
    summed = x.new_empty(0)
    if residual is not None:
        x = summed = x + residual
    rows = x.to(dtype)
    mean = rows.mean(-1) if centered else None
    centred = rows if mean is None else rows - mean.unsqueeze(-1)
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rstd.unsqueeze(-1) * (weight.to(dtype) + weight_offset)
    if bias is not None:
        y += bias.to(dtype)
    stats = torch.stack([rstd] if mean is None else [rstd, mean])
    return y.to(x.dtype).contiguous(), summed.contiguous(), stats


def norm_bwd(
    rows: torch.Tensor,  # [..., D]: s
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stats: torch.Tensor,
    grad_y: torch.Tensor,  # [..., D]
    grad_summed: torch.Tensor | None,  # [..., D]
    weight_offset: float,
    weight_grad: bool,
    centered: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns grad_x [..., D], grad_weight [D] and grad_bias [D] in the dtypes of rows, weight and
    bias; the last two are [0] unless weight_grad, grad_bias also without a bias."""
    dtype = compute_dtype(rows)
    rstd = stats[0].unsqueeze(-1)
    n, g = rows.to(dtype), grad_y.to(dtype)
    if centered:
        n = n - stats[1].unsqueeze(-1)
    n = n * rstd
    v = g * (weight.to(dtype) + weight_offset)
    gradient = v - n * (v * n).mean(-1, keepdim=True)
    if centered:
        gradient -= v.mean(-1, keepdim=True)
    gradient *= rstd
    if grad_summed is not None:
        gradient += grad_summed.to(dtype)
    leading = tuple(range(rows.dim() - 1))
    grad_weight, grad_bias = weight.new_empty(0), weight.new_empty(0)
    if weight_grad:
        grad_weight = _sum_over(g * n, leading).to(weight.dtype)
        if bias is not None:
            grad_bias = _sum_over(g, leading).to(bias.dtype)
    return gradient.to(rows.dtype).contiguous(), grad_weight, grad_bias


def _sum_over(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    """Of no dimension: a copy, where torch would sum over all."""
    return x.sum(dims) if dims else x.clone()

"""The affine map y = x weight^T + bias, and its gradients."""

import torch

from fuserl_kernels.reference.sequences import compute_dtype


def linear_fwd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """[N, K], [M, K], [M] -> [N, M]"""
    dtype = compute_dtype(x)
    y = x.to(dtype) @ weight.to(dtype).t()
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def linear_bwd(
    x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, wants_x: bool, wants_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, K], [M, K], [N, M] -> gradients of x [N, K] and weight [M, K]; [0] where not wanted. That
    of the bias is the sum of the incoming one over the rows."""
    dtype = compute_dtype(x)
    grad = grad.to(dtype)
    return (
        (grad @ weight.to(dtype)).to(x.dtype) if wants_x else x.new_empty(0),
        (grad.t() @ x.to(dtype)).to(x.dtype) if wants_weight else x.new_empty(0),
    )

"""Whitening over a mask: (x - mean) / sqrt(var + 1e-8). Formula: reference/rewards.py."""

import torch

from fuserl_kernels import checks, native_advantages
from fuserl_kernels.reference.rewards import masked_moments_fwd, masked_whiten_fwd
from fuserl_kernels.reference.sequences import compute_dtype
from fuserl_kernels.registration import register
from fuserl_kernels.triton_whitening import masked_moments_triton, masked_whiten_triton

MOMENTS_FORWARD = {
    "reference": masked_moments_fwd,
    "triton": masked_moments_triton,
    "native": native_advantages.masked_moments_fwd,
}
FORWARD = {
    "reference": masked_whiten_fwd,
    "triton": masked_whiten_triton,
    "native": native_advantages.masked_whiten_fwd,
}

_moments_op = register(
    "masked_moments(Tensor x, Tensor mask) -> Tensor",
    MOMENTS_FORWARD,
    lambda x, _: x.new_empty(3, dtype=torch.float64),
)

_op = register(
    "masked_whiten(Tensor x, Tensor mask, Tensor? moments, bool shift_mean, bool unbiased) "
    "-> Tensor",
    FORWARD,
    lambda x, *_: x.new_empty(x.shape, dtype=compute_dtype(x)),
)


def masked_moments(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What whitening needs to know of the entries under the mask, ready to be merged.

    x: any shape; mask: bool of that shape. Returns float64 [3]: their number, their mean, and the
    sum of their squared deviations from it. Gather those of all ranks or microbatches as [W, 3]
    and hand them to masked_whiten(..., moments=...). No gradient.
    """
    checks.floating("x", x)
    checks.mask("mask", mask, "x", x)
    return _moments_op(checks.detached(x), mask)


def masked_whiten(
    x: torch.Tensor,
    mask: torch.Tensor,
    *,
    shift_mean: bool = True,
    unbiased: bool = False,
    moments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Give the entries under the mask mean 0 (or keep it, shift_mean=False) and variance 1.

    x: any shape; mask: bool of that shape, one mean and variance over all of it. unbiased: the
    variance divides by n - 1. moments: masked_moments of the parts that are whitened together, of
    which x is one: float64 [3] or [W, 3], merged in their order. Default: those of x.
    Returns float32 (float64 for float64), 0 outside the mask whatever x holds there; one entry
    becomes 0 (its mean), none gives zeros. No gradient.
    """
    checks.floating("x", x)
    checks.mask("mask", mask, "x", x)
    if moments is not None:
        checks.device("moments", moments, "x", x)
        fits = moments.dim() in (1, 2) and moments.shape[-1] == 3 and moments.numel() > 0
        if moments.dtype != torch.float64 or not fits:
            raise ValueError(
                "moments must be float64 [3] or [W, 3], W > 0, as masked_moments gives them, "
                f"not {moments.dtype} {list(moments.shape)}"
            )
        moments = checks.detached(moments).reshape(-1, 3)
    return _op(checks.detached(x), mask, moments, shift_mean, unbiased)

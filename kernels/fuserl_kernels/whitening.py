"""Whitening over a mask: (x - mean) / sqrt(var + 1e-8). Formula: reference/rewards.py."""

import torch

from fuserl_kernels import checks
from fuserl_kernels.reference.rewards import masked_whiten_fwd
from fuserl_kernels.reference.sequences import compute_dtype
from fuserl_kernels.registration import register

FORWARD = {"reference": masked_whiten_fwd}

_op = register(
    "masked_whiten(Tensor x, Tensor mask, bool shift_mean, bool unbiased) -> Tensor",
    FORWARD,
    lambda x, *_: x.new_empty(x.shape, dtype=compute_dtype(x)),
)


def masked_whiten(
    x: torch.Tensor, mask: torch.Tensor, *, shift_mean: bool = True, unbiased: bool = False
) -> torch.Tensor:
    """Give the entries under the mask mean 0 (or keep it, shift_mean=False) and variance 1.

    x: any shape; mask: bool of that shape, one mean and variance over all of it. unbiased: the
    variance divides by n - 1. Returns float32 (float64 for float64), 0 outside the mask whatever x
    holds there; one entry becomes 0 (its mean), none gives zeros. No gradient.
    """
    checks.floating("x", x)
    checks.mask("mask", mask, "x", x)
    return _op(checks.detached(x), mask, shift_mean, unbiased)

"""Arguments that may be a Python number or a tensor, and constants beside a differentiable one."""

import torch

from fuserl_kernels import checks
from fuserl_kernels.reference.sequences import compute_dtype


def scalar_tensor(
    name: str, value: float | torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor | None:
    """A number or 0-d tensor as a 0-d tensor on the device of `like`, without a device wait."""
    if value is None:
        return None
    checks.number_or_scalar(name, value)
    if isinstance(value, torch.Tensor):
        return checks.detached(value).to(like.device)
    return torch.full((), float(value), dtype=compute_dtype(like), device=like.device)


def tensor_or_number(
    name: str, value: float | torch.Tensor, like: torch.Tensor
) -> tuple[torch.Tensor | None, float]:
    """A number stays one, so that no launch is spent on a tensor of it; a 0-d tensor goes to the
    device of `like`, where a kernel reads it."""
    checks.number_or_scalar(name, value)
    if isinstance(value, torch.Tensor):
        return checks.detached(value).to(like.device), 0.0
    return None, float(value)


def denominator_tensor(
    name: str, value: float | torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor | None:
    if value is not None and not isinstance(value, torch.Tensor):
        checks.above(name, value, 0.0)
    return scalar_tensor(name, value, like)


def constant_like(
    name: str, tensor: torch.Tensor | None, other_name: str, other: torch.Tensor
) -> torch.Tensor | None:
    """An optional argument shaped like another that gets no gradient."""
    if tensor is None:
        return None
    checks.like(name, tensor, other_name, other)
    return checks.detached(tensor)

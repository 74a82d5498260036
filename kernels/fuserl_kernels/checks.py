"""Argument checks of the public functions: each raises ValueError naming the argument.

Functions without a `_data` suffix read shapes, dtypes and Python numbers only, so they hold under
torch.compile and cost about a microsecond. Those with `_data` read tensor contents; they run inside
op bodies, on CPU tensors.
"""

import math
import numbers
from collections.abc import Sequence

import torch

INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def floating(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} must be a floating-point tensor, not {_kind(tensor)}")


def integer(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in INTEGER_DTYPES:
        raise ValueError(f"{name} must be an integer tensor, not {_kind(tensor)}")


def boolean(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.bool:
        raise ValueError(f"{name} must be a bool tensor, not {_kind(tensor)}")


def shape(name: str, tensor: torch.Tensor, expected: Sequence[int], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{name} must have shape {list(expected)} ({meaning}), not {list(tensor.shape)}"
        )


def device(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, not {tensor.device}")


def like(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """A floating-point tensor with the shape and device of another argument."""
    floating(name, tensor)
    shape(name, tensor, other.shape, f"that of {other_name}")
    device(name, tensor, other_name, other)


def mask(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """A bool tensor with the shape and device of another argument."""
    boolean(name, tensor)
    shape(name, tensor, other.shape, f"that of {other_name}")
    device(name, tensor, other_name, other)


def choice(name: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(valid)}, not {value!r}")


def whole(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def _number(name: str, value: object) -> None:
    """A Python number, or what stands for one: NumPy's, a 0-d tensor."""
    if not isinstance(value, int | float | torch.Tensor | numbers.Real):
        raise ValueError(f"{name} must be a number, not {_kind(value)}")


def at_least(name: str, value: float, least: float) -> None:
    _number(name, value)
    if not least <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least {least}, not {value!r}")


def above(name: str, value: float, bound: float) -> None:
    _number(name, value)
    if not bound < value < math.inf:
        raise ValueError(f"{name} must be a finite number above {bound}, not {value!r}")


def softcap(value: float | None) -> None:
    """Above 1e30 its inverse would be no normal float32."""
    if value is None:
        return
    _number("softcap", value)
    if not 0.0 < value <= 1e30:
        raise ValueError(f"softcap must be above 0 and at most 1e30, not {value!r}")


def finite(name: str, value: float) -> None:
    _number(name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be a finite number, not {value!r}")


def between(name: str, value: float, least: float, most: float) -> None:
    _number(name, value)
    if not least <= value <= most:
        raise ValueError(f"{name} must be in [{least}, {most}], not {value!r}")


def number_or_scalar(name: str, value: float | torch.Tensor) -> None:
    """A Python number or a 0-d tensor."""
    if isinstance(value, torch.Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name} must be a number or a 0-d tensor, not {_kind(value)}")
    elif not isinstance(value, int | float) or not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be a finite number or a 0-d tensor, not {value!r}")


def temperature(
    value: float | torch.Tensor, token_ids: torch.Tensor
) -> tuple[torch.Tensor | None, float]:
    """Split a temperature into (row tensor [N] or None, float)."""
    if not isinstance(value, torch.Tensor):
        above("temperature", value, 0.0)
        return None, float(value)
    floating("temperature", value)
    device("temperature", value, "token_ids", token_ids)
    if value.dim() == 0:
        value = value.expand(token_ids.shape)
    shape("temperature", value, token_ids.shape, "that of token_ids")
    return value.detach().reshape(-1), 1.0


def token_ids_data(
    token_ids: torch.Tensor, vocab_size: int, loss_mask: torch.Tensor | None
) -> None:
    outside = (token_ids < 0) | (token_ids >= vocab_size)
    if loss_mask is not None:
        outside = outside & loss_mask
    if outside.any():
        first = int(token_ids[outside].reshape(-1)[0])
        raise ValueError(f"token_ids must be in [0, {vocab_size}) where trained, found {first}")


def temperature_data(temperatures: torch.Tensor | None, loss_mask: torch.Tensor | None) -> None:
    if temperatures is None:
        return
    bad = ~((temperatures > 0) & temperatures.isfinite())
    if loss_mask is not None:
        bad = bad & loss_mask
    if bad.any():
        raise ValueError(f"temperature must be above 0, found {float(temperatures[bad][0])}")


def indices_data(name: str, indices: torch.Tensor, least: int | None, bound: int) -> int | None:
    """Below `bound`, and at least `least` unless that is None. Returns the lowest; None of none."""
    if indices.numel() == 0:
        return None
    if indices.numel() <= 64:  # cheaper than two reductions
        numbers = indices.tolist()
        lowest, highest = min(numbers), max(numbers)
    else:
        lowest, highest = (int(end) for end in indices.aminmax())
    if highest >= bound:
        raise ValueError(f"{name} must be below {bound}, found {highest}")
    if least is not None and lowest < least:
        raise ValueError(f"{name} must be at least {least}, found {lowest}")
    return lowest


def cu_seqlens_shape(cu_seqlens: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """int32 or int64 [B + 1] beside packed tensors [N]."""
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, not {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape [B + 1], not {list(cu_seqlens.shape)}")
    if other.dim() != 1:
        raise ValueError(
            f"cu_seqlens goes with packed [N] tensors, but {other_name} is {list(other.shape)}"
        )
    device("cu_seqlens", cu_seqlens, other_name, other)


def cu_seqlens_data(cu_seqlens: torch.Tensor | None, num_tokens: int) -> None:
    if cu_seqlens is None:
        return
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != num_tokens:
        raise ValueError(
            f"cu_seqlens must run from 0 to {num_tokens}, the number of packed tokens, "
            f"not from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
        )
    if bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        raise ValueError("cu_seqlens must not decrease: a sequence has a negative length")


def detached(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor outside the graph, for an argument that is a constant of the op."""
    return tensor.detach() if tensor.requires_grad else tensor


def wants_grad(*tensors: torch.Tensor | None) -> bool:
    """True if a backward pass can ask for the gradient of any of the tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__

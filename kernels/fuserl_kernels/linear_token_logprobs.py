"""Log-probability of a chosen token straight from hidden states, without the [N, V] logits.

    logits = softcap * tanh((hidden @ weight.T + bias) / softcap);  token_logprobs(logits, ...)

Rows go through in chunks of at most 64 MiB of float32 logits, masked rows not at all. Saved for
backward: the inputs, two statistics a row and the entropy; backward computes the logits again
(8 N D V flops together). The products stay with torch.mm; the row kernels are token_logprobs'.
"""

import functools
from typing import Any, Literal, overload

import torch

from fuserl_kernels import checks
from fuserl_kernels.reference.logprobs import (
    ROWS,
    linear_token_logprobs_bwd,
    linear_token_logprobs_fwd,
)
from fuserl_kernels.reference.sequences import compute_dtype
from fuserl_kernels.registration import register
from fuserl_kernels.token_logprobs import NATIVE_ROWS

FORWARD = {
    "reference": functools.partial(linear_token_logprobs_fwd, ROWS),
    "native": functools.partial(linear_token_logprobs_fwd, NATIVE_ROWS),
}
BACKWARD = {
    "reference": functools.partial(linear_token_logprobs_bwd, ROWS),
    "native": functools.partial(linear_token_logprobs_bwd, NATIVE_ROWS),
}


def _fake_fwd(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    temperatures: torch.Tensor | None,
    temperature: float,
    softcap: float,
    loss_mask: torch.Tensor | None,
    return_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype, num_rows = compute_dtype(hidden, weight), hidden.shape[0]
    return (
        hidden.new_empty(num_rows, dtype=dtype),
        hidden.new_empty(num_rows if return_entropy else 0, dtype=dtype),
        hidden.new_empty(2, num_rows, dtype=dtype),
    )


def _check_data(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    temperatures: torch.Tensor | None,
    temperature: float,
    softcap: float,
    loss_mask: torch.Tensor | None,
    return_entropy: bool,
) -> None:
    checks.token_ids_data(token_ids, weight.shape[0], loss_mask)
    checks.temperature_data(temperatures, loss_mask)


def fake_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_bias = weight.new_empty(0) if bias is None else bias.new_empty(0)
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        bias.new_empty(bias.shape) if needs_bias and bias is not None else grad_bias,
    )


def _fake_bwd(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return fake_gradients(hidden, weight, bias, *rest[-3:])


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    (*tensors, temperatures, temperature, softcap, loss_mask, return_entropy) = inputs
    _, entropy, stats = output
    ctx.numbers = (temperature, softcap, return_entropy)
    ctx.mark_non_differentiable(*((stats,) if return_entropy else (stats, entropy)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, temperatures, loss_mask, stats, entropy)


def _backward(
    ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None, _: Any
) -> tuple:
    hidden, weight, bias, token_ids, temperatures, loss_mask, stats, entropy = ctx.saved_tensors
    temperature, softcap, return_entropy = ctx.numbers
    if grad_logprobs is None:
        grad_logprobs = stats.new_zeros(stats.shape[1])
    needs = ctx.needs_input_grad[:3]
    gradients = _op_bwd(
        hidden,
        weight,
        bias,
        token_ids,
        temperatures,
        temperature,
        softcap,
        loss_mask,
        stats,
        entropy,
        grad_logprobs,
        grad_entropy if return_entropy else None,
        *needs,
    )
    wanted = [g if needed else None for g, needed in zip(gradients, needs, strict=True)]
    return (*wanted, None, None, None, None, None, None)


_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, Tensor? temperatures, "
    "float temperature, float softcap, Tensor? loss_mask"
)
_op = register(
    f"linear_token_logprobs({_INPUTS}, bool return_entropy) -> (Tensor, Tensor, Tensor)",
    FORWARD,
    _fake_fwd,
    check=_check_data,
    setup_context=_setup_context,
    backward=_backward,
)
_op_bwd = register(
    f"linear_token_logprobs_bwd({_INPUTS}, Tensor stats, Tensor entropy, Tensor grad_logprobs, "
    "Tensor? grad_entropy, bool needs_hidden, bool needs_weight, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor)",
    BACKWARD,
    _fake_bwd,
)


def check_projection(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    softcap: float | None,
) -> None:
    """Shapes, dtypes and devices of a hidden -> logits projection with a token per row."""
    checks.floating("hidden", hidden)
    checks.floating("weight", weight)
    if weight.dim() != 2 or weight.shape[0] < 1:
        raise ValueError(f"weight must have shape [V, D] with V > 0, not {list(weight.shape)}")
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must have shape [..., {weight.shape[1]}] to match weight, "
            f"not {list(hidden.shape)}"
        )
    checks.device("weight", weight, "hidden", hidden)
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight must be {hidden.dtype} like hidden, not {weight.dtype}")
    if bias is not None:
        checks.floating("bias", bias)
        checks.shape("bias", bias, weight.shape[:1], "the vocabulary of weight")
        checks.device("bias", bias, "hidden", hidden)
    checks.integer("token_ids", token_ids)
    checks.shape("token_ids", token_ids, hidden.shape[:-1], "that of hidden without D")
    checks.device("token_ids", token_ids, "hidden", hidden)
    if softcap is not None:
        checks.above("softcap", softcap, 0.0)


@overload
def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    loss_mask: torch.Tensor | None = None,
    return_entropy: Literal[False] = False,
) -> torch.Tensor: ...


@overload
def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    loss_mask: torch.Tensor | None = None,
    return_entropy: Literal[True],
) -> tuple[torch.Tensor, torch.Tensor]: ...


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    loss_mask: torch.Tensor | None = None,
    return_entropy: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """token_logprobs of hidden @ weight.T (+ bias, soft-capped), with the logits never whole.

    hidden: [..., D]; weight: [V, D] of the same dtype; bias: [V]; token_ids: [...] integer.
    Products and statistics are float32 for bf16 and float16 (float64 for float64).
    softcap: c > 0 replaces each logit x by c * tanh(x / c), before the temperature.
    temperature, loss_mask, return_entropy: as in token_logprobs; masked rows cost no product.

    Returns logprobs [...] float32 (float64), or (logprobs, entropy); gradients reach hidden, weight
    and bias. Raises ValueError as token_logprobs does.
    """
    check_projection(hidden, weight, bias, token_ids, softcap)
    temperatures, number = checks.temperature(temperature, token_ids)
    if loss_mask is not None:
        checks.mask("loss_mask", loss_mask, "token_ids", token_ids)
        loss_mask = loss_mask.reshape(-1)
    shape = token_ids.shape
    logprobs, entropy, _ = _op(
        hidden.reshape(token_ids.numel(), hidden.shape[-1]),
        weight,
        bias,
        token_ids.reshape(-1).long(),
        temperatures,
        number,
        softcap or 0.0,
        loss_mask,
        return_entropy,
    )
    if return_entropy:
        return logprobs.view(shape), entropy.view(shape)
    return logprobs.view(shape)

"""Log-probability of a chosen token straight from hidden states, without the [N, V] logits.

    token_logprobs(hidden @ weight.T + bias, token_ids, temperature, softcap)

Rows go through in chunks that share one buffer (projection.py), masked rows not at all. Saved for
backward: the inputs, two statistics a row and the entropy; backward computes the logits again
(8 N D V flops together). The row kernels are token_logprobs'.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, overload

import torch

from fuserl_kernels import checks
from fuserl_kernels.projection import Kernels, Products, Projection, fast_products
from fuserl_kernels.reference.sequences import compute_dtype
from fuserl_kernels.registration import not_twice, register
from fuserl_kernels.token_logprobs import BACKWARD as ROW_BACKWARD
from fuserl_kernels.token_logprobs import FORWARD as ROW_FORWARD
from fuserl_kernels.triton_linear_logprobs import linear_forward_triton

# --- by chunks of rows: any implementation of token_logprobs' rows

KERNELS = {
    name: Kernels(
        forward,
        ROW_BACKWARD[name],
        Products if name == "reference" else fast_products,
    )
    for name, forward in ROW_FORWARD.items()
}


def forward_by_chunks(
    kernels: Kernels,
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    bias: torch.Tensor | None,  # [V]
    token_ids: torch.Tensor,  # [N]
    temperatures: torch.Tensor | None,  # [N]
    temperature: float,
    softcap: float,  # 0 for none
    loss_mask: torch.Tensor | None,  # [N]
    return_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns logprobs [N], entropy [N] (or [0]) and stats [2, N]; masked rows give 0."""
    kept = None if loss_mask is None else loss_mask.nonzero().squeeze(-1)
    projection = Projection(kernels, hidden, weight, bias, kept)
    dtype, num_rows = compute_dtype(hidden), hidden.shape[0]
    logprobs = hidden.new_zeros(num_rows, dtype=dtype)
    entropy = hidden.new_zeros(num_rows if return_entropy else 0, dtype=dtype)
    stats = hidden.new_zeros(2, num_rows, dtype=dtype)
    for rows in projection.slices(0, projection.num_rows):
        of_rows = kernels.forward(
            projection.logits(rows),
            projection.take(token_ids, rows),
            projection.take_optional(temperatures, rows),
            temperature,
            softcap,
            None,
            return_entropy,
        )
        projection.put(logprobs, rows, of_rows[0])
        if return_entropy:
            projection.put(entropy, rows, of_rows[1])
        projection.put(stats, rows, of_rows[2])
    return logprobs, entropy, stats


def backward_by_chunks(
    kernels: Kernels,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    temperatures: torch.Tensor | None,
    temperature: float,
    softcap: float,
    loss_mask: torch.Tensor | None,
    stats: torch.Tensor,  # [2, N]
    entropy: torch.Tensor,
    grad_logprobs: torch.Tensor,  # [N]
    grad_entropy: torch.Tensor | None,  # [N]
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    wide_weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias ([0] where not needed), the logits computed again.

    Rows whose incoming gradients are exactly zero (clipped, zero advantage) are left out of the
    products, which changes nothing."""
    live = grad_logprobs != 0
    if grad_entropy is not None:
        live = live | (grad_entropy != 0)
    if loss_mask is not None:
        live = live & loss_mask
    projection = Projection(kernels, hidden, weight, bias, live.nonzero().squeeze(-1))
    projection.want_gradients(needs_hidden, needs_weight, needs_bias)

    def add_chunk(rows: slice) -> None:  # a function, so that nothing holds the buffer afterwards
        logits = projection.logits(rows)
        gradient = kernels.backward(
            logits,
            projection.take(token_ids, rows),
            projection.take_optional(temperatures, rows),
            temperature,
            softcap,
            None,
            projection.take(stats.t(), rows).t(),
            entropy if grad_entropy is None else projection.take(entropy, rows),
            projection.take(grad_logprobs, rows),
            projection.take_optional(grad_entropy, rows),
            projection.gradient_over(logits),
        )
        projection.backward(rows, gradient)

    for rows in projection.slices(0, projection.num_rows):
        add_chunk(rows)
    return projection.gradients(gradient_dtype(weight, wide_weight_grad))


# --- triton: all rows at once, the logits never stored


def forward_triton(
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
    if loss_mask is None:
        return linear_forward_triton(
            hidden, weight, bias, token_ids, temperatures, temperature, softcap, return_entropy
        )
    kept = loss_mask.nonzero().squeeze(-1)
    of_kept = linear_forward_triton(
        hidden[kept],
        weight,
        bias,
        token_ids[kept],
        None if temperatures is None else temperatures[kept],
        temperature,
        softcap,
        return_entropy,
    )
    num_rows = hidden.shape[0]

    def at_all_rows(x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], num_rows).index_copy_(-1, kept, x)

    logprobs, entropy, stats = of_kept
    if return_entropy:
        entropy = at_all_rows(entropy)
    return at_all_rows(logprobs), entropy, at_all_rows(stats)


def takes_wide_gradient(weight: torch.Tensor) -> bool:
    """Whether autograd takes a narrow weight's gradient in float32: weight.grad_dtype says so.
    Under torch.compile, which cannot read it, the gradient is rounded first."""
    if torch.compiler.is_compiling() or not (weight.is_leaf and weight.requires_grad):
        return False
    return weight.dtype != torch.float32 and weight.grad_dtype == torch.float32


def gradient_dtype(weight: torch.Tensor, wide: bool) -> torch.dtype:
    return compute_dtype(weight) if wide else weight.dtype


# --- the op

FORWARD: dict[str, Callable] = {
    name: functools.partial(forward_by_chunks, kernels) for name, kernels in KERNELS.items()
}
FORWARD["triton"] = forward_triton
BACKWARD = {
    name: functools.partial(backward_by_chunks, kernels) for name, kernels in KERNELS.items()
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


def empty_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    wide_weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Uninitialised gradients of hidden, weight and bias; [0] where not needed."""
    weight_dtype = gradient_dtype(weight, wide_weight_grad)
    grad_bias = weight.new_empty(0) if bias is None else bias.new_empty(0)
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,), dtype=weight_dtype),
        bias.new_empty(bias.shape) if needs_bias and bias is not None else grad_bias,
    )


def _fake_bwd(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return empty_gradients(hidden, weight, bias, *rest[-4:])


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
        takes_wide_gradient(weight),
    )
    wanted = [g if needed else None for g, needed in zip(gradients, needs, strict=True)]
    return (*wanted, *[None] * 6)


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
    "Tensor? grad_entropy, bool needs_hidden, bool needs_weight, bool needs_bias, "
    "bool wide_weight_grad) "
    "-> (Tensor, Tensor, Tensor)",
    BACKWARD,
    _fake_bwd,
    backward=not_twice,
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
    checks.softcap(softcap)


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

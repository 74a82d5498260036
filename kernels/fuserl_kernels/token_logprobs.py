"""Log-probability of a chosen token per row: log_softmax(logits / temperature)[token_id].

logits [..., V] of any floating dtype; results in float32 (float64 for float64), computed from
statistics kept in that dtype. Saved for backward: logits, token ids, two statistics a row, and the
entropy if asked. Forward reads the logits once (N V elements); backward reads them and writes as
many. Formulas: reference/logprobs.py.
"""

from typing import Any, Literal, overload

import torch

from fuserl_kernels import checks, native
from fuserl_kernels.reference.logprobs import ROWS, RowKernels
from fuserl_kernels.reference.sequences import compute_dtype
from fuserl_kernels.registration import register

# --- native: rows of float32 or bf16 on the CPU


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _unit_stride(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def _row_floats(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _row_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.contiguous()


def forward_native(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    temperatures: torch.Tensor | None,
    temperature: float,
    loss_mask: torch.Tensor | None,
    return_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, vocab_size = logits.shape
    logits = _unit_stride(logits)
    token_ids, loss_mask = token_ids.contiguous(), _row_mask(loss_mask)
    temperatures = _row_floats(temperatures)
    logprobs = logits.new_empty(num_rows, dtype=torch.float32)
    entropy = logits.new_empty(num_rows if return_entropy else 0, dtype=torch.float32)
    stats = logits.new_empty(2, num_rows, dtype=torch.float32)
    native.module().token_logprobs_forward(
        logits=logits.data_ptr(),
        is_bf16=logits.dtype == torch.bfloat16,
        num_rows=num_rows,
        vocab_size=vocab_size,
        row_stride=logits.stride(0),
        token_ids=token_ids.data_ptr(),
        temperatures=_address(temperatures),
        temperature=temperature,
        loss_mask=_address(loss_mask),
        logprobs=logprobs.data_ptr(),
        entropy=entropy.data_ptr() if return_entropy else 0,
        stats=stats.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return logprobs, entropy, stats


def backward_native(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    temperatures: torch.Tensor | None,
    temperature: float,
    loss_mask: torch.Tensor | None,
    stats: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    num_rows, vocab_size = logits.shape
    if out is not None and out.stride(-1) != 1 and vocab_size > 1:
        return out.copy_(
            backward_native(
                logits,
                token_ids,
                temperatures,
                temperature,
                loss_mask,
                stats,
                entropy,
                grad_logprobs,
                grad_entropy,
            )
        )
    logits = _unit_stride(logits)
    token_ids, loss_mask = token_ids.contiguous(), _row_mask(loss_mask)
    temperatures, stats = _row_floats(temperatures), stats.contiguous()
    grad_logprobs = grad_logprobs.float().contiguous()
    grad_entropy, entropy = _row_floats(grad_entropy), entropy.contiguous()
    if out is None:
        out = torch.empty(num_rows, vocab_size, dtype=logits.dtype)
    native.module().token_logprobs_backward(
        logits=logits.data_ptr(),
        is_bf16=logits.dtype == torch.bfloat16,
        num_rows=num_rows,
        vocab_size=vocab_size,
        row_stride=logits.stride(0),
        token_ids=token_ids.data_ptr(),
        temperatures=_address(temperatures),
        temperature=temperature,
        loss_mask=_address(loss_mask),
        stats=stats.data_ptr(),
        entropy=entropy.data_ptr() if grad_entropy is not None else 0,
        grad_logprobs=grad_logprobs.data_ptr(),
        grad_entropy=_address(grad_entropy),
        out=out.data_ptr(),
        out_stride=out.stride(0),
        num_threads=torch.get_num_threads(),
    )
    return out


NATIVE_ROWS = RowKernels(forward_native, backward_native)

# --- the op

FORWARD = {"reference": ROWS.forward, "native": forward_native}
BACKWARD = {"reference": ROWS.backward, "native": backward_native}


def _fake_fwd(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    temperatures: torch.Tensor | None,
    temperature: float,
    loss_mask: torch.Tensor | None,
    return_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dtype, num_rows = compute_dtype(logits), logits.shape[0]
    return (
        logits.new_empty(num_rows, dtype=dtype),
        logits.new_empty(num_rows if return_entropy else 0, dtype=dtype),
        logits.new_empty(2, num_rows, dtype=dtype),
    )


def _check_data(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    temperatures: torch.Tensor | None,
    temperature: float,
    loss_mask: torch.Tensor | None,
    return_entropy: bool,
) -> None:
    checks.token_ids_data(token_ids, logits.shape[1], loss_mask)
    checks.temperature_data(temperatures, loss_mask)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, token_ids, temperatures, temperature, loss_mask, return_entropy = inputs
    _, entropy, stats = output
    ctx.temperature, ctx.return_entropy = temperature, return_entropy
    ctx.mark_non_differentiable(*((stats,) if return_entropy else (stats, entropy)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, token_ids, temperatures, loss_mask, stats, entropy)


def _row_gradients(
    ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The incoming gradients, with zeros where the caller used one output only."""
    if grad_logprobs is None:
        stats = ctx.saved_tensors[4]
        grad_logprobs = stats.new_zeros(stats.shape[1])
    return grad_logprobs, grad_entropy if ctx.return_entropy else None


def _backward(
    ctx: Any, grad_logprobs: torch.Tensor | None, grad_entropy: torch.Tensor | None, _: Any
) -> tuple:
    logits, token_ids, temperatures, loss_mask, stats, entropy = ctx.saved_tensors
    g, h = _row_gradients(ctx, grad_logprobs, grad_entropy)
    gradient = _op_bwd(
        logits, token_ids, temperatures, ctx.temperature, loss_mask, stats, entropy, g, h
    )
    return gradient, None, None, None, None, None


_op = register(
    "token_logprobs(Tensor logits, Tensor token_ids, Tensor? temperatures, float temperature, "
    "Tensor? loss_mask, bool return_entropy) -> (Tensor, Tensor, Tensor)",
    FORWARD,
    _fake_fwd,
    check=_check_data,
    setup_context=_setup_context,
    backward=_backward,
)

_BWD_ARGUMENTS = (
    "Tensor token_ids, Tensor? temperatures, float temperature, Tensor? loss_mask, Tensor stats, "
    "Tensor entropy, Tensor grad_logprobs, Tensor? grad_entropy)"
)
_op_bwd = register(
    f"token_logprobs_bwd(Tensor logits, {_BWD_ARGUMENTS} -> Tensor",
    BACKWARD,
    lambda logits, *_: logits.new_empty(logits.shape),
)


def _into_logits(implementation: Any) -> Any:
    def run(logits: torch.Tensor, *arguments: Any) -> None:
        implementation(logits, *arguments, logits)
        # Whoever saved these logits for a backward of its own now gets autograd's error.
        torch.autograd.graph.increment_version(logits)

    return run


_op_bwd_inplace = register(
    f"token_logprobs_bwd_(Tensor(a!) logits, {_BWD_ARGUMENTS} -> ()",
    {name: _into_logits(function) for name, function in BACKWARD.items()},
    lambda *_: None,
)


class _InplaceGradient(torch.autograd.Function):
    """The same op with a backward that overwrites the logits with their gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple:
        output = _op(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        logits, token_ids, temperatures, loss_mask, stats, entropy = ctx.saved_tensors
        g, h = _row_gradients(ctx, grads[0], grads[1])
        logits = logits.detach()
        _op_bwd_inplace(
            logits, token_ids, temperatures, ctx.temperature, loss_mask, stats, entropy, g, h
        )
        return logits, None, None, None, None, None


# --- public


@overload
def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    loss_mask: torch.Tensor | None = None,
    return_entropy: Literal[False] = False,
    inplace_grad: bool = False,
) -> torch.Tensor: ...


@overload
def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    loss_mask: torch.Tensor | None = None,
    return_entropy: Literal[True],
    inplace_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    loss_mask: torch.Tensor | None = None,
    return_entropy: bool = False,
    inplace_grad: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """log_softmax(logits / temperature) at token_ids, and on request the entropy of each row.

    logits: [..., V] floating point, any strides. token_ids: [...] integer.
    temperature: a number above 0, or a tensor shaped like token_ids (it gets no gradient).
    loss_mask: [...] bool; rows where it is False give 0 and no gradient, whatever they hold, and
        their token ids may be anything.
    return_entropy: also return the entropy in nats, with its gradient.
    inplace_grad: backward writes the gradient of the logits into their own storage, so it needs no
        second [..., V] buffer. The logits are destroyed: nothing else may use them, and a second
        backward raises. They must be the output of an op, viewable as [N, V]. Under torch.compile
        the option changes nothing, the compiler plans the memory.

    Returns logprobs [...] float32 (float64 for float64 logits), or (logprobs, entropy).
    Raises ValueError for wrong dtypes, shapes or devices, a temperature not above 0, and a trained
    token id outside [0, V). On CUDA the last two are not looked at, since that would wait for the
    device: such rows give NaN.
    """
    checks.floating("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must have shape [..., V] with V > 0, not {list(logits.shape)}")
    checks.integer("token_ids", token_ids)
    checks.shape("token_ids", token_ids, logits.shape[:-1], "that of logits without V")
    checks.device("token_ids", token_ids, "logits", logits)
    temperatures, number = checks.temperature(temperature, token_ids)
    if loss_mask is not None:
        checks.mask("loss_mask", loss_mask, "token_ids", token_ids)
        loss_mask = loss_mask.reshape(-1)
    shape = token_ids.shape
    num_rows = token_ids.numel()
    op = _op
    if inplace_grad and checks.wants_grad(logits) and not torch.compiler.is_compiling():
        if logits.is_leaf:
            raise ValueError("logits must be the output of an op with inplace_grad, not a leaf")
        try:
            flat = logits.view(num_rows, logits.shape[-1])
        except RuntimeError:
            raise ValueError(
                "logits must be viewable as [N, V] with inplace_grad, but have shape "
                f"{list(logits.shape)} and strides {list(logits.stride())}"
            ) from None
        op = _InplaceGradient.apply
    else:
        flat = logits.reshape(num_rows, logits.shape[-1])
    logprobs, entropy, _ = op(
        flat,
        token_ids.reshape(-1).long(),
        temperatures,
        number,
        loss_mask,
        return_entropy,
    )
    if return_entropy:
        return logprobs.view(shape), entropy.view(shape)
    return logprobs.view(shape)

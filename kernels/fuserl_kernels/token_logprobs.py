"""Log-probability of a chosen token per row: log_softmax(softcap(logits) / temperature)[token_id].

logits [..., V] of any floating dtype; results in float32 (float64 for float64), computed from
statistics kept in that dtype. Saved for backward: logits, token ids, two statistics a row, and the
entropy if asked. Forward reads the logits once (N V elements); backward reads them and writes as
many. Formulas: reference/logprobs.py.
"""

from typing import Any, Literal, overload

import torch

from fuserl_kernels import checks, native
from fuserl_kernels.reference.logprobs import token_logprobs_bwd, token_logprobs_fwd
from fuserl_kernels.reference.sequences import compute_dtype
from fuserl_kernels.registration import not_twice, register
from fuserl_kernels.triton_helpers import (
    LOG2E,
    _row_statistics,
    _store_gradient,
    _token_logprob,
    overlays,
)
from fuserl_kernels.triton_runtime import TUNING_ROWS, Configuration, fastest, tl, triton

# --- triton: rows of float32, bf16 or fp16, one program a row


@triton.jit(do_not_specialize=["num_rows"])
def _fwd_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    token_ids_ptr,
    temperatures_ptr,  # or None for the number
    mask_ptr,  # or None
    logprobs_ptr,
    entropy_ptr,
    stats_ptr,
    num_rows,
    vocab_size,
    row_stride,
    col_stride,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if mask_ptr is not None:  # noqa: SIM102 - known to the compiler, where `and` is not
        if tl.load(mask_ptr + row) == 0:
            tl.store(logprobs_ptr + row, 0.0)
            tl.store(stats_ptr + row, 0.0)
            tl.store(stats_ptr + num_rows + row, 0.0)
            if ENTROPY:
                tl.store(entropy_ptr + row, 0.0)
            return
    if temperatures_ptr is not None:
        temperature = tl.load(temperatures_ptr + row)
    row_ptr = logits_ptr + row * row_stride
    row_max, log_sum, entropy = _row_statistics(
        row_ptr, col_stride, vocab_size, LOG2E / temperature, softcap,
        SOFTCAP, ENTROPY, STAGES,
    )  # fmt: skip
    logprob = _token_logprob(
        row_ptr, col_stride, vocab_size, tl.load(token_ids_ptr + row),
        row_max, log_sum, temperature, softcap, SOFTCAP,
    )  # fmt: skip
    tl.store(logprobs_ptr + row, logprob)
    tl.store(stats_ptr + row, row_max)
    tl.store(stats_ptr + num_rows + row, log_sum)
    if ENTROPY:
        tl.store(entropy_ptr + row, entropy)


@triton.jit(do_not_specialize=["num_rows"])
def _bwd_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    token_ids_ptr,
    temperatures_ptr,  # or None for the number
    mask_ptr,  # or None
    stats_ptr,
    entropy_ptr,
    grad_logprobs_ptr,
    grad_entropy_ptr,  # or None
    out_ptr,
    num_rows,
    vocab_size,
    row_stride,
    col_stride,
    out_row_stride,
    out_col_stride,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    OVERLAY: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    out_ptr += row * out_row_stride
    if mask_ptr is not None:  # noqa: SIM102
        if tl.load(mask_ptr + row) == 0:
            lanes = tl.arange(0, BLOCK_V)
            for start in tl.range(0, vocab_size, BLOCK_V):
                cols = start + lanes
                zero = tl.zeros((BLOCK_V,), out_ptr.dtype.element_ty)
                tl.store(out_ptr + cols.to(tl.int64) * out_col_stride, zero, mask=cols < vocab_size)
            return
    if temperatures_ptr is not None:
        temperature = tl.load(temperatures_ptr + row)
    g = tl.load(grad_logprobs_ptr + row)
    ENTROPY: tl.constexpr = grad_entropy_ptr is not None
    h, entropy = 0.0, 0.0
    if ENTROPY:
        h, entropy = tl.load(grad_entropy_ptr + row), tl.load(entropy_ptr + row)
    _store_gradient(
        logits_ptr + row * row_stride, col_stride, out_ptr, out_col_stride, vocab_size,
        tl.load(token_ids_ptr + row), tl.load(stats_ptr + row), tl.load(stats_ptr + num_rows + row),
        entropy, -g, -g, h, temperature, softcap, SOFTCAP, ENTROPY, OVERLAY, BLOCK_V, STAGES,
    )  # fmt: skip


# By the bytes of a logit: LANES columns in 16-byte loads keep 8 warps of bf16 or 16 of fp32 busy.
# Each gives the same bits, so timing may choose.
FWD_CONFIGURATIONS = {
    2: [Configuration(w, 3, {"STAGES": stages}) for w, stages in ((8, 2), (8, 1), (8, 3))],
    4: [Configuration(w, 3, {"STAGES": stages}) for w, stages in ((8, 2), (8, 1), (16, 2))],
}
BWD_CONFIGURATIONS = [
    Configuration(warps, 3, {"BLOCK_V": block, "STAGES": stages})
    for block, warps, stages in ((4096, 8, 2), (4096, 8, 1), (2048, 4, 2), (8192, 16, 1))
]


def forward_triton(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    temperatures: torch.Tensor | None,
    temperature: float,
    softcap: float,
    loss_mask: torch.Tensor | None,
    return_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, vocab_size = logits.shape
    logprobs = logits.new_empty(num_rows, dtype=torch.float32)
    entropy = logits.new_empty(num_rows if return_entropy else 0, dtype=torch.float32)
    stats = logits.new_empty(2, num_rows, dtype=torch.float32)
    if num_rows == 0:
        return logprobs, entropy, stats
    arguments = (
        logits,
        token_ids.contiguous(),
        _row_floats(temperatures),
        _row_mask(loss_mask),
        logprobs,
        entropy,
        stats,
        num_rows,
        vocab_size,
        *logits.stride(),
        temperature,
        softcap,
        softcap != 0.0,
        return_entropy,
    )

    def launch(configuration: Configuration) -> None:
        _fwd_kernel[(num_rows,)](*arguments, **configuration.arguments())

    rows = min(num_rows, TUNING_ROWS).bit_length()
    key = ("token_logprobs", logits.device, logits.dtype, rows, vocab_size, arguments[-2:])
    launch(fastest(key, FWD_CONFIGURATIONS[logits.element_size()], launch))
    return logprobs, entropy, stats


def backward_triton(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    temperatures: torch.Tensor | None,
    temperature: float,
    softcap: float,
    loss_mask: torch.Tensor | None,
    stats: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    num_rows, vocab_size = logits.shape
    if out is None:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if num_rows == 0:
        return out
    arguments = (
        logits,
        token_ids.contiguous(),
        _row_floats(temperatures),
        _row_mask(loss_mask),
        stats.contiguous(),
        entropy.contiguous(),
        _row_floats(grad_logprobs),
        _row_floats(grad_entropy),
    )
    sizes = (num_rows, vocab_size, *logits.stride())
    numbers = (temperature, softcap, softcap != 0.0, overlays(out, logits))

    def launch(configuration: Configuration, into: torch.Tensor) -> None:
        _bwd_kernel[(into.shape[0],)](
            *arguments, into, *sizes, *into.stride(), *numbers, **configuration.arguments()
        )

    def measure(configuration: Configuration) -> None:
        launch(configuration, out.new_empty(rows, vocab_size))

    rows = min(num_rows, TUNING_ROWS)
    key = ("token_logprobs_bwd", logits.device, logits.dtype, out.dtype, rows.bit_length())
    launch(fastest((*key, vocab_size, numbers[2:]), BWD_CONFIGURATIONS, measure), out)
    return out


# --- native: rows of float32, bf16 or fp16 on the CPU


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
    softcap: float,
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
        dtype=native.dtype(logits),
        num_rows=num_rows,
        vocab_size=vocab_size,
        row_stride=logits.stride(0),
        token_ids=token_ids.data_ptr(),
        temperatures=native.address(temperatures),
        temperature=temperature,
        softcap=softcap,
        loss_mask=native.address(loss_mask),
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
    softcap: float,
    loss_mask: torch.Tensor | None,
    stats: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`out` has the dtype of logits and may be the logits; or it is bf16 for float32 logits, and
    may lie over them with each row starting where its logits do."""
    num_rows, vocab_size = logits.shape
    if out is not None and out.stride(-1) != 1 and vocab_size > 1:
        return out.copy_(
            backward_native(
                logits,
                token_ids,
                temperatures,
                temperature,
                softcap,
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
    out_is_new = out is None
    if out is None:
        out = torch.empty(num_rows, vocab_size, dtype=logits.dtype)
    native.module().token_logprobs_backward(
        logits=logits.data_ptr(),
        dtype=native.dtype(logits),
        num_rows=num_rows,
        vocab_size=vocab_size,
        row_stride=logits.stride(0),
        token_ids=token_ids.data_ptr(),
        temperatures=native.address(temperatures),
        temperature=temperature,
        softcap=softcap,
        loss_mask=native.address(loss_mask),
        stats=stats.data_ptr(),
        entropy=entropy.data_ptr() if grad_entropy is not None else 0,
        grad_logprobs=grad_logprobs.data_ptr(),
        grad_entropy=native.address(grad_entropy),
        out=out.data_ptr(),
        out_dtype=native.dtype(out),
        out_stride=out.stride(0),
        out_is_new=out_is_new,
        num_threads=torch.get_num_threads(),
    )
    return out


# --- the op

FORWARD = {"reference": token_logprobs_fwd, "triton": forward_triton, "native": forward_native}
BACKWARD = {"reference": token_logprobs_bwd, "triton": backward_triton, "native": backward_native}


def _fake_fwd(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    temperatures: torch.Tensor | None,
    temperature: float,
    softcap: float,
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
    softcap: float,
    loss_mask: torch.Tensor | None,
    return_entropy: bool,
) -> None:
    checks.token_ids_data(token_ids, logits.shape[1], loss_mask)
    checks.temperature_data(temperatures, loss_mask)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, token_ids, temperatures, temperature, softcap, loss_mask, return_entropy = inputs
    _, entropy, stats = output
    ctx.numbers, ctx.return_entropy = (temperature, softcap), return_entropy
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
        logits, token_ids, temperatures, *ctx.numbers, loss_mask, stats, entropy, g, h
    )
    return gradient, *[None] * 6


_op = register(
    "token_logprobs(Tensor logits, Tensor token_ids, Tensor? temperatures, float temperature, "
    "float softcap, Tensor? loss_mask, bool return_entropy) -> (Tensor, Tensor, Tensor)",
    FORWARD,
    _fake_fwd,
    check=_check_data,
    setup_context=_setup_context,
    backward=_backward,
)

_BWD_ARGUMENTS = (
    "Tensor token_ids, Tensor? temperatures, float temperature, float softcap, Tensor? loss_mask, "
    "Tensor stats, Tensor entropy, Tensor grad_logprobs, Tensor? grad_entropy)"
)
_op_bwd = register(
    f"token_logprobs_bwd(Tensor logits, {_BWD_ARGUMENTS} -> Tensor",
    BACKWARD,
    lambda logits, *_: logits.new_empty(logits.shape),
    backward=not_twice,
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
            logits, token_ids, temperatures, *ctx.numbers, loss_mask, stats, entropy, g, h
        )
        return logits, *[None] * 6


# --- public


def _overwritable(logits: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The logits as [num_rows, V], or ValueError if their memory must not be written over."""
    base = logits if logits._base is None else logits._base
    if logits.is_leaf or base.is_leaf:
        raise ValueError(
            "logits must be the output of an op with inplace_grad, not a leaf or a view of one"
        )
    layout = f"shape {list(logits.shape)} and strides {list(logits.stride())}"
    try:
        flat = logits.view(num_rows, logits.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"logits must be viewable as [N, V] with inplace_grad, but have {layout}"
        ) from None
    strides = sorted((s, n) for s, n in zip(flat.stride(), flat.shape, strict=True) if n > 1)
    nested = len(strides) < 2 or strides[1][0] > (strides[0][1] - 1) * strides[0][0]
    if not nested or (strides and strides[0][0] == 0):
        raise ValueError(f"logits overlap themselves, which inplace_grad forbids: {layout}")
    return flat


@overload
def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
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
    softcap: float | None = None,
    loss_mask: torch.Tensor | None = None,
    return_entropy: Literal[True],
    inplace_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def token_logprobs(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    loss_mask: torch.Tensor | None = None,
    return_entropy: bool = False,
    inplace_grad: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """log_softmax of softcap(logits) / temperature at token_ids, and on request each row's entropy.

    logits: [..., V] floating point, any strides. token_ids: [...] integer.
    temperature: a number above 0, or a tensor shaped like token_ids (it gets no gradient).
    softcap: c > 0 replaces each logit x by c * tanh(x / c), before the temperature (Gemma 2).
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
    checks.softcap(softcap)
    temperatures, number = checks.temperature(temperature, token_ids)
    if loss_mask is not None:
        checks.mask("loss_mask", loss_mask, "token_ids", token_ids)
        loss_mask = loss_mask.reshape(-1)
    shape = token_ids.shape
    num_rows = token_ids.numel()
    op = _op
    if inplace_grad and checks.wants_grad(logits) and not torch.compiler.is_compiling():
        flat = _overwritable(logits, num_rows)
        op = _InplaceGradient.apply
    else:
        flat = logits.reshape(num_rows, logits.shape[-1])
    logprobs, entropy, _ = op(
        flat,
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

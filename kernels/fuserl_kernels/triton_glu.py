"""glu on a GPU: a block of columns of one row a program. Formulas: reference/glu.py."""

import torch

from fuserl_kernels.triton_helpers import _cast
from fuserl_kernels.triton_runtime import Configuration, tl, triton


@triton.jit
def _sigmoid(u):  # type: ignore[no-untyped-def]
    """sigmoid(u) and sigmoid(-u), neither by a difference."""
    e = tl.exp(-tl.abs(u))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(u < 0, smaller, larger), tl.where(u < 0, larger, smaller)


@triton.jit
def _normal_tail(x):  # type: ignore[no-untyped-def]
    """1 - Phi(x) for x >= 0, and e^(-x^2 / 2): the tail is e t P(t) with t = 1 / (1 + 0.21 x) and a
    minimax polynomial (relative error 2.3e-8 before rounding, to x = 15)."""
    e = tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.21 * x)
    p = tl.fma(t, -0.07094634, 0.28008724)
    p = tl.fma(p, t, -0.32288151)
    p = tl.fma(p, t, 0.34075952)
    p = tl.fma(p, t, -0.08776602)
    p = tl.fma(p, t, 0.12214333)
    p = tl.fma(p, t, 0.06992564)
    p = tl.fma(p, t, 0.08495968)
    p = tl.fma(p, t, 0.08371846)
    return e * (t * p), e


@triton.jit
def _activation_and_slope(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation at x float32, and its derivative there."""
    if ACTIVATION == "relu":
        value = tl.where(x < 0, 0.0, x)
        slope = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        # Beyond 20 the tail is 0; held there, the square stays finite.
        held = tl.where(x > 20.0, 20.0, tl.where(x < -20.0, -20.0, x))
        tail, e = _normal_tail(tl.abs(held))
        share = tl.where(x < 0, tail, 1.0 - tail)
        value = x * share
        slope = share + held * (e * 0.3989422804014327)
    elif ACTIVATION == "gelu_tanh":
        held = tl.where(x > 100.0, 100.0, tl.where(x < -100.0, -100.0, x))
        square = held * held
        share, rest = _sigmoid(1.5957691216057308 * held * (1.0 + 0.044715 * square))
        value = x * share
        slope = share + value * rest * (1.5957691216057308 * (1.0 + 0.134145 * square))
    else:
        share, rest = _sigmoid(x)
        value = x * share
        slope = share + value * rest
    return value, slope


@triton.jit(do_not_specialize=["num_rows"])
def _glu_kernel(  # type: ignore[no-untyped-def]
    gate_up_ptr,
    grad_ptr,  # or None in the forward pass
    out_ptr,
    num_rows,
    size,
    row_stride,
    grad_stride,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < size
    gate_ptr = gate_up_ptr + row * row_stride + cols
    gate = tl.load(gate_ptr, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + size, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activation_and_slope(gate, ACTIVATION)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if grad_ptr is None:
        tl.store(out_ptr + row * size + cols, _cast(value * up, dtype), mask=inside)
    else:
        grad = tl.load(grad_ptr + row * grad_stride + cols, mask=inside, other=0.0).to(tl.float32)
        grad_gate_ptr = out_ptr + 2 * row * size + cols
        tl.store(grad_gate_ptr, _cast(grad * up * slope, dtype), mask=inside)
        tl.store(grad_gate_ptr + size, _cast(grad * value, dtype), mask=inside)


CONFIGURATION = Configuration(4, 1, {"BLOCK": 1024})


def _launch(
    gate_up: torch.Tensor, grad: torch.Tensor | None, out: torch.Tensor, activation: str
) -> torch.Tensor:
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    if out.numel():
        _glu_kernel[(num_rows, -(-size // CONFIGURATION.constants["BLOCK"]))](
            gate_up,
            grad,
            out,
            num_rows,
            size,
            gate_up.stride(0),
            0 if grad is None else grad.stride(0),
            activation,
            **CONFIGURATION.arguments(),
        )
    return out


def _unit_stride(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def forward_triton(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """[N, 2 I] -> [N, I]"""
    gate_up = _unit_stride(gate_up)
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    return _launch(gate_up, None, out, activation)


def backward_triton(gate_up: torch.Tensor, grad: torch.Tensor, activation: str) -> torch.Tensor:
    """[N, 2 I], [N, I] -> [N, 2 I]"""
    gate_up, grad = _unit_stride(gate_up), _unit_stride(grad)
    return _launch(gate_up, grad, gate_up.new_empty(gate_up.shape), activation)

"""Gated activation: activation(gate) * up, for rows that hold a gate and then an up half.

gate_up [..., 2 I] of any floating dtype -> [..., I] of that dtype, computed in float32 (float64 for
float64) and rounded once. Saved for backward: gate_up. Forward moves 3 N I elements, backward, one
pass over gate_up and the incoming gradient, 5 N I. Formulas: reference/glu.py.
"""

from typing import Any

import torch

from fuserl_kernels import checks
from fuserl_kernels.native_glu import backward_native, forward_native
from fuserl_kernels.reference.glu import ACTIVATIONS, glu_bwd, glu_fwd
from fuserl_kernels.registration import not_twice, register
from fuserl_kernels.triton_glu import backward_triton, forward_triton

FORWARD = {"reference": glu_fwd, "triton": forward_triton, "native": forward_native}
BACKWARD = {"reference": glu_bwd, "triton": backward_triton, "native": backward_native}


def _setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    gate_up, ctx.activation = inputs
    ctx.save_for_backward(gate_up)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple:
    (gate_up,) = ctx.saved_tensors
    return _op_bwd(gate_up, grad, ctx.activation), None


_op = register(
    "glu(Tensor gate_up, str activation) -> Tensor",
    FORWARD,
    lambda gate_up, _: gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2),
    setup_context=_setup_context,
    backward=_backward,
)
_op_bwd = register(
    "glu_bwd(Tensor gate_up, Tensor grad, str activation) -> Tensor",
    BACKWARD,
    lambda gate_up, *_: gate_up.new_empty(gate_up.shape),
    backward=not_twice,
)


def glu(gate_up: torch.Tensor, *, activation: str = "silu") -> torch.Tensor:
    """activation(gate) * up, with gate the first and up the second half of the last dimension.

    gate_up: [..., 2 I] floating point, any strides.
    activation: "silu" (SwiGLU), "gelu" (by the error function), "gelu_tanh" (its tanh
        approximation, as Gemma has it) or "relu".

    Returns [..., I] in the dtype of gate_up. Raises ValueError for another activation, an odd or
    absent last dimension, and a dtype that is not floating point.
    """
    checks.floating("gate_up", gate_up)
    checks.choice("activation", activation, ACTIVATIONS)
    if gate_up.dim() < 1 or gate_up.shape[-1] % 2 or gate_up.shape[-1] == 0:
        raise ValueError(f"gate_up must have shape [..., 2 I], not {list(gate_up.shape)}")
    if gate_up.dim() == 2:
        return _op(gate_up, activation)
    rows = gate_up.shape[:-1]
    flat = gate_up.reshape(rows.numel(), gate_up.shape[-1])
    return _op(flat, activation).view(*rows, gate_up.shape[-1] // 2)

"""glu on the CPU: float32, bf16 or fp16 rows in the compiled module."""

import torch

from fuserl_kernels import native
from fuserl_kernels.token_logprobs import _unit_stride


def forward_native(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """[N, 2 I] -> [N, I]"""
    gate_up = _unit_stride(gate_up)
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_rows, size)
    native.module().glu_forward(
        activation=activation,
        dtype=native.dtype(gate_up),
        gate_up=gate_up.data_ptr(),
        num_rows=num_rows,
        size=size,
        row_stride=gate_up.stride(0),
        out=out.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return out


def backward_native(gate_up: torch.Tensor, grad: torch.Tensor, activation: str) -> torch.Tensor:
    """[N, 2 I], [N, I] -> [N, 2 I]"""
    gate_up, grad = _unit_stride(gate_up), _unit_stride(grad)
    num_rows, size = grad.shape
    out = gate_up.new_empty(num_rows, 2 * size)
    native.module().glu_backward(
        activation=activation,
        dtype=native.dtype(gate_up),
        gate_up=gate_up.data_ptr(),
        num_rows=num_rows,
        size=size,
        row_stride=gate_up.stride(0),
        grad=grad.data_ptr(),
        grad_stride=grad.stride(0),
        out=out.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return out

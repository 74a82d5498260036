"""Launchers of the norms on the CPU: csrc/cpu/norms.h. Rows of float32, bf16 or fp16."""

from typing import Any

import torch

from fuserl_kernels import native
from fuserl_kernels.row_layout import RowLayout, readable_vector, row_layout


def _norm(
    rows: torch.Tensor,
    layout: RowLayout,
    weight: torch.Tensor,
    weight_offset: float,
    centered: bool,
) -> dict[str, Any]:
    """What forward and backward share."""
    return {
        "rows": rows.data_ptr(),
        "dtype": native.dtype(rows),
        "num_rows": layout.num_rows,
        "hidden_size": rows.shape[-1],
        "inner_rows": layout.inner_rows,
        "outer_stride": layout.outer_stride,
        "inner_stride": layout.inner_stride,
        "weight": weight.data_ptr(),
        "weight_dtype": native.dtype(weight),
        "weight_offset": weight_offset,
        "centered": centered,
        "num_threads": torch.get_num_threads(),
    }


def forward_native(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    eps: float,
    weight_offset: float,
    centered: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, layout = row_layout(x)
    weight = readable_vector(weight)
    bias = None if bias is None else readable_vector(bias)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if residual is None:
        summed = x.new_empty(0)
    else:
        residual, summed = residual.contiguous(), torch.empty_like(y)
    stats = x.new_empty((2 if centered else 1, *x.shape[:-1]), dtype=torch.float32)
    native.module().norm_forward(
        **_norm(x, layout, weight, weight_offset, centered),
        bias=native.address(bias),
        bias_dtype=native.dtype(weight if bias is None else bias),
        residual=native.address(residual),
        eps=eps,
        y=y.data_ptr(),
        summed=summed.data_ptr(),
        stats=stats.data_ptr(),
    )
    return y, summed, stats


def backward_native(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stats: torch.Tensor,
    grad_y: torch.Tensor,
    grad_summed: torch.Tensor | None,
    weight_offset: float,
    weight_grad: bool,
    centered: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, layout = row_layout(rows)
    vector = readable_vector(weight)
    stats, grad_y = stats.contiguous(), grad_y.contiguous()
    grad_summed = None if grad_summed is None else grad_summed.contiguous()
    grad_x = torch.empty_like(rows, memory_format=torch.contiguous_format)
    num_sums = (2 if centered else 1) if weight_grad else 0
    sums = rows.new_empty((num_sums, rows.shape[-1]), dtype=torch.float32)
    native.module().norm_backward(
        **_norm(rows, layout, vector, weight_offset, centered),
        stats=stats.data_ptr(),
        grad_y=grad_y.data_ptr(),
        grad_summed=native.address(grad_summed),
        grad_x=grad_x.data_ptr(),
        grad_vectors=sums.data_ptr() if weight_grad else 0,
    )
    if not weight_grad:
        return grad_x, weight.new_empty(0), weight.new_empty(0)
    grad_weight = sums[0].to(weight.dtype, copy=centered)
    grad_bias = weight.new_empty(0) if bias is None else sums[1].to(bias.dtype, copy=True)
    return grad_x, grad_weight, grad_bias

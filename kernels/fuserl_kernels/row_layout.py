"""Where the rows of a tensor [..., D] lie, so that kernels read views of it without a copy, and
vectors [D] in a dtype that kernels read."""

from typing import NamedTuple

import torch


class RowLayout(NamedTuple):
    """Row r begins at r // inner_rows * outer_stride + r % inner_rows * inner_stride elements."""

    num_rows: int
    inner_rows: int
    outer_stride: int
    inner_stride: int

    @property
    def is_plain(self) -> bool:
        """One stride serves all rows."""
        return self.inner_rows >= self.num_rows


_READABLE = (torch.float32, torch.bfloat16, torch.float16)


def readable_vector(vector: torch.Tensor) -> torch.Tensor:
    """Contiguous, and float32 for any other dtype than kernels read (float64, float8)."""
    return (vector if vector.dtype in _READABLE else vector.float()).contiguous()


def row_layout(x: torch.Tensor) -> tuple[torch.Tensor, RowLayout]:
    """x itself where its rows are whole and two strides reach them, as of a slice of heads out of
    [N, heads, head_dim]; else a contiguous copy."""
    size = x.shape[-1]
    if not x.is_contiguous():
        if x.stride(-1) == 1 and x.dim() == 2:
            return x, RowLayout(x.shape[0], max(1, x.shape[0]), 0, x.stride(0))
        if x.stride(-1) == 1 and x.dim() == 3:
            outer, inner, _ = x.shape
            return x, RowLayout(outer * inner, max(1, inner), x.stride(0), x.stride(1))
        x = x.contiguous()
    num_rows = x.numel() // size
    return x, RowLayout(num_rows, max(1, num_rows), 0, size)

"""Causal attention over packed sequences on a CPU, in and out of the packed tensors themselves.

torch's fused CPU kernel runs a sequence at a time. It computes in fp32 whatever the dtype: in bf16
its backward pass takes up to three times as long at the lengths of a batch, and errs more. What is
kept for the backward pass stays in the dtype of the inputs.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float
) -> Tensor:
    """query [N, num_heads, head_dim], key and value [N, num_kv_heads, head_dim] of sequences of
    `lengths` end to end; returns [N, num_heads, head_dim]. No second derivative."""
    return _CPUAttention.apply(query, key, value, lengths, scale)


class _CPUAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float
    ) -> Tensor:
        out, group = torch.empty_like(query), query.shape[1] // key.shape[1]
        statistics = []
        for rows in _sequences(lengths):
            heads = (_heads(x[rows], n) for x, n in ((query, 1), (key, group), (value, group)))
            attended, logsumexp = _flash(*heads, 0.0, True, scale=scale)
            out[rows] = attended[0].transpose(0, 1)
            statistics.append(logsumexp)
        ctx.save_for_backward(query, key, value, out, *statistics)
        ctx.lengths, ctx.scale, ctx.group = lengths, scale, group
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *statistics = ctx.saved_tensors
        group = ctx.group
        gradients = [torch.empty_like(x) for x in (query, key, value)]
        for rows, logsumexp in zip(_sequences(ctx.lengths), statistics, strict=True):
            heads = (
                _heads(x[rows], n)
                for x, n in ((grad_out, 1), (query, 1), (key, group), (value, group), (out, 1))
            )
            found = _flash_bwd(*heads, logsumexp, 0.0, True, scale=ctx.scale)
            for gradient, of_heads in zip(gradients, found, strict=True):
                of_rows = of_heads[0].transpose(0, 1)
                if of_rows.shape[1] != gradient.shape[1]:  # key heads that queries share
                    of_rows = of_rows.unflatten(1, (-1, group)).sum(2)
                gradient[rows] = of_rows
        return (*gradients, None, None)


def _sequences(lengths: Sequence[int]) -> Iterator[slice]:
    start = 0
    for length in lengths:
        yield slice(start, start + length)
        start += length


def _heads(x: Tensor, group: int) -> Tensor:
    """[S, heads, head_dim] to fp32 (or wider) [1, heads * group, S, head_dim]."""
    if group > 1:
        x = x.repeat_interleave(group, dim=1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.transpose(0, 1).unsqueeze(0).to(dtype)

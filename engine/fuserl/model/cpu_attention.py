"""Causal attention over packed sequences on a CPU, in and out of the packed tensors themselves.

torch's fused CPU kernel runs the sequences of one length in one call: nothing is padded, and equal
lengths cost few calls. It computes in fp32 whatever the dtype: in bf16 its backward pass takes up
to three times as long at the lengths of a batch, and errs more. What is kept for the backward pass
stays in the dtype of the inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

TOKENS_TOGETHER = 8192
"""Of one call, unless one sequence is longer: what it widens to fp32 stays small."""


def cpu_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float
) -> Tensor:
    """query [N, num_heads, head_dim], key and value [N, num_kv_heads, head_dim] of sequences of
    `lengths` end to end; returns [N, num_heads, head_dim]. No second derivative."""
    return _CPUAttention.apply(query, key, value, lengths, scale)


@dataclass(frozen=True, slots=True)
class _Equals:
    """Sequences of one length, S."""

    rows: slice | Tensor  # their tokens among the N
    length: int

    def heads(self, x: Tensor, group: int) -> Tensor:
        """[N, heads, head_dim] to fp32 (or wider) [sequences, heads * group, S, head_dim]."""
        x = x[self.rows].unflatten(0, (-1, self.length))
        if group > 1:
            x = x.repeat_interleave(group, dim=2)
        dtype = torch.promote_types(x.dtype, torch.float32)
        return x.transpose(1, 2).to(dtype)

    def put(self, target: Tensor, heads: Tensor) -> None:
        """The reverse, into [N, heads, head_dim]; heads that share a key are added up."""
        of_rows = heads.transpose(1, 2).flatten(0, 1)
        if of_rows.shape[1] != target.shape[1]:
            of_rows = of_rows.unflatten(1, (target.shape[1], -1)).sum(2)
        target[self.rows] = of_rows.to(target.dtype)


def _by_length(lengths: Sequence[int]) -> list[_Equals]:
    starts: dict[int, list[int]] = {}
    for length, start in zip(lengths, accumulate(lengths, initial=0), strict=False):
        starts.setdefault(length, []).append(start)
    groups = []
    for length, of_length in starts.items():
        together = max(1, TOKENS_TOGETHER // max(1, length))
        for first in range(0, len(of_length), together):
            part = of_length[first : first + together]
            end = part[0] + len(part) * length
            if part[-1] + length == end:  # side by side, as starts ascend: nothing is gathered
                groups.append(_Equals(slice(part[0], end), length))
            else:
                rows = torch.tensor(part)[:, None] + torch.arange(length)
                groups.append(_Equals(rows.flatten(), length))
    return groups


class _CPUAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], scale: float
    ) -> Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        group = query.shape[1] // key.shape[1]
        groups, statistics = _by_length(lengths), []
        for equals in groups:
            heads = (equals.heads(x, n) for x, n in ((query, 1), (key, group), (value, group)))
            attended, logsumexp = _flash(*heads, 0.0, True, scale=scale)
            equals.put(out, attended)
            statistics.append(logsumexp)
        ctx.save_for_backward(query, key, value, out, *statistics)
        ctx.groups, ctx.scale, ctx.group = groups, scale, group
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, *statistics = ctx.saved_tensors
        group = ctx.group
        gradients = [torch.empty_like(x) for x in (query, key, value)]
        for equals, logsumexp in zip(ctx.groups, statistics, strict=True):
            heads = (
                equals.heads(x, n)
                for x, n in ((grad_out, 1), (query, 1), (key, group), (value, group), (out, 1))
            )
            found = _flash_bwd(*heads, logsumexp, 0.0, True, scale=ctx.scale)
            for gradient, of_heads in zip(gradients, found, strict=True):
                equals.put(gradient, of_heads)
        return (*gradients, None, None)

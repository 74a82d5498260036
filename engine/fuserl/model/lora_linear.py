"""One product of the decoder with low-rank adapters (Hu et al., 2021) on its rows.

A product of the decoder, such as qkv_proj, holds the rows of several modules of Hugging Face's
model one under another. A module s that is adapted takes rows [start_s, stop_s) and adds

    y[:, start_s:stop_s] += scale_s * (x A_s^T) B_s^T        A_s [rank_s, in], B_s [out_s, rank_s]

The A of all adapted modules are one matrix, so x is read once for all of them; every B adds into
its rows of y in place. Only x and x A^T are saved for the backward pass: x A^T has rank / in times
the size of x, and to make it again would read the whole of x. No gradient of the frozen weight is
computed.

Adapters are fp32 (fp64 for an fp64 model), whatever the model's dtype: they are their own master
weights. They are rounded to the dtype of x for the products, and their gradients are fp32.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, slots=True)
class Segment:
    """The adapter of one Hugging Face module: rows [start, stop) of our product."""

    module: str  # its full name, such as model.layers.0.self_attn.q_proj
    start: int
    stop: int
    rank: int
    alpha: float
    rslora: bool = False

    @property
    def scale(self) -> float:
        """alpha / rank; rslora: alpha / sqrt(rank) (Kalajdzievski, 2023)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"the rank of {self.module} must be positive, not {self.rank}")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"alpha of {self.module} must be positive, not {self.alpha}")


def _products(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    segments: Sequence[Segment],
    lora_b: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """y [N, out] and x A^T [N, ranks]. x: [N, in]."""
    y = F.linear(x, weight, bias)
    low = x @ lora_a.to(x.dtype).t()
    first = 0
    for segment, b in zip(segments, lora_b, strict=True):
        part = low[:, first : first + segment.rank]
        y[:, segment.start : segment.stop].addmm_(part, (b * segment.scale).to(x.dtype).t())
        first += segment.rank
    return y, low


class _Adapted(torch.autograd.Function):
    """y = x W^T + bias + adapters, with gradients of x, A and every B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor,
        segments: tuple[Segment, ...],
        *lora_b: Tensor,
    ) -> Tensor:
        y, low = _products(x, weight, bias, lora_a, segments, lora_b)
        ctx.segments = segments
        ctx.save_for_backward(x, low, weight, lora_a, *lora_b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, lora_a, *lora_b = ctx.saved_tensors
        low_grads: list[Tensor] = []
        b_grads: list[Tensor] = []
        first = 0
        for segment, b in zip(ctx.segments, lora_b, strict=True):
            part = y_grad[:, segment.start : segment.stop]
            low_grads.append(part @ (b * segment.scale).to(x.dtype))
            b_grad = part.t() @ low[:, first : first + segment.rank]
            b_grads.append(b_grad.to(b.dtype).mul_(segment.scale))
            first += segment.rank
        low_grad = low_grads[0] if len(low_grads) == 1 else torch.cat(low_grads, dim=1)
        a_grad = (low_grad.t() @ x).to(lora_a.dtype)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = (y_grad @ weight).addmm_(low_grad, lora_a.to(x.dtype))
        return x_grad, None, None, a_grad, None, *b_grads


class LoRALinear(nn.Linear):
    """An nn.Linear of the decoder with adapters on some of its rows.

    weight [out, in] and bias keep their names, storage and dtype, and are frozen; lora_a
    [ranks, in] and lora_b, one [rows, rank] a segment, train.
    """

    def __init__(self, linear: nn.Linear, segments: Sequence[Segment]) -> None:
        """The parameters of `linear` are taken over, not copied. A is whatever the memory held
        until `reset` or a loader sets it."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.segments = tuple(segments)
        self.is_on = True
        stops = [0, *(segment.stop for segment in self.segments)]
        if not self.segments or any(
            not before <= segment.start < segment.stop <= self.out_features
            for before, segment in zip(stops[:-1], self.segments, strict=True)
        ):
            raise ValueError(
                f"segments must be ascending row ranges within {self.out_features}, "
                f"not {[(s.start, s.stop) for s in self.segments]}"
            )
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        ranks = sum(segment.rank for segment in self.segments)
        self.lora_a = nn.Parameter(self.weight.new_empty((ranks, self.in_features), dtype=wide))
        self.lora_b = nn.ParameterList(
            nn.Parameter(self.weight.new_zeros((s.stop - s.start, s.rank), dtype=wide))
            for s in self.segments
        )
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> Self:
        """A ~ U(-1, 1) / sqrt(in), which is PEFT's Kaiming-uniform with a = sqrt(5), drawn on the
        CPU; B = 0: the model is its base."""
        drawn = torch.rand(self.lora_a.shape, generator=generator, dtype=torch.float32)
        self.lora_a.copy_((2 * drawn - 1) * self.in_features**-0.5)
        for b in self.lora_b:
            b.zero_()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        if not self.is_on:
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, self.in_features)
        b = tuple(self.lora_b)
        if not torch.is_grad_enabled():
            y, _ = _products(rows, self.weight, self.bias, self.lora_a, self.segments, b)
        elif self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            raise ValueError("a weight with adapters is frozen: its requires_grad must be False")
        else:
            y = _Adapted.apply(rows, self.weight, self.bias, self.lora_a, self.segments, *b)
        return y.view(*x.shape[:-1], self.out_features)

    def adapters(self) -> Iterator[tuple[Segment, Tensor, Tensor]]:
        """Each segment with its A [rank, in] and B [rows, rank], views of the parameters."""
        ranks = [segment.rank for segment in self.segments]
        yield from zip(self.segments, self.lora_a.split(ranks), self.lora_b, strict=True)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """weight + scale B A, a new tensor [out, in]; the sum is made in fp32 (fp64 for an fp64
        weight) and rounded once."""
        whole = self.weight.to(self.lora_a.dtype, copy=True)
        for segment, a, b in self.adapters():
            whole[segment.start : segment.stop].addmm_(b, a, alpha=segment.scale)
        return whole.to(self.weight.dtype)

    def extra_repr(self) -> str:
        ranks = {segment.module: segment.rank for segment in self.segments}
        return f"{super().extra_repr()}, ranks={ranks}"

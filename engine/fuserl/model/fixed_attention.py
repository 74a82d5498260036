"""Attention over packed sequences that sums in the order of cached decoding, with gradients.

The forward pass is decoding's own kernel: a prompt's tokens see the prompt, a completion's see the
prompt and then the completion, each in splits counted from its start. So a token gets the bits that
it got when it was sampled. Gradients are those of torch's attention on the same numbers.
"""

from typing import Any

import torch
from torch import Tensor

import fuserl_kernels as fk
from fuserl.model.attention import packed_attention
from fuserl.model.packing import Packing, rows_and_offsets


def fixed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """As packed_attention. Without packing.prompt_lengths a sequence is all prompt."""
    options = {"scale": scale, "window": window, "softcap": softcap}
    return _FixedAttention.apply(query, key, value, packing, options)


class _FixedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, packing: Packing, options: dict
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.packing, ctx.options = packing, options
        return _forward(query, key, value, packing, options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = packed_attention(*inputs, ctx.packing, **ctx.options)
        return *torch.autograd.grad(out, inputs, grad_out), None, None


def _forward(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, options: dict
) -> Tensor:
    device = query.device
    prompt_lengths = packing.prompt_lengths or packing.lengths
    completion_lengths = [
        length - prompt for length, prompt in zip(packing.lengths, prompt_lengths, strict=True)
    ]
    in_prompt = packing.positions < torch.tensor(prompt_lengths, device=device)[packing.rows]
    rows, places = rows_and_offsets(prompt_lengths, device)
    at = in_prompt.nonzero().squeeze(1)
    prompts = [_padded(x[at], rows, places, len(prompt_lengths), max(prompt_lengths))
               for x in (key, value)]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    out[at] = fk.decode_attention(query[at], *prompts, places + 1, slots=rows, **options)
    if len(at) == len(query):
        return out
    rows, places = rows_and_offsets(completion_lengths, device)
    at = (~in_prompt).nonzero().squeeze(1)
    slots = [_padded(x[at], rows, places, len(prompt_lengths), max(completion_lengths))
             for x in (key, value)]
    out[at] = fk.decode_attention(
        query[at],
        *slots,
        places + 1,
        slots=rows,
        prefix_keys=prompts[0],
        prefix_values=prompts[1],
        prefix_ids=rows,
        prefix_lengths=torch.tensor(prompt_lengths, device=device),
        **options,
    )
    return out


def _padded(x: Tensor, rows: Tensor, places: Tensor, num_rows: int, width: int) -> Tensor:
    """[N, heads, head_dim] to [num_rows, heads, width, head_dim]; what is not written is never
    read."""
    padded = x.new_empty(num_rows, x.shape[1], width, x.shape[2])
    padded[rows, :, places] = x
    return padded

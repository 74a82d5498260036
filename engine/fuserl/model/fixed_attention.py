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
from fuserl.model.packing import Packing


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
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        packing: Packing,
        options: dict[str, Any],
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.packing, ctx.options = packing, options
        return _forward(query, key, value, packing, options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = packed_attention(query, key, value, ctx.packing, **ctx.options)
        return *torch.autograd.grad(out, inputs, grad_out), None, None


def _forward(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, options: dict[str, Any]
) -> Tensor:
    device = query.device
    prompt_lengths = packing.prompt_lengths or packing.lengths
    of_prompt = torch.tensor(prompt_lengths, device=device)
    in_prompt = packing.positions < of_prompt[packing.rows]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)

    at = in_prompt.nonzero().squeeze(1)
    rows, places = packing.rows[at], packing.positions[at]
    shape = (len(prompt_lengths), max(prompt_lengths))
    prompt_keys, prompt_values = (_padded(x[at], rows, places, shape) for x in (key, value))
    out[at] = fk.decode_attention(
        query[at], prompt_keys, prompt_values, places + 1, slots=rows, **options
    )
    if len(at) == len(query):
        return out

    at = (~in_prompt).nonzero().squeeze(1)
    rows = packing.rows[at]
    places = packing.positions[at] - of_prompt[rows]
    pairs = zip(packing.lengths, prompt_lengths, strict=True)
    shape = (len(prompt_lengths), max(length - prompt for length, prompt in pairs))
    keys, values = (_padded(x[at], rows, places, shape) for x in (key, value))
    out[at] = fk.decode_attention(
        query[at],
        keys,
        values,
        places + 1,
        slots=rows,
        prefix_keys=prompt_keys,
        prefix_values=prompt_values,
        prefix_ids=rows,
        prefix_lengths=of_prompt,
        **options,
    )
    return out


def _padded(x: Tensor, rows: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """[N, heads, head_dim] to [B, heads, width, head_dim], shape (B, width); what is not written is
    never read."""
    num_rows, width = shape
    padded = x.new_empty(num_rows, x.shape[1], width, x.shape[2])
    padded[rows, :, places] = x
    return padded

"""Attention of one new token a row over a cache: its problem, and the other ways to it.

A provider takes (query, key_cache, value_cache, lengths) and returns [N, num_heads, head_dim].
Rows use half to all of the cache's num_tokens, evenly spread. What a rival makes once a step and
not once a layer, its mask, is made beforehand.
"""

import torch
import torch.nn.functional as F

import fuserl_kernels as fk
from fuserl.bench.case import Case, Cost
from fuserl.bench.problem import Problem
from fuserl.bench.rivals import Function
from fuserl.bench.truth import Tensors, Truth


def _lengths(case: Case) -> torch.Tensor:
    """[N] int64"""
    least = -(-case.num_tokens // 2)
    steps = torch.arange(case.num_rows, device=case.device)
    return least + steps * (case.num_tokens - least) // max(1, case.num_rows - 1)


def _hidden(case: Case) -> torch.Tensor:
    """True where a row may not look: bool [N, 1, 1, num_tokens]."""
    tokens = torch.arange(case.num_tokens, device=case.device)
    return (tokens >= _lengths(case)[:, None])[:, None, None]


def attention_problem(case: Case, seed: int = 0) -> Problem:
    generator = torch.Generator(case.device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, generator=generator, device=case.device)
        return x.to(case.torch_dtype)

    query = draw(case.num_rows, case.num_heads, case.head_dim)
    shape = (case.num_rows, case.num_kv_heads, case.num_tokens, case.head_dim)
    keys, values = draw(*shape), draw(*shape)
    truth = torch.cat(
        [
            _formula(q.double(), k.double(), v.double(), hidden)
            for q, k, v, hidden in zip(
                query.split(1), keys.split(1), values.split(1), _hidden(case).split(1), strict=True
            )
        ]
    )
    return Problem(case, (query, keys, values, _lengths(case)), 0, (), Truth((truth,)))


def attention_cost(case: Case) -> Cost:
    """Each key and value in use is read once, each query read and each result written."""
    rows = 2 * case.num_rows * case.num_heads * case.head_dim
    cached = 2 * int(_lengths(case).sum()) * case.num_kv_heads * case.head_dim
    flops = 4 * int(_lengths(case).sum()) * case.num_heads * case.head_dim
    return Cost((rows + cached) * case.torch_dtype.itemsize, flops)


def ours(case: Case) -> Function:
    return lambda *tensors: (fk.decode_attention(*tensors),)


def _formula(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """As a decoder's eager attention has it: softmax of the masked scores, in float32 at least."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
    scores = (query.unsqueeze(2) @ keys.transpose(2, 3)) * query.shape[-1] ** -0.5
    wide = scores if scores.dtype == torch.float64 else scores.float()
    weights = wide.masked_fill(hidden, -torch.inf).softmax(-1).to(values.dtype)
    return (weights @ values).squeeze(2)


def eager(case: Case) -> Function:
    hidden = _hidden(case)

    def run(
        query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor
    ) -> Tensors:
        return (_formula(query, keys, values, hidden),)

    return run


def sdpa(case: Case) -> Function:
    """Torch's attention; the heads that share keys become its query axis, which is its fastest."""
    visible = ~_hidden(case)

    def run(
        query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor
    ) -> Tensors:
        grouped = query.unflatten(1, (case.num_kv_heads, -1))
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible)
        return (out.flatten(1, 2),)

    return run

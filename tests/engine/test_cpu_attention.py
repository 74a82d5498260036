"""Packed attention on a CPU against the definition in float64, and against torch's own in bf16."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fuserl.model import cpu_attention as cpu_attention_module
from fuserl.model.cpu_attention import cpu_attention

LENGTHS = (5, 1, 40, 40, 33, 5)  # neighbours of one length, and others apart
SCALE = 0.3


def inputs(num_heads: int, num_kv_heads: int, head_dim: int = 12) -> list[Tensor]:
    """Query, key, value, and the gradient of the output, float64."""
    generator = torch.Generator().manual_seed(0)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    return [
        torch.randn(sum(LENGTHS), n, head_dim, generator=generator, dtype=torch.float64)
        for n in heads
    ]


def definition(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    parts = []
    for q, k, v in zip(*(x.split(list(LENGTHS)) for x in (query, key, value)), strict=True):
        scores = torch.einsum("shd,thd->hst", q, k) * SCALE
        future = torch.ones(len(q), len(q)).triu(1).bool()
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        parts.append(torch.einsum("hst,thd->shd", weights, v))
    return torch.cat(parts)


def of_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    parts = []
    for heads in zip(*(x.split(list(LENGTHS)) for x in (query, key, value)), strict=True):
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in heads)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=SCALE, enable_gqa=q.shape[1] != k.shape[1]
        )
        parts.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(parts)


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return cpu_attention(query, key, value, LENGTHS, SCALE)


def with_gradients(attend, dtype: torch.dtype, *heads: int) -> list[Tensor]:
    *sources, grad = (x.to(dtype) for x in inputs(*heads))
    sources = [x.requires_grad_() for x in sources]
    out = attend(*sources)
    assert out.dtype == dtype
    return [out.detach(), *torch.autograd.grad(out, sources, grad)]


@pytest.mark.parametrize("heads", [(3, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_errs_no_more_than_torch(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    truth = with_gradients(definition, torch.float64, *heads)
    theirs = with_gradients(of_torch, dtype, *heads)
    more = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-3}[dtype]
    for mine, other, exact in zip(with_gradients(ours, dtype, *heads), theirs, truth, strict=True):
        bound = (other.double() - exact).norm() / exact.norm() + more
        assert (mine.double() - exact).norm() / exact.norm() <= bound


def test_keys_may_be_slices_of_one_product() -> None:
    """As the decoder's are where nothing rotates: strided, with a unit last stride."""
    *sources, _ = inputs(4, 2)
    apart = ours(*sources)
    query, key, value = torch.cat(sources, 1).split([4, 2, 2], dim=1)
    assert not key.is_contiguous()
    assert torch.equal(ours(query, key, value), apart)


def test_what_is_kept_is_of_the_inputs_dtype() -> None:
    *sources, _ = (x.bfloat16() for x in inputs(4, 2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ours(*(x.requires_grad_() for x in sources))
    wide = [x for x in kept if x.dtype != torch.bfloat16]
    assert sum(x.numel() for x in wide) == sum(LENGTHS) * 4, "the log-sum-exp of each row"


def test_a_second_derivative_raises() -> None:
    *sources, grad = (x.requires_grad_() for x in inputs(2, 2))
    (first, *_) = torch.autograd.grad(ours(*sources), sources, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("heads", [(3, 3), (6, 2)])
@pytest.mark.parametrize("together", [1, 45, 8192])
def test_a_sequence_does_not_depend_on_those_beside_it(
    heads: tuple[int, int], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_attention_module, "TOKENS_TOGETHER", together)
    *sources, _ = (x.float() for x in inputs(*heads))
    whole = ours(*sources).split(list(LENGTHS))
    parts = zip(*(x.split(list(LENGTHS)) for x in sources), strict=True)
    for found, (q, k, v) in zip(whole, parts, strict=True):
        assert torch.equal(found, cpu_attention(q, k, v, [len(q)], SCALE))

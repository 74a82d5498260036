"""fk.token_logprobs against torch's log_softmax and gather: `python -m pytest benchmarks`.

Each group is one size and dtype; pytest-benchmark prints the ratios within it. The floor is one
read of the logits (forward), and one read and one write more (backward); compare the group's
`read` row, which is torch's sum over the same logits.
"""

from collections.abc import Callable

import pytest
import torch

import fuserl_kernels as fk
from fuserl_kernels.token_logprobs import FORWARD

SIZES = [(512, 32000), (2048, 4096)]
DTYPES = [torch.float32, torch.bfloat16]


def _eager(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, token_ids[:, None]).squeeze(-1)


def _ours(backend: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    def run(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        with fk.use_backend(backend):
            return fk.token_logprobs(logits, token_ids)

    return run


PROVIDERS = {"torch": _eager, **{name: _ours(name) for name in FORWARD}}


def _inputs(size: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(size, generator=generator).to(dtype)
    return logits, torch.randint(size[1], (size[0],), generator=generator)


@pytest.mark.parametrize("provider", ["read", *PROVIDERS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_forward(benchmark, size: tuple[int, int], dtype: torch.dtype, provider: str) -> None:
    logits, token_ids = _inputs(size, dtype)
    benchmark.group = f"forward {size[0]} x {size[1]} {dtype}"
    if provider == "read":
        benchmark(logits.sum)
        return
    out = benchmark(PROVIDERS[provider], logits, token_ids)
    torch.testing.assert_close(out.float(), _eager(logits.float(), token_ids), atol=0.1, rtol=0)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_forward_backward(
    benchmark, size: tuple[int, int], dtype: torch.dtype, provider: str
) -> None:
    logits, token_ids = _inputs(size, dtype)
    logits.requires_grad_()
    benchmark.group = f"forward and backward {size[0]} x {size[1]} {dtype}"

    def step() -> torch.Tensor:
        logits.grad = None
        with fk.use_backend(provider if provider != "torch" else "auto"):
            PROVIDERS[provider](logits, token_ids).sum().backward()
        return logits.grad

    gradient = benchmark(step)
    assert float(gradient.float().sum(-1).abs().max()) < 0.5  # rows of a softmax gradient sum to 0

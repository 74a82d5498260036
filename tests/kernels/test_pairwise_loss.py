"""pairwise_loss: formula, gradients, far-apart scores, ties, no pairs."""

import math

import pytest
import torch
from kernel_testing import assert_near, opcheck, runnable, widest

import fuserl_kernels as fk
from fuserl_kernels.pairwise_loss import FORWARD

BACKENDS = runnable(FORWARD)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("margin", [None, 0.5, torch.linspace(0, 1, 6)])
@pytest.mark.parametrize("center_coef", [0.0, 0.01])
def test_equals_the_plain_formula(backend, margin, center_coef):
    dtype = widest(backend)
    chosen, rejected = (torch.randn(6, dtype=dtype, requires_grad=True) for _ in range(2))
    lead = chosen - rejected - (0 if margin is None else margin)
    expected = -lead.sigmoid().log().mean() + center_coef * ((chosen + rejected) ** 2).mean()
    with fk.use_backend(backend):
        loss, metrics = fk.pairwise_loss(chosen, rejected, margin=margin, center_coef=center_coef)
    assert_near(loss, expected)
    for got, want in zip(
        torch.autograd.grad(loss, (chosen, rejected)),
        torch.autograd.grad(expected, (chosen, rejected)),
        strict=True,
    ):
        assert_near(got, want)
    assert_near(metrics["reward/accuracy"], (chosen > rejected).to(dtype).mean())
    assert_near(metrics["reward/margin"], (chosen - rejected).mean().detach())
    assert_near(metrics["reward/chosen"], chosen.mean().detach())
    assert_near(metrics["reward/rejected"], rejected.mean().detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rejected_ahead_by_120_costs_120(backend, dtype):
    chosen = torch.zeros(1, dtype=dtype, requires_grad=True)
    with fk.use_backend(backend):
        loss, _ = fk.pairwise_loss(chosen, torch.full((1,), 120.0, dtype=dtype))
        loss.backward()
    assert loss.item() == 120
    assert chosen.grad.dtype == dtype
    assert chosen.grad.item() == -1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tie_is_half_right(backend):
    with fk.use_backend(backend):
        loss, metrics = fk.pairwise_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0]))
    assert metrics["reward/accuracy"].item() == 0.75
    assert loss.item() == pytest.approx((math.log(2) + math.log1p(math.exp(-2))) / 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_pairs(backend):
    chosen = torch.zeros(0, requires_grad=True)
    with fk.use_backend(backend):
        loss, metrics = fk.pairwise_loss(chosen, torch.zeros(0), center_coef=0.1)
        loss.backward()
    assert loss.item() == 0
    assert chosen.grad.shape == (0,)
    assert all(value.item() == 0 for value in metrics.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_not_differentiable_twice(backend):
    chosen = torch.ones(3, requires_grad=True)
    with fk.use_backend(backend):
        loss, _ = fk.pairwise_loss(chosen, torch.zeros(3))
    with pytest.raises(RuntimeError, match="cannot be differentiated once more"):
        torch.autograd.grad(loss, chosen, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    chosen, rejected = (torch.randn(4, requires_grad=True) for _ in range(2))
    with fk.use_backend(backend):
        opcheck("pairwise_loss", chosen, rejected, torch.rand(4), 0.01, True)
        opcheck("pairwise_loss", chosen, rejected, None, 0.0, True)


def test_bad_arguments_are_named():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="rejected_scores must have shape"):
        fk.pairwise_loss(x, x[:2])
    with pytest.raises(ValueError, match="margin must have shape"):
        fk.pairwise_loss(x, x, margin=x[:2])
    with pytest.raises(ValueError, match=r"chosen_scores must have shape \[N\]"):
        fk.pairwise_loss(x[None], x[None])

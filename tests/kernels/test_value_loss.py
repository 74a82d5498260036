"""value_loss against autograd of the formula, and its invariants."""

import pytest
import torch
from kernel_testing import assert_near, opcheck, ragged_mask, runnable, widest

import fuserl_kernels as fk
from fuserl_kernels.value_loss import FORWARD

BACKENDS = runnable(FORWARD)


def batch(dtype=torch.float64):
    new, old, returns = torch.randn(3, 5, 6, dtype=dtype)
    return new.requires_grad_(), old, returns, ragged_mask(5, 6, holes=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip_range", [0.2, 1.0, None])
@pytest.mark.parametrize("denominator", [None, 7, torch.tensor(9.0)])
def test_equals_the_plain_formula(backend, clip_range, denominator):
    new, old, returns, mask = batch(widest(backend))
    v, o, r = new[mask], old[mask], returns[mask]
    losses = (v - r) ** 2
    if clip_range is not None:
        clipped = torch.maximum(torch.minimum(v, o + clip_range), o - clip_range)
        losses = torch.max(losses, (clipped - r) ** 2)
    expected = 0.5 * losses.sum() / (mask.sum() if denominator is None else denominator)
    with fk.use_backend(backend):
        loss, metrics = fk.value_loss(
            new, old, returns, mask, clip_range=clip_range, denominator=denominator
        )
    assert_near(loss, expected)
    (got,), (want,) = torch.autograd.grad(loss, new), torch.autograd.grad(expected, new)
    assert_near(got, want)
    explained = 1 - (v - r).var(unbiased=False) / r.var(unbiased=False)
    assert_near(metrics["value/explained_variance"], explained.detach())
    assert_near(metrics["value/loss"], 0.5 * losses.mean().detach())
    assert metrics["num_tokens"].item() == mask.sum().item()
    if clip_range is None:
        assert metrics["value/clipfrac"].item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """Old value 0, new 1, clip .2: towards a return of 2 the clipped error .5 * 1.8^2 is worse."""
    new = torch.tensor([1.0, 1.0], requires_grad=True)
    with fk.use_backend(backend):
        loss, metrics = fk.value_loss(
            new, torch.zeros(2), torch.tensor([2.0, -2.0]), torch.tensor([True, True])
        )
    assert loss.item() == pytest.approx((0.5 * 1.8**2 + 0.5 * 3**2) / 2)
    loss.backward()
    assert new.grad.tolist() == pytest.approx([0.0, 1.5])
    assert metrics["value/clipfrac"].item() == 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(backend):
    new, old, returns, mask = batch(torch.float32)
    with fk.use_backend(backend):
        expected, _ = fk.value_loss(new, old, returns, mask)
        dirty = torch.where(mask, new, torch.nan).detach().requires_grad_()
        loss, metrics = fk.value_loss(
            dirty, *(torch.where(mask, x, torch.nan) for x in (old, returns)), mask
        )
        nothing, zeros = fk.value_loss(dirty, old, returns, torch.zeros_like(mask))
    assert_near(loss, expected)
    assert not any(value.isnan() for value in metrics.values())
    assert_near(torch.autograd.grad(loss, dirty)[0], torch.autograd.grad(expected, new)[0])
    assert nothing.item() == 0
    assert (torch.autograd.grad(nothing, dirty)[0] == 0).all()
    assert all(value.item() == 0 for value in zeros.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [0.1, 0.3, -7.7, 1000.1])
def test_returns_that_do_not_vary_explain_nothing(backend, number):
    """A number that no sum divides exactly: what is left of its variance is rounding."""
    new = torch.randn(7, 333)
    mask = torch.rand(7, 333) > 0.5
    with fk.use_backend(backend):
        _, metrics = fk.value_loss(new, new, torch.full_like(new, number), mask)
    assert metrics["value/explained_variance"].item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    new, old, returns, mask = batch(widest(backend))
    with fk.use_backend(backend):
        opcheck("value_loss", new, old, returns, mask, 0.2, torch.tensor(4.0), True)


def test_gradcheck():
    new, old, returns, mask = batch()
    torch.autograd.gradcheck(lambda new: fk.value_loss(new, old, returns, mask)[0], (new,))


def test_bad_arguments_are_named():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"clip_range must be .*above 0"):
        fk.value_loss(x, x, x, x == 0, clip_range=0.0)
    with pytest.raises(ValueError, match="returns must have shape"):
        fk.value_loss(x, x, x[:1], x == 0)
    with pytest.raises(ValueError, match="loss_mask must be a bool"):
        fk.value_loss(x, x, x, x)

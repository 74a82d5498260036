"""ppo_loss equals policy_loss + vf_coef * value_loss, values, gradients and metrics."""

import pytest
import torch
from kernel_testing import assert_near, opcheck, ragged_mask, runnable, widest

import fuserl_kernels as fk
from fuserl_kernels.ppo_loss import FORWARD

BACKENDS = runnable(FORWARD)


def batch(dtype=torch.float64):
    old, advantages, values, returns, ref = torch.randn(5, 4, 6, dtype=dtype)
    new = (old + 0.3 * torch.randn_like(old)).requires_grad_()
    new_values = (values + 0.3 * torch.randn_like(old)).requires_grad_()
    entropy = torch.rand_like(old).requires_grad_()
    mask = ragged_mask(4, 6)
    value_mask = mask | torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return new, old, advantages, new_values, values, returns, mask, value_mask, ref, entropy


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence_sum", "sequence_mean"])
def test_equals_its_parts(backend, level):
    new, old, advantages, new_values, values, returns, mask, value_mask, ref, entropy = batch(
        widest(backend)
    )
    options = {
        "ratio_level": level,
        "aggregation": "sequence_mean",
        "kl_coef": 0.1,
        "entropy_coef": 0.01,
        "ref_logprobs": ref,
        "entropy": entropy,
        "denominator": 3,
    }
    with fk.use_backend("reference"):
        policy, policy_metrics = fk.policy_loss(new, old, advantages, mask, **options)
        value, value_metrics = fk.value_loss(
            new_values, values, returns, value_mask, clip_range=0.3, denominator=17
        )
    expected = policy + 0.5 * value
    with fk.use_backend(backend):
        loss, metrics = fk.ppo_loss(
            new,
            old,
            advantages,
            new_values,
            values,
            returns,
            mask,
            value_mask=value_mask,
            vf_coef=0.5,
            value_clip_range=0.3,
            value_denominator=17,
            **options,
        )
    assert_near(loss, expected)
    leaves = (new, new_values, entropy)
    for got, want in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert_near(got, want)
    value_metrics["value/num_tokens"] = value_metrics.pop("num_tokens")
    assert_near(metrics, policy_metrics | value_metrics)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_masked_is_zero(backend):
    new, old, advantages, new_values, values, returns, mask, *_ = batch(torch.float32)
    with fk.use_backend(backend):
        loss, metrics = fk.ppo_loss(
            new, old * torch.nan, advantages, new_values, values, returns, torch.zeros_like(mask)
        )
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (new, new_values)):
        assert (gradient == 0).all()
    assert all(value.item() == 0 for value in metrics.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    new, old, advantages, new_values, values, returns, mask, value_mask, ref, entropy = batch(
        widest(backend)
    )
    with fk.use_backend(backend):
        opcheck(
            "ppo_loss",
            new,
            old,
            advantages,
            new_values,
            values,
            returns,
            mask,
            value_mask,
            0.1,
            0.2,
            None,
            torch.tensor(3.0),
            None,
            ref,
            entropy,
            old + 0.1,
            "token",
            "ppo",
            0.2,
            0.2,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            5.0,
            "token_mean",
            0.1,
            "k3",
            4.0,
            0.01,
            "truncate",
            "token",
            0.0,
            1.05,
            True,
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_with_transposed_inputs(backend):
    """The compiled graph counts on the strides that the fake promises for the gradients."""
    *tensors, _, entropy = batch(torch.float32)
    new, new_values = tensors[0], tensors[3]

    def loss(*turned):
        *tensors, mask, value_mask, entropy = (x.t() for x in turned)
        return fk.ppo_loss(
            *tensors, mask, value_mask=value_mask, entropy=entropy, entropy_coef=0.1
        )[0]

    leaves = (new, new_values, entropy)
    with fk.use_backend(backend):
        results = [
            torch.autograd.grad(function(*tensors, entropy), leaves)
            for function in (loss, torch.compile(loss, fullgraph=True))
        ]
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_values_beside_float32_logprobs(backend):
    new, old, advantages, *values, mask, value_mask, _, _ = batch(torch.float32)
    values = [x.detach().double().requires_grad_(x.requires_grad) for x in values]
    arguments = (new, old, advantages, *values, mask)
    with fk.use_backend(backend):
        loss, metrics = fk.ppo_loss(*arguments, value_mask=value_mask)
        compiled = torch.compile(fk.ppo_loss, fullgraph=True, backend="aot_eager")
        again, _ = compiled(*arguments, value_mask=value_mask)
    assert loss.dtype == again.dtype == metrics["value/loss"].dtype == torch.float32
    assert torch.autograd.grad(loss, values[0])[0].dtype == torch.float64


def test_bad_arguments_are_named():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="new_values must have shape"):
        fk.ppo_loss(x, x, x, x[:1], x, x, x == 0)
    with pytest.raises(ValueError, match="value_mask must be a bool"):
        fk.ppo_loss(x, x, x, x, x, x, x == 0, value_mask=x)
    with pytest.raises(ValueError, match="value_clip_range"):
        fk.ppo_loss(x, x, x, x, x, x, x == 0, value_clip_range=-1.0)

"""linear_policy_loss equals linear_token_logprobs followed by policy_loss."""

import itertools

import pytest
import torch
from kernel_testing import opcheck, ragged_mask, runnable

import fuserl_kernels as fk
from fuserl_kernels.linear_policy_loss import FORWARD
from fuserl_kernels.reference import logprobs as reference

BACKENDS = runnable(FORWARD)


def batch(dtype=torch.float32, num_sequences=4, num_slots=5, dim=6, vocab_size=20):
    shape = (num_sequences, num_slots)
    hidden = torch.randn(*shape, dim).to(dtype).requires_grad_()
    weight = (0.7 * torch.randn(vocab_size, dim)).to(dtype).requires_grad_()
    bias = torch.randn(vocab_size).to(dtype).requires_grad_()
    token_ids = torch.randint(0, vocab_size, shape)
    old = fk.linear_token_logprobs(hidden, weight, token_ids, bias=bias).detach()
    old = old + 0.3 * torch.randn_like(old)
    ref = old + 0.3 * torch.randn_like(old)
    return (hidden, weight, bias), token_ids, old, torch.randn_like(old), ref


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows_per_chunk", [3, 1000])
@pytest.mark.parametrize(
    ("level", "clip", "aggregation"),
    [
        *itertools.product(["token"], ["ppo", "cispo"], ["token_mean", "sequence_mean"]),
        ("sequence_sum", "none", "sequence_sum"),
        ("sequence_mean", "ppo", "sequence_mean"),
    ],
)
def test_equals_its_parts(backend, rows_per_chunk, level, clip, aggregation, monkeypatch):
    leaves, token_ids, old, advantages, ref = batch()
    monkeypatch.setattr(reference, "CHUNK_BYTES", rows_per_chunk * 4 * 20)
    mask = ragged_mask(4, 5, holes=True)
    token_ids = torch.where(mask, token_ids, -1)
    options = {
        "ratio_level": level,
        "clip": clip,
        "aggregation": aggregation,
        "kl_coef": 0.1,
        "entropy_coef": 0.05,
        "ref_logprobs": ref,
        "denominator": 3.5,
    }
    projection = {"bias": leaves[2], "softcap": 6.0, "temperature": torch.rand(4, 5) + 0.5}
    logprobs, entropy = fk.linear_token_logprobs(
        *leaves[:2], token_ids, loss_mask=mask, return_entropy=True, **projection
    )
    expected, expected_metrics = fk.policy_loss(
        logprobs, old, advantages, mask, entropy=entropy, **options
    )
    with fk.use_backend(backend):
        loss, metrics = fk.linear_policy_loss(
            *leaves[:2], token_ids, old, advantages, mask, **projection, **options
        )
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(metrics, expected_metrics, atol=1e-5, rtol=1e-5)
    for got, want in zip(
        torch.autograd.grad(3 * loss, leaves),
        torch.autograd.grad(3 * expected, leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_rows(backend):
    (hidden, weight, _), token_ids, old, advantages, _ = batch()
    mask = torch.ones(4, 5, dtype=torch.bool)
    options = {"ratio_level": "sequence_mean", "aggregation": "sequence_mean"}
    with fk.use_backend(backend):
        expected, _ = fk.linear_policy_loss(
            hidden, weight, token_ids, old, advantages, mask, **options
        )
        loss, _ = fk.linear_policy_loss(
            hidden.flatten(0, 1),
            weight,
            token_ids.flatten(),
            old.flatten(),
            advantages.flatten(),
            mask.flatten(),
            cu_seqlens=torch.arange(0, 21, 5),
            **options,
        )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_keeps_float32_statistics(backend):
    leaves, token_ids, old, advantages, _ = batch(torch.bfloat16, dim=32, vocab_size=500)
    mask = torch.ones_like(old, dtype=torch.bool)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    truth, _ = fk.linear_policy_loss(
        *wide[:2], token_ids, old.double(), advantages.double(), mask, bias=wide[2]
    )
    with fk.use_backend(backend):
        loss, _ = fk.linear_policy_loss(
            *leaves[:2], token_ids, old, advantages, mask, bias=leaves[2]
        )
    assert loss.item() == pytest.approx(truth.item(), abs=1e-5)
    for got, want in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, wide), strict=True
    ):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(
            got.double(), want, atol=4e-3 * float(want.abs().max()), rtol=0.01
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence_mean"])
def test_all_masked_and_partial_gradients(backend, level):
    (hidden, weight, _), token_ids, old, advantages, _ = batch()
    nothing = torch.zeros_like(old, dtype=torch.bool)
    with fk.use_backend(backend):
        loss, _ = fk.linear_policy_loss(
            hidden * torch.nan, weight, token_ids, old, advantages, nothing, ratio_level=level
        )
        loss.backward()
        assert loss.item() == 0
        assert (hidden.grad == 0).sum() + hidden.grad.isnan().sum() == hidden.numel()
        assert (weight.grad == 0).all()
        frozen, _ = fk.linear_policy_loss(
            hidden, weight.detach(), token_ids, old, advantages, ~nothing, ratio_level=level
        )
        frozen.backward()
        with torch.no_grad():
            plain, _ = fk.linear_policy_loss(
                hidden, weight, token_ids, old, advantages, ~nothing, ratio_level=level
            )
    assert not plain.requires_grad
    torch.testing.assert_close(plain, frozen.detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", ["token", "sequence_sum"])
def test_opcheck(backend, level):
    leaves, token_ids, old, advantages, ref = batch(num_sequences=2, num_slots=2)
    mask = torch.ones_like(old, dtype=torch.bool)
    hidden = leaves[0].detach().flatten(0, 1).requires_grad_()
    with fk.use_backend(backend):
        opcheck(
            "linear_policy_loss",
            hidden,
            *leaves[1:],
            token_ids.flatten(),
            old,
            advantages,
            mask,
            None,
            0.8,
            0.0,
            None,
            None,
            ref,
            level,
            "ppo",
            0.2,
            0.2,
            0.0,
            "token_mean",
            0.1,
            "k3",
            0.01,
            True,
            True,
            True,
        )


def test_bad_arguments_are_named():
    x, hidden, weight = torch.zeros(2, 3), torch.zeros(2, 3, 4), torch.zeros(5, 4)
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="logprobs must have shape"):
        fk.linear_policy_loss(hidden, weight, ids, x[:1], x, x == 0)
    with pytest.raises(ValueError, match=r"token_ids must be in \[0, 5\)"):
        fk.linear_policy_loss(hidden, weight, ids + 5, x, x, x == 0)
    with pytest.raises(ValueError, match="ref_logprobs is needed"):
        fk.linear_policy_loss(hidden, weight, ids, x, x, x == 0, kl_coef=0.1)

"""The RL ops as one: whatever the masks and sizes, every implementation equals the definition in
float64, and nothing depends on padding, packing, the split into microbatches or the order of rows.
"""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import runnable

import fuserl_kernels as fk
from fuserl_kernels.registration import tables

BACKENDS = runnable(tables()["rewards_to_advantages"])
LOSS_BACKENDS = runnable(tables()["ppo_loss"])
SIZES = list(itertools.product((1, 7, 512), (1, 2, 1023, 4096)))
# The interpreter takes seconds over a million tokens.
MOST_TOKENS = {"triton": 4_200, "reference": 600_000}


def fits(backend, num_sequences, num_slots):
    return num_sequences * num_slots <= MOST_TOKENS.get(backend, 10**9)


@functools.cache
def batch(num_sequences, num_slots, seed=0):
    """Masks with holes, whole rows masked, rows without padding; NaN wherever nothing is read."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, num_slots + 1, (num_sequences, 1), generator=generator)
    lengths[0] = num_slots
    mask = torch.arange(num_slots) < lengths
    mask &= torch.rand(num_sequences, num_slots, generator=generator) > 0.2
    tensors = torch.randn(7, num_sequences, num_slots, generator=generator)
    tensors[0] = -tensors[0].abs()  # log-probabilities
    tensors[1:3] = tensors[0] + 0.2 * tensors[1:3]
    scores = torch.randn(num_sequences, generator=generator)
    return scores, mask, tensors


def near(got, truth, tolerance):
    """Within `tolerance` of the size of the largest entry."""
    assert not got.isnan().any()
    size = truth.abs().max().clamp(min=1.0) if truth.numel() else 1.0
    difference = (got.double() - truth.double()).abs()
    assert (difference <= tolerance * size).all(), (difference.max(), size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("gamma", "gae_lambda"), [(1.0, 1.0), (0.0, 0.5), (0.99, 0.0), (1.0, 0.95)]
)
@pytest.mark.parametrize("masked", ["identity", "carry"])
def test_gae_and_returns_at_every_size(backend, gamma, gae_lambda, masked):
    sizes = [size for size in SIZES if fits(backend, *size)]
    assert (1, 4096) in sizes
    for num_sequences, num_slots in sizes:
        _, mask, (*_, rewards, values) = batch(num_sequences, num_slots)
        value_mask = mask | torch.nn.functional.pad(mask, (1, 0))[:, :-1]
        dirty = [torch.where(value_mask, x, torch.nan) for x in (rewards, values)]
        options = {"gamma": gamma, "gae_lambda": gae_lambda, "masked": masked}
        truth = _gae_truth(rewards, values, mask, value_mask, **options)
        with fk.use_backend(backend):
            got = fk.gae(*dirty, mask, value_mask=value_mask, **options)
            returns = fk.discounted_returns(dirty[0], mask, gamma=gamma, reward_mask=value_mask)
        for a, b in zip(got, truth, strict=True):
            near(a, b, 2e-6)
        summed = _gae_truth(rewards, 0 * values, mask, value_mask, gamma, 1.0, "identity")[1]
        near(returns, torch.where(mask, summed, 0), 2e-6)


def _gae_truth(rewards, values, loss_mask, value_mask, gamma, gae_lambda, masked):
    """The recursion of the paper, slot by slot, in float64."""
    num_sequences, num_slots = rewards.shape
    r = torch.where(value_mask, rewards.double(), 0).t().contiguous()
    v = torch.where(value_mask, values.double(), 0).t().contiguous()
    slots = value_mask.t().contiguous()
    advantage = torch.zeros(num_sequences, dtype=torch.float64)
    following, states = torch.zeros_like(advantage), []
    for t in reversed(range(num_slots)):
        state = r[t] + gamma * following - v[t] + gamma * gae_lambda * advantage
        if masked == "carry":
            advantage, following = state, v[t]
        else:
            advantage = torch.where(slots[t], state, advantage)
            following = torch.where(slots[t], v[t], following)
        states.append(advantage)
    states = torch.stack(states[::-1], 1)
    returns = torch.where(value_mask, states + v.t(), 0)
    return torch.where(loss_mask, states, 0), returns


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("whiten", "whiten_rewards"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("score_slot", ["last", "after"])
def test_rewards_to_advantages_at_every_size(backend, whiten, whiten_rewards, score_slot):
    for num_sequences, num_slots in SIZES:
        if not fits(backend, num_sequences, num_slots) or num_sequences * num_slots < 4:
            continue  # with fewer the spread may be nothing, and whitening divides by it
        scores, mask, (logprobs, ref_logprobs, _, _, values, *_) = batch(num_sequences, num_slots)
        options = {
            "kl_coef": 0.05,
            "gamma": 1.0,
            "gae_lambda": 0.95,
            "whiten": whiten,
            "whiten_rewards": whiten_rewards,
            "score_slot": score_slot,
            "has_eos": scores > 0,
            "missing_eos": "replace",
            "estimator": "k3",
        }
        tensors = (scores, logprobs, ref_logprobs, values)
        with fk.use_backend("reference"):
            truth = fk.rewards_to_advantages(*(x.double() for x in tensors), mask, **options)
        dirty = [torch.where(mask, x, torch.nan) for x in (logprobs, ref_logprobs)]
        with fk.use_backend(backend):
            got = fk.rewards_to_advantages(scores, *dirty, values, mask, **options)
            again = fk.rewards_to_advantages(scores, *dirty, values, mask, **options)
        for a, b, c in zip(got, truth, again, strict=True):
            near(a, b, 1e-5)
            assert torch.equal(a, c)


LOSSES = {
    "ppo": {"dual_clip": 3.0},
    "gspo": {"ratio_level": "sequence_mean", "aggregation": "sequence_mean"},
    "cispo": {"clip": "cispo", "aggregation": "sequence_sum"},
    "sapo": {"clip": "sapo", "aggregation": "sequence_mean"},
    "vespo": {"clip": "vespo", "ratio_level": "sequence_sum"},
    "rejected": {"correction": "reject", "correction_level": "sequence_mean"},
}


def losses(backend, name, tensors, mask, rollout, **more):
    """Loss and gradients of a policy and value loss."""
    options = LOSSES[name]
    if "correction" in options:
        options = {**options, "rollout_logprobs": rollout, "correction_range": (0.9, 1.1)}
    leaves = [tensors[0].detach().requires_grad_(), tensors[5].detach().requires_grad_()]
    with fk.use_backend(backend):
        loss, _ = fk.ppo_loss(
            leaves[0], tensors[1], tensors[3], leaves[1], tensors[4], tensors[6], mask,
            **options, **more,
        )  # fmt: skip
        return loss, *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("backend", LOSS_BACKENDS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_at_every_size(backend, name):
    for num_sequences, num_slots in SIZES:
        if not fits(backend, num_sequences, num_slots):
            continue
        _, mask, tensors = batch(num_sequences, num_slots)
        truth = losses("reference", name, tensors.double(), mask, tensors[2].double())
        dirty = torch.where(mask, tensors, torch.nan)
        got = losses(backend, name, dirty, mask, dirty[2])
        again = losses(backend, name, dirty, mask, dirty[2])
        for a, b, c in zip(got, truth, again, strict=True):
            near(a / truth[0].abs().clamp(min=1.0), b / truth[0].abs().clamp(min=1.0), 1e-5)
            assert torch.equal(a, c)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(sorted(LOSSES)), data=st.data())
@pytest.mark.parametrize("backend", LOSS_BACKENDS)
def test_layout_changes_no_loss(backend, seed, name, data):
    """Padding, packing, row order and the split into microbatches, of loss and gradients."""
    num_sequences, num_slots = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 6))
    _, mask, tensors = batch(num_sequences, num_slots, seed)
    rollout = tensors[2]
    expected = losses(backend, name, tensors, mask, rollout)

    extra = data.draw(st.integers(1, 4))
    wide, wide_mask = (torch.nn.functional.pad(x, (0, extra)) for x in (tensors, mask))
    loss, *gradients = losses(backend, name, wide, wide_mask, wide[2])
    near(loss, expected[0], 1e-5)
    for got, want in zip(gradients, expected[1:], strict=True):
        near(got[:, :num_slots], want, 1e-5)
        assert (got[:, num_slots:] == 0).all()

    order = torch.randperm(num_sequences, generator=torch.Generator().manual_seed(seed))
    loss, *gradients = losses(backend, name, tensors[:, order], mask[order], rollout[order])
    near(loss, expected[0], 1e-5)
    for got, want in zip(gradients, expected[1:], strict=True):
        near(got, want[order], 1e-5)

    cu_seqlens = torch.arange(0, num_sequences * num_slots + 1, num_slots)
    loss, *gradients = losses(
        backend, name, tensors.flatten(1), mask.flatten(), rollout.flatten(), cu_seqlens=cu_seqlens
    )
    near(loss, expected[0], 1e-5)
    for got, want in zip(gradients, expected[1:], strict=True):
        near(got, want.flatten(), 1e-5)

    by_token = LOSSES[name].get("aggregation", "token_mean") == "token_mean"
    counts = {
        "denominator": mask.sum() if by_token else mask.any(1).sum(),
        "value_denominator": mask.sum(),
    }
    cut = data.draw(st.integers(1, num_sequences - 1))
    parts = [
        losses(backend, name, tensors[:, rows], mask[rows], rollout[rows], **counts)
        for rows in (slice(0, cut), slice(cut, None))
    ]
    near(parts[0][0] + parts[1][0], expected[0], 1e-5)
    for i in (1, 2):
        near(torch.cat([part[i] for part in parts]), expected[i], 1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", ["identity", "carry"])
def test_layout_changes_no_advantage(backend, masked, seed, data):
    """Padding, packing and row order; one row alone has the bits it has in the batch."""
    num_sequences, num_slots = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 6))
    _, mask, (*_, rewards, values) = batch(num_sequences, num_slots, seed)
    options = {"gamma": 0.97, "gae_lambda": 0.9, "masked": masked}
    with fk.use_backend(backend):
        expected = fk.gae(rewards, values, mask, **options)
        extra = data.draw(st.integers(1, 4))
        wide = [torch.nn.functional.pad(x, (0, extra)) for x in (rewards, values, mask)]
        padded = fk.gae(*wide, **options)
        cu_seqlens = torch.arange(0, num_sequences * num_slots + 1, num_slots)
        packed = fk.gae(
            rewards.flatten(), values.flatten(), mask.flatten(), cu_seqlens=cu_seqlens, **options
        )
        row = data.draw(st.integers(0, num_sequences - 1))
        alone = fk.gae(rewards[row:][:1], values[row:][:1], mask[row:][:1], **options)
    for want, *others in zip(expected, padded, packed, alone, strict=True):
        near(others[0][:, :num_slots], want, 2e-6)
        assert (others[0][:, num_slots:] == 0).all()
        near(others[1], want.flatten(), 2e-6)
        assert torch.equal(others[2][0], want[row])

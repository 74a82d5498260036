"""gae, discounted_returns, rewards_to_advantages against literal loops; holes, packing, padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import opcheck, ragged_mask, runnable, widest

import fuserl_kernels as fk
from fuserl_kernels.advantages import FORWARD, GAE_FORWARD, RETURNS_FORWARD

BACKENDS = runnable(GAE_FORWARD)


def loop(rewards, values, loss_mask, value_mask, gamma, gae_lambda, masked="identity"):
    """One row at a time over Python floats."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for row in range(rewards.shape[0]):
        following, state = 0.0, 0.0
        for t in reversed(range(rewards.shape[1])):
            if value_mask[row, t]:
                reward, value = rewards[row, t].item(), values[row, t].item()
            elif masked == "carry":
                reward, value = 0.0, 0.0
            else:
                continue
            state = reward + gamma * following - value + gamma * gae_lambda * state
            following = value
            if loss_mask[row, t]:
                advantages[row, t] = state
            if value_mask[row, t]:
                returns[row, t] = state + value
    return advantages, returns


def after(mask):
    return mask | torch.nn.functional.pad(mask, (1, 0))[:, :-1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gae_by_hand(backend):
    """gamma .5, lambda .5: A_2 = 1 - 3, A_1 = .5*3 - 2 + .25*A_2, A_0 = .5*2 - 1 + .25*A_1."""
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    with fk.use_backend(backend):
        advantages, returns = fk.gae(
            rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=0.5, gae_lambda=0.5
        )
    assert advantages.tolist() == [[-0.25, -1.0, -2.0]]
    assert returns.tolist() == [[0.75, 1.0, 1.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", ["identity", "carry"])
def test_gae_by_hand_through_a_hole(backend, masked):
    """A hole at slot 1, gamma = 1, lambda = .5, values 2 and 1, reward 4 at the end: A_2 = 3.
    identity: A_0 = 1 - 2 + .5*3.  carry: the hole has delta 1 - 0 and state 1 + .5*3, then
    A_0 = 0 - 2 + .5*2.5."""
    rewards, values = torch.tensor([[0.0, torch.nan, 4.0]]), torch.tensor([[2.0, torch.nan, 1.0]])
    with fk.use_backend(backend):
        advantages, _ = fk.gae(
            rewards, values, torch.tensor([[True, False, True]]), gae_lambda=0.5, masked=masked
        )
    assert advantages.tolist() == [[0.5 if masked == "identity" else -0.75, 0.0, 3.0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", ["identity", "carry"])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("extra_slot", [False, True])
def test_gae_against_the_loop(backend, masked, holes, extra_slot):
    loss_mask = ragged_mask(6, 9, holes)
    value_mask = after(loss_mask) if extra_slot else loss_mask
    rewards, values = torch.randn(2, 6, 9, dtype=widest(backend))
    dirty = [torch.where(value_mask, x, torch.nan) for x in (rewards, values)]
    expected = loop(rewards, values, loss_mask, value_mask, 0.97, 0.9, masked)
    with fk.use_backend(backend):
        got = fk.gae(
            *dirty, loss_mask, value_mask=value_mask, gamma=0.97, gae_lambda=0.9, masked=masked
        )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gae_as_summarize_from_feedback_details_has_it(backend):
    """Its loop runs over every slot with masked values and rewards zero, whatever the length."""
    loss_mask = ragged_mask(6, 9)
    value_mask = after(loss_mask)
    rewards, values = (torch.where(value_mask, x, 0) for x in torch.randn(2, 6, 9))
    state, states = torch.zeros(6), []
    for t in reversed(range(9)):
        following = values[:, t + 1] if t < 8 else torch.zeros(6)
        state = rewards[:, t] + 1.0 * following - values[:, t] + 1.0 * 0.95 * state
        states.append(state)
    expected = torch.stack(states[::-1], 1)
    for masked in ("identity", "carry"):
        with fk.use_backend(backend):
            advantages, returns = fk.gae(
                rewards, values, loss_mask, value_mask=value_mask, masked=masked
            )
        torch.testing.assert_close(advantages, torch.where(loss_mask, expected, 0))
        torch.testing.assert_close(returns, torch.where(value_mask, expected + values, 0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gae_packed(backend):
    lengths = [3, 0, 1, 6]
    cu_seqlens = torch.tensor([0, 3, 3, 4, 10])
    rewards, values = torch.randn(2, 10)
    mask = torch.rand(10) > 0.3
    with fk.use_backend(backend):
        for dtype in (torch.int32, torch.int64):
            got = fk.gae(rewards, values, mask, gamma=0.9, cu_seqlens=cu_seqlens.to(dtype))
            start = 0
            for length in lengths:
                part = slice(start, start + length)
                expected = fk.gae(
                    rewards[None, part], values[None, part], mask[None, part], gamma=0.9
                )
                for a, b in zip(got, expected, strict=True):
                    torch.testing.assert_close(a[part], b[0])
                start += length
        returns = fk.discounted_returns(rewards, mask, gamma=0.9, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(
            returns[4:], fk.discounted_returns(rewards[None, 4:], mask[None, 4:], gamma=0.9)[0]
        )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 8)),
    extra=st.integers(0, 4),
    masked=st.sampled_from(["identity", "carry"]),
)
def test_padding_and_order_change_nothing(seed, shape, extra, masked):
    torch.manual_seed(seed)
    rewards, values = torch.randn(2, *shape)
    mask = torch.rand(shape) > 0.4
    advantages, returns = fk.gae(rewards, values, mask, gamma=0.9, masked=masked)
    order = torch.randperm(shape[0])
    wide = [
        torch.nn.functional.pad(x[order], (0, extra), value=value)
        for x, value in ((rewards, torch.nan), (values, torch.nan), (mask, False))
    ]
    wide_advantages, wide_returns = fk.gae(*wide, gamma=0.9, masked=masked)
    assert torch.equal(wide_advantages[:, : shape[1]], advantages[order])
    assert torch.equal(wide_returns[:, : shape[1]], returns[order])
    assert (wide_advantages[:, shape[1] :] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 5)])
def test_nothing_to_do(backend, shape):
    x, mask = torch.full(shape, torch.nan), torch.zeros(shape, dtype=torch.bool)
    with fk.use_backend(backend):
        results = [*fk.gae(x, x, mask), fk.discounted_returns(x, mask)]
    for result in results:
        assert result.shape == shape
        assert (result == 0).all()


@pytest.mark.parametrize("backend", runnable(RETURNS_FORWARD))
def test_discounted_returns_by_hand(backend):
    rewards = torch.tensor([[1.0, 2.0, torch.nan, 4.0, 8.0]])
    mask = torch.tensor([[True, True, False, True, False]])
    with fk.use_backend(backend):
        assert fk.discounted_returns(rewards, mask, gamma=0.5).tolist() == [[3, 4, 0, 4, 0]]
        later = fk.discounted_returns(
            rewards, mask, gamma=0.5, reward_mask=torch.tensor([[True, True, False, True, True]])
        )
    assert later.tolist() == [[4, 6, 0, 8, 0]]


@pytest.mark.parametrize("backend", runnable(FORWARD))
@pytest.mark.parametrize("score_slot", ["last", "after"])
@pytest.mark.parametrize("whiten_rewards", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
def test_rewards_to_advantages_is_the_composition(backend, score_slot, whiten_rewards, unbiased):
    loss_mask = ragged_mask(5, 8)
    scores = torch.randn(5)
    logprobs, ref_logprobs, values = torch.randn(3, 5, 8)
    shaping = {
        "kl_coef": 0.1,
        "estimator": "k3",
        "score_slot": score_slot,
        "score_clip": 1.0,
        "score_scale": 0.5,
        "missing_eos": "subtract",
        "has_eos": torch.rand(5) > 0.5,
    }
    rewards, kl = fk.shape_rewards(scores, logprobs, ref_logprobs, loss_mask, **shaping)
    value_mask = after(loss_mask) if score_slot == "after" else loss_mask
    if whiten_rewards:
        rewards = fk.masked_whiten(rewards, value_mask, shift_mean=False, unbiased=unbiased)
    advantages, returns = fk.gae(
        rewards, values, loss_mask, value_mask=value_mask, gamma=0.9, gae_lambda=0.8
    )
    whitened = fk.masked_whiten(advantages, loss_mask, unbiased=unbiased)
    with fk.use_backend(backend):
        for whiten, expected in [(True, whitened), (False, advantages)]:
            got = fk.rewards_to_advantages(
                scores,
                logprobs,
                ref_logprobs,
                values,
                loss_mask,
                gamma=0.9,
                gae_lambda=0.8,
                whiten=whiten,
                whiten_rewards=whiten_rewards,
                unbiased=unbiased,
                **shaping,
            )
            for a, b in zip(got, (expected, returns, rewards, kl), strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, mask = torch.randn(3, 4), torch.rand(3, 4) > 0.4
    with fk.use_backend(backend):
        opcheck("gae", x, x, mask, mask, None, 0.9, 0.9, "identity")
        opcheck("gae", x[0], x[0], mask[0], mask[0], torch.tensor([0, 1, 4]), 0.9, 0.9, "carry")
        opcheck("discounted_returns", x, mask, mask, None, 0.9)
        opcheck(
            "rewards_to_advantages",
            torch.randn(3),
            x,
            x + 1,
            x,
            mask,
            None,
            torch.tensor(0.1),
            0.0,
            "k1",
            0.0,
            "last",
            torch.inf,
            1.0,
            "",
            1.0,
            0,
            1.0,
            0.95,
            "identity",
            True,
            False,
            False,
        )


def test_bad_arguments_are_named():
    x = torch.zeros(2, 3)
    for message, options in {
        r"gamma must be in \[0.0, 1.0\], not 1.5": {"gamma": 1.5},
        "gae_lambda must be in": {"gae_lambda": -0.1},
        "masked must be one of identity, carry": {"masked": "skip"},
        "value_mask must have shape": {"value_mask": torch.ones(2, 4, dtype=torch.bool)},
        "cu_seqlens goes with packed": {"cu_seqlens": torch.tensor([0, 6])},
    }.items():
        with pytest.raises(ValueError, match=message):
            fk.gae(x, x, x == 0, **options)
    with pytest.raises(ValueError, match=r"rewards must be \[B, T\], or packed"):
        fk.gae(x[0], x[0], x[0] == 0)
    with pytest.raises(ValueError, match="cu_seqlens must not decrease"):
        fk.gae(x[0], x[0], x[0] == 0, cu_seqlens=torch.tensor([0, 2, 1, 3]))
    with pytest.raises(ValueError, match="values must have shape"):
        fk.gae(x, x[:1], x == 0)

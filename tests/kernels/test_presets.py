"""Each preset against numbers worked out by hand and against its project's own way through the
arrays, written here as loops; and every point on which two projects differ."""

import dataclasses
import math
import statistics

import pytest
import torch

import fuserl_kernels as fk

NAMES = list(fk.PRESETS)
NAN = math.nan

# Two rows of four slots, gamma 1, lambda 1/2, kl_coef 1/2. Row 0 ends with EOS at slot 1 and scores
# 12; row 1 fills the slots without EOS and scores -4.
LOSS_MASK = torch.tensor([[True, True, False, False], [True] * 4])
SCORES, HAS_EOS = torch.tensor([12.0, -4.0]), torch.tensor([True, False])
LOGPROBS = torch.tensor([[-1.0, -2.0, NAN, NAN], [-1.0, -2.0, -3.0, -1.0]])
REF_LOGPROBS = torch.tensor([[-1.5, -1.5, NAN, NAN], [-2.0, -2.0, -3.0, -1.0]])
VALUES = torch.tensor([[1.0, 2.0, 3.0, NAN], [0.0, 1.0, 0.0, 1.0]])

# The penalty -kl/2 is -1/4, 1/4 in row 0 and -1/2, 0, 0, 0 in row 1. A state is
# reward + (next value - value) + next state / 2:
#   row 0, score s behind: s - 3, then 1.25 + half, then .75 + half
#   row 0, score s at the end: s - 1.75, then .75 + half
#   row 1, score s: s - 1, then 1 + half, -1 + half, .5 + half
ROW_1 = [-0.375, -1.75, -1.5, -5.0]  # for the score -4
REWARDS = {
    "n+": [[-0.25, 0.25, 12.0, 0.0], [-0.5, 0.0, 0.0, -1.0]],
    "trl": [[-0.25, 0.25, 12.0, 0.0], [-0.5, 0.0, 0.0, -4.0]],
    "trlx": [[-0.25, 0.25, 10.0, 0.0], [-0.5, 0.0, 0.0, -4.0]],
    "openrlhf": [[-0.25, 10.25, 0.0, 0.0], [-0.5, 0.0, 0.0, -4.0]],
    "verl": [[-0.25, 12.25, 0.0, 0.0], [-0.5, 0.0, 0.0, -4.0]],
}
STATES = {  # at slots with a value
    "n+": [[3.625, 5.75, 9.0], [0.0, -1.0, 0.0, -2.0]],
    "trl": [[3.625, 5.75, 9.0], ROW_1],
    "trlx": [[3.125, 4.75, 7.0], ROW_1],
    "openrlhf": [[4.875, 8.25], ROW_1],
    "verl": [[5.875, 10.25], ROW_1],
}
RETURNS = {
    name: [
        [a + v for a, v in zip(states, values, strict=False)] + [0.0] * (4 - len(states))
        for states, values in zip(rows, VALUES.tolist(), strict=True)
    ]
    for name, rows in STATES.items()
}
WHITENED = {  # what goes into mean and variance, and their bias
    "n+": (STATES["n+"][0][:2] + STATES["n+"][1], statistics.pvariance),
    "trl": (STATES["trl"][0][:2] + ROW_1, statistics.variance),
    "trlx": ([*STATES["trlx"][0], 0.0, *ROW_1], statistics.variance),
    "openrlhf": (STATES["openrlhf"][0] + ROW_1, statistics.pvariance),
    "verl": (STATES["verl"][0] + ROW_1, statistics.variance),
}


def advantages_of(
    name, scores, logprobs, ref_logprobs, values, loss_mask, *, has_eos=None, **options
):
    """Advantages as the preset's project whitens them (the batch is one minibatch), returns,
    rewards."""
    preset = fk.PRESETS[name]
    missing = {} if has_eos is not None else {"missing_eos": None}
    advantages, returns, rewards, _ = fk.rewards_to_advantages(
        scores,
        logprobs,
        ref_logprobs,
        values,
        loss_mask,
        **{**preset.advantages(), "has_eos": has_eos, **missing, **options},
    )
    if preset.whitening_scope == "minibatch":
        assert preset.whitening_mask == "all"
        value_mask = behind(loss_mask) if preset.score_slot == "after" else loss_mask
        states = torch.where(value_mask, returns - values, 0)
        white = fk.masked_whiten(states, torch.ones_like(loss_mask), unbiased=preset.unbiased)
        advantages = torch.where(loss_mask, white, 0)
    return advantages, returns, rewards


def behind(mask):
    return mask | torch.nn.functional.pad(mask, (1, 0))[:, :-1]


@pytest.mark.parametrize("name", NAMES)
def test_by_hand(name):
    advantages, returns, rewards = advantages_of(
        name,
        SCORES,
        LOGPROBS,
        REF_LOGPROBS,
        VALUES,
        LOSS_MASK,
        has_eos=HAS_EOS,
        kl_coef=0.5,
        gamma=1.0,
        gae_lambda=0.5,
    )
    assert rewards.tolist() == REWARDS[name]
    assert returns.tolist() == RETURNS[name]
    together, variance = WHITENED[name]
    mean, scale = statistics.mean(together), variance(together) ** -0.5
    want = [(a - mean) * scale for a in STATES[name][0][:2] + STATES[name][1]]
    torch.testing.assert_close(advantages[LOSS_MASK], torch.tensor(want), rtol=2e-6, atol=2e-6)
    assert (advantages[~LOSS_MASK] == 0).all()


# --- each project's own pass over dense arrays, padding included


def n_plus_loop(rewards, values, last, gamma, lam):
    """n+, trl, trlx: values past the slot behind the last token are 0, every slot is walked."""
    num_slots = len(rewards)
    values = [v if t <= last + 1 else 0.0 for t, v in enumerate(values)]
    return plain_loop(rewards, values, num_slots, gamma, lam)


def plain_loop(rewards, values, num_slots, gamma, lam):
    states, state = [0.0] * num_slots, 0.0
    for t in reversed(range(num_slots)):
        following = values[t + 1] if t + 1 < num_slots else 0.0
        state = rewards[t] + gamma * following - values[t] + gamma * lam * state
        states[t] = state
    return states


def openrlhf_loop(rewards, values, mask, gamma, lam):
    """Values and rewards are zeroed at masked slots, which are walked all the same."""
    rewards = [r if m else 0.0 for r, m in zip(rewards, mask, strict=True)]
    values = [v if m else 0.0 for v, m in zip(values, mask, strict=True)]
    return plain_loop(rewards, values, len(mask), gamma, lam)


def verl_loop(rewards, values, mask, gamma, lam):
    """At a masked slot the next value and the state stay what they were."""
    states, state, following = [0.0] * len(mask), 0.0, 0.0
    for t in reversed(range(len(mask))):
        if mask[t]:
            state = rewards[t] + gamma * following - values[t] + gamma * lam * state
            following = values[t]
        states[t] = state
    return states


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7)])
def test_against_the_projects_pass(name, gamma, lam):
    """Seven ragged rows; with holes where the project knows holes."""
    num_rows, num_slots = 7, 9
    lengths = torch.tensor([9, 1, 8, 4, 2, 7, 5])
    mask = torch.arange(num_slots) < lengths[:, None]
    if name in ("openrlhf", "verl"):
        mask &= torch.rand(num_rows, num_slots) > 0.3
        mask[:, 0] = True
    scores = 8 * torch.randn(num_rows, dtype=torch.float64)
    logprobs, ref_logprobs, values = torch.randn(3, num_rows, num_slots, dtype=torch.float64)
    has_eos = lengths != 9
    advantages, returns, rewards = advantages_of(
        name,
        scores,
        logprobs,
        ref_logprobs,
        values,
        mask,
        has_eos=has_eos,
        kl_coef=0.1,
        gamma=gamma,
        gae_lambda=lam,
    )
    states = torch.zeros_like(values)
    for i in range(num_rows):
        last = int(mask[i].nonzero().max())
        score, slot = scores[i].item(), last
        if name in ("trlx", "openrlhf"):
            score = min(max(score, -10.0), 10.0)
        if name == "n+" and not has_eos[i]:
            score = -1.0
        if name in ("n+", "trl", "trlx") and last + 1 < num_slots:
            slot = last + 1
        kl = (logprobs[i] - ref_logprobs[i]).tolist()
        row = [-0.1 * k if m else 0.0 for k, m in zip(kl, mask[i].tolist(), strict=True)]
        row[slot] += score
        torch.testing.assert_close(rewards[i], torch.tensor(row, dtype=torch.float64))
        if name in ("openrlhf", "verl"):
            walk = openrlhf_loop if name == "openrlhf" else verl_loop
            states[i] = torch.tensor(walk(row, values[i].tolist(), mask[i].tolist(), gamma, lam))
        else:
            states[i] = torch.tensor(n_plus_loop(row, values[i].tolist(), last, gamma, lam))
    learned = behind(mask) if name in ("n+", "trl", "trlx") else mask
    torch.testing.assert_close(returns, torch.where(learned, states + values, 0))
    together = states if name == "trlx" else states[mask]
    spread = together.std(correction=0 if name in ("n+", "openrlhf") else 1)
    white = (states - together.mean()) / spread
    torch.testing.assert_close(advantages, torch.where(mask, white, 0), rtol=1e-6, atol=1e-6)


# --- where two projects differ


def simple(name, **changes):
    """Advantages, returns and rewards of the two rows above, all with EOS."""
    given = {"scores": torch.tensor([3.0, -4.0]), "has_eos": torch.tensor([True, True])}
    given = {**given, **changes}
    return advantages_of(
        name,
        given["scores"],
        LOGPROBS,
        REF_LOGPROBS,
        VALUES,
        LOSS_MASK,
        has_eos=given["has_eos"],
        kl_coef=0.5,
        gamma=1.0,
        gae_lambda=0.5,
    )


def test_variance_bias():
    """Six trained tokens: unbiased variance is 6/5 of the biased."""
    for biased, unbiased in (("n+", "trl"), ("openrlhf", "verl")):
        ours, theirs = simple(biased)[0], simple(unbiased)[0]
        torch.testing.assert_close(ours, theirs * math.sqrt(6 / 5))
        assert not torch.allclose(ours, theirs)


def test_whitening_scope():
    scopes = {name: preset.whitening_scope for name, preset in fk.PRESETS.items()}
    assert scopes == dict.fromkeys(NAMES, "batch") | {"trlx": "minibatch"}
    for name, preset in fk.PRESETS.items():
        assert preset.advantages()["whiten"] == (name != "trlx")


def test_a_whole_batch_is_whitened_over_trained_tokens():
    with pytest.raises(ValueError, match="whitening_scope 'batch' goes with whitening_mask 'loss'"):
        dataclasses.replace(fk.PRESETS["trl"], whitening_mask="all")


def test_whitening_mask():
    """trlx counts the slot of the score and the padding; trl, with the same scores, does not."""
    ours, theirs = simple("trlx"), simple("trl")
    assert torch.equal(ours[1], theirs[1])  # the same returns
    assert theirs[0][LOSS_MASK].mean().item() == pytest.approx(0, abs=1e-6)
    assert abs(ours[0][LOSS_MASK].mean().item()) > 1e-2


def test_score_slot():
    after, last = (simple(name)[2][0].tolist() for name in ("n+", "verl"))
    assert after == [-0.25, 0.25, 3.0, 0.0]
    assert last == [-0.25, 3.25, 0.0, 0.0]
    assert [p.score_slot for p in fk.PRESETS.values()] == ["after"] * 3 + ["last"] * 2


def test_missing_eos():
    """The score of row 1, -4, where the penalty is 1 (n+), 0 (trl), 2 (trl, when asked)."""
    found = {name: simple(name, has_eos=HAS_EOS)[2][1, 3].item() for name in NAMES}
    assert found == {"n+": -1.0, "trl": -4.0, "trlx": -4.0, "openrlhf": -4.0, "verl": -4.0}
    rules = [preset.missing_eos for preset in fk.PRESETS.values()]
    assert rules == ["replace", "subtract", None, None, None]
    asked = dataclasses.replace(fk.PRESETS["trl"], missing_eos_penalty=2.0)
    rewards, _ = fk.shape_rewards(
        SCORES, LOGPROBS, REF_LOGPROBS, LOSS_MASK, kl_coef=0.0, has_eos=HAS_EOS, **asked.shaping()
    )
    assert rewards[1, 3].item() == -6.0


def test_holes():
    """A tool token at slot 1; values 2, 1, score 4 at slot 2, lambda 1/2. The last state is 3.
    verl skips it: 1 - 2 + 3/2. openrlhf: the hole has 1 + 3/2, the first slot 0 - 2 + 2.5/2."""
    mask = torch.tensor([[True, False, True]])
    values = torch.tensor([[2.0, NAN, 1.0]])
    nothing = torch.zeros(1, 3)
    first = {}
    for name in ("verl", "openrlhf"):
        options = {**fk.PRESETS[name].advantages(), "whiten": False}
        advantages, *_ = fk.rewards_to_advantages(
            torch.tensor([4.0]),
            nothing,
            nothing,
            values,
            mask,
            kl_coef=0.0,
            gamma=1.0,
            gae_lambda=0.5,
            **options,
        )
        assert advantages[0, 1:].tolist() == [0.0, 3.0]
        first[name] = advantages[0, 0].item()
    assert first == {"verl": 0.5, "openrlhf": -0.75}


def test_score_clip():
    found = {name: simple(name, scores=torch.tensor([12.0, 0.0]))[2][0].sum() for name in NAMES}
    assert {name: score.item() for name, score in found.items()} == {
        "n+": 12.0,
        "trl": 12.0,
        "trlx": 10.0,
        "openrlhf": 10.0,
        "verl": 12.0,
    }


@pytest.mark.parametrize(
    ("estimator", "d", "plain", "openrlhf", "verl"),
    [
        ("k1", -15.0, -15.0, -10.0, -15.0),
        ("k2", 6.0, 18.0, 10.0, 18.0),
        ("k3", -5.0, math.exp(5) - 6, 10.0, 10.0),
        ("k3", -1.0, math.exp(1) - 2, math.exp(1) - 2, math.exp(1) - 2),
    ],
)
def test_kl_clip(estimator, d, plain, openrlhf, verl):
    """In the reward and in the loss."""
    want = {"n+": plain, "trl": plain, "trlx": plain, "openrlhf": openrlhf, "verl": verl}
    mask = torch.ones(1, 1, dtype=torch.bool)
    logprobs, ref = torch.tensor([[d]]), torch.zeros(1, 1)
    for name, preset in fk.PRESETS.items():
        rewards, kl = fk.shape_rewards(
            torch.zeros(1),
            logprobs,
            ref,
            mask,
            kl_coef=1.0,
            **{**preset.shaping(estimator), "missing_eos": None},
        )
        assert kl.item() == -rewards.item() == pytest.approx(want[name], rel=1e-6)
        loss, _ = fk.policy_loss(
            logprobs,
            logprobs,
            torch.zeros(1, 1),
            mask,
            ref_logprobs=ref,
            kl_coef=1.0,
            **preset.policy(estimator),
        )
        assert loss.item() == pytest.approx(want[name], rel=1e-6)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "plain", "openrlhf", "verl"),
    [  # loss and slope to the log-ratio
        (math.log(2), 1.0, (-1.2, 0.0), (-1.2, 0.0), (-1.2, 0.0)),
        (math.log(0.5), -1.0, (0.8, 0.0), (0.8, 0.0), (0.8, 0.0)),
        (math.log(2), -1.0, (2.0, 2.0), (2.0, 2.0), (2.0, 2.0)),
        (math.log(5), -1.0, (5.0, 5.0), (5.0, 5.0), (3.0, 0.0)),
        (25.0, -1.0, (math.exp(25), math.exp(25)), (math.exp(20), 0.0), (3.0, 0.0)),
        (-25.0, 1.0, (-math.exp(-25), -math.exp(-25)), (-math.exp(-20), 0.0), None),
    ],
)
def test_policy_clips(log_ratio, advantage, plain, openrlhf, verl):
    want = {
        "n+": plain,
        "trl": plain,
        "trlx": plain,
        "openrlhf": openrlhf,
        "verl": verl or openrlhf,
    }
    for name, preset in fk.PRESETS.items():
        new = torch.tensor([[log_ratio]], requires_grad=True)
        loss, _ = fk.policy_loss(
            new,
            torch.zeros(1, 1),
            torch.tensor([[advantage]]),
            torch.ones(1, 1, dtype=torch.bool),
            **preset.policy(),
        )
        loss.backward()
        assert (loss.item(), new.grad.item()) == pytest.approx(want[name], rel=1e-5), name


def test_value_clip():
    """Old value 0, new .4, return 1: half of .6^2, or of .8^2 where it may move by .2 only."""
    for name, preset in fk.PRESETS.items():
        loss, _ = fk.value_loss(
            torch.tensor([0.4]),
            torch.tensor([0.0]),
            torch.tensor([1.0]),
            torch.tensor([True]),
            **preset.value(),
        )
        assert loss.item() == pytest.approx(0.18 if name in ("openrlhf", "verl") else 0.32), name


@pytest.mark.parametrize("name", NAMES)
def test_both_losses_in_one(name):
    preset, mask = fk.PRESETS[name], LOSS_MASK
    new, old, advantages, new_values, values, returns = 2 * torch.randn(6, 2, 4)
    both, _ = fk.ppo_loss(
        new, old, advantages, new_values, values, returns, mask, vf_coef=0.3, **preset.ppo()
    )
    policy, _ = fk.policy_loss(new, old, advantages, mask, **preset.policy())
    value, _ = fk.value_loss(new_values, values, returns, mask, **preset.value())
    torch.testing.assert_close(both, policy + 0.3 * value)


def test_value_loss_mask():
    """n+ and trl also learn the value behind the last token, which trlx has but does not learn."""
    found = {name: preset.value_loss_mask for name, preset in fk.PRESETS.items()}
    assert found == dict.fromkeys(NAMES, "value") | {"trlx": "loss"}


def test_a_preset_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        fk.PRESETS["verl"].dual_clip = None

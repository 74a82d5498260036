"""From scores to advantages, against loops written out here: where the score stands, what the
missing EOS does, the sign of the KL penalty, returns and GAE."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fuserl.batch import RolloutBatch, ScoredBatch, ShapedBatch
from fuserl.config import RLConfig
from fuserl.shaping import group_advantages, shape

PROMPTS = [[5], [6, 7], [8, 9], [10]]
COMPLETIONS = [[11, 12, 2], [13, 14, 15, 16, 17], [2], [18, 19]]  # EOS: yes, no, yes, no
LIMIT = 5


def config(algorithm: str = "ppo", **options: Any) -> RLConfig:
    return RLConfig(model="m", data="d", out="o", algorithm=algorithm, **options)  # type: ignore[arg-type]


@pytest.fixture
def batch(batch_of: Callable[..., RolloutBatch]) -> ScoredBatch:
    made = batch_of(PROMPTS, COMPLETIONS, width=LIMIT)
    noise = torch.where(made.loss_mask, 0.3 * torch.randn(4, LIMIT), 0.0)
    return ScoredBatch(
        **made.fields(),
        scores=torch.tensor([1.0, 2.0, -3.0, 4.0]),
        ref_logprobs=made.logprobs + noise,
        values=torch.randn(4, LIMIT),
    )


def exclude(batch: ScoredBatch, row: int) -> ScoredBatch:
    mask = batch.loss_mask.clone()
    mask[row] = False
    return dataclasses.replace(batch, loss_mask=mask)


def fields(batch: ShapedBatch) -> dict[str, torch.Tensor]:
    names = ("rewards", "kl", "value_mask", "advantages", "returns")
    return {name: getattr(batch, name) for name in names}


def test_the_score_stands_one_slot_after_the_last_token(batch: ScoredBatch) -> None:
    found = fields(shape(batch, config(kl_coef=0.0)))
    expected = torch.zeros(4, LIMIT)
    expected[0, 3] = 1.0
    expected[1, 4] = -1.0  # full: on its last token; no EOS: replaced by minus the penalty
    expected[2, 1] = -3.0
    expected[3, 2] = -1.0
    torch.testing.assert_close(found["rewards"], expected)
    slots = torch.tensor([4, 5, 2, 3])  # tokens and, where there is room, the score's slot
    assert torch.equal(found["value_mask"], torch.arange(LIMIT) < slots[:, None])


@pytest.mark.parametrize("options", [{}, {"whiten_rewards": True}])
def test_applied_scores_are_those_after_the_missing_eos_rule(
    batch: ScoredBatch, options: dict[str, Any]
) -> None:
    shaped = shape(exclude(batch, 0), config(kl_coef=0.3, missing_eos_penalty=7.5, **options))
    assert shaped.applied_scores.tolist() == [0.0, -7.5, -3.0, -7.5]
    assert shaped.scores.tolist() == [1.0, 2.0, -3.0, 4.0]


def test_a_missing_eos_replaces_the_score_by_the_penalty(batch: ScoredBatch) -> None:
    sums = fields(shape(batch, config(kl_coef=0.0, missing_eos_penalty=7.5)))["rewards"].sum(1)
    assert sums.tolist() == [1.0, -7.5, -3.0, -7.5]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_the_kl_penalty_lowers_the_reward(estimator: str, batch: ScoredBatch) -> None:
    found = fields(shape(batch, config(kl_coef=0.5, kl_estimator=estimator)))
    without = fields(shape(batch, config(kl_coef=0.0)))
    d = (batch.logprobs - batch.ref_logprobs).double()
    kl = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d, "abs": d.abs()}[estimator]
    kl = torch.where(batch.loss_mask, kl, 0).float()
    torch.testing.assert_close(found["kl"], kl, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["rewards"], without["rewards"] - 0.5 * kl)


def loop_gae(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    advantages, ahead, next_value = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        ahead = reward + gamma * next_value - value + gamma * lam * ahead
        next_value = value
        advantages.append(ahead)
    advantages.reverse()
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def test_ppo_equals_gae_by_hand_whitened_with_biased_variance(batch: ScoredBatch) -> None:
    found = fields(shape(batch, config(gamma=0.9, gae_lambda=0.8, kl_coef=0.1)))
    assert batch.values is not None
    flat = []
    for i, completion in enumerate(COMPLETIONS):
        slots = min(len(completion) + 1, LIMIT)
        rewards = found["rewards"][i, :slots].tolist()
        advantages, returns = loop_gae(rewards, batch.values[i, :slots].tolist(), 0.9, 0.8)
        torch.testing.assert_close(found["returns"][i, :slots], torch.tensor(returns))
        assert (found["returns"][i, slots:] == 0).all()
        flat += advantages[: len(completion)]
    raw = torch.tensor(flat, dtype=torch.float64)
    white = (raw - raw.mean()) / (raw.var(unbiased=False) + 1e-8).sqrt()
    ours = found["advantages"][batch.loss_mask].double()
    torch.testing.assert_close(ours, white, rtol=1e-5, atol=1e-5)
    assert (found["advantages"][~batch.loss_mask] == 0).all()


def loop_returns(rewards: list[float], gamma: float) -> list[float]:
    returns, ahead = [], 0.0
    for reward in reversed(rewards):
        ahead = reward + gamma * ahead
        returns.append(ahead)
    return returns[::-1]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_weighs_each_token_by_its_reward_to_go(gamma: float, batch: ScoredBatch) -> None:
    found = fields(shape(batch, config("reinforce", gamma=gamma, kl_coef=0.1)))
    for i, completion in enumerate(COMPLETIONS):
        slots = min(len(completion) + 1, LIMIT)
        expected = loop_returns(found["rewards"][i, :slots].tolist(), gamma)
        own = found["advantages"][i]
        torch.testing.assert_close(
            own[: len(completion)], torch.tensor(expected)[: len(completion)]
        )
        assert (own[len(completion) :] == 0).all()
    if gamma == 1.0:
        whole = found["rewards"].sum(1)
        torch.testing.assert_close(found["advantages"][:, 0], whole)


def test_the_baseline_is_the_mean_over_the_tokens(batch: ScoredBatch) -> None:
    plain = fields(shape(batch, config("reinforce")))["advantages"]
    based = fields(shape(batch, config("reinforce_baseline")))["advantages"]
    mask = batch.loss_mask
    assert based[mask].mean().item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(based[mask], plain[mask] - plain[mask].mean())
    assert (based[~mask] == 0).all()


def grpo(**options: Any) -> RLConfig:
    return config("grpo", num_samples=2, preset="trl", **options)


def test_grpo_compares_the_completions_of_a_prompt(batch: ScoredBatch) -> None:
    """Groups (1, 2) and (-3, 4): the unbiased deviation of two numbers is their distance over the
    root of 2."""
    shaped = shape(batch, grpo())
    small, large = 0.5 / (0.5**0.5 + 1e-4), 3.5 / (24.5**0.5 + 1e-4)
    for row, advantage in enumerate([-small, small, -large, large]):
        length = len(COMPLETIONS[row])
        assert shaped.advantages[row, :length].tolist() == pytest.approx([advantage] * length)
        assert (shaped.advantages[row, length:] == 0).all()
    missing = shape(batch, grpo(missing_eos_penalty=2.0))  # rows 1 and 3: 1, 0 and -3, 2
    large = 2.5 / (12.5**0.5 + 1e-4)
    firsts = [small, -small, -large, large]
    assert missing.advantages[:, 0].tolist() == pytest.approx(firsts)


def test_the_group_advantage_is_that_of_trl() -> None:
    """Its formula: mean and torch.std of each row of [groups, num_samples]."""
    scores, mask = 3 * torch.randn(24), torch.ones(24, 3, dtype=torch.bool)
    rows = scores.view(4, 6)
    expected = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-4)
    found = group_advantages(scores, mask, 6)
    torch.testing.assert_close(found, expected.view(24, 1).expand(24, 3), rtol=1e-5, atol=1e-6)


def test_a_group_of_one_or_of_equal_scores_has_no_advantage() -> None:
    scores = torch.tensor([0.1, 0.1, 0.1, 5.0, 7.0, 9.0, 1.0, 2.0, 9.0, 4.0, 5.0, 6.0])
    mask = torch.ones(12, 2, dtype=torch.bool)
    mask[[3, 4, 8, 9, 10, 11]] = False  # of the groups two, one and all completions are left out
    found = group_advantages(scores, mask, 3)
    assert (found[:6] == 0).all()
    side = 0.5 / (0.5**0.5 + 1e-4)
    assert found[6:8].flatten().tolist() == pytest.approx([-side, -side, side, side])
    assert (found[8:] == 0).all()


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_grpo_takes_the_kl_where_it_is_told(kl_in: str, batch: ScoredBatch) -> None:
    found = shape(batch, grpo(kl_coef=0.5, kl_in=kl_in, kl_estimator="k3"))
    scores = batch.scores
    if kl_in == "reward":
        scores = scores - 0.5 * found.kl.sum(1)  # type: ignore[union-attr]
    expected = group_advantages(scores, batch.loss_mask, 2)
    torch.testing.assert_close(found.advantages, expected, rtol=1e-5, atol=1e-6)
    assert found.kl is not None
    assert (found.kl[batch.loss_mask] > 0).all()
    assert torch.equal(found.applied_scores, batch.scores)


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce", "grpo"])
def test_without_a_reference_all_but_the_kl_is_the_same(algorithm: str, batch: ScoredBatch) -> None:
    options = config(algorithm, kl_coef=0.0, num_samples=2)
    without = shape(dataclasses.replace(batch, ref_logprobs=None), options)
    assert without.kl is None
    for name in ("rewards", "advantages", "returns", "applied_scores"):
        assert torch.equal(getattr(without, name), getattr(shape(batch, options), name)), name
    with pytest.raises(ValueError, match=r"kl_coef 0.3 needs the log-probabilities of a reference"):
        shape(
            dataclasses.replace(batch, ref_logprobs=None),
            config(algorithm, kl_coef=0.3, num_samples=2),
        )


@pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])
def test_rewards_at_every_token_are_discounted_where_they_stand(
    algorithm: str, batch: ScoredBatch
) -> None:
    """The last token's reward is its own, with no slot after it, and no EOS rule applies."""
    scores = torch.where(batch.loss_mask, torch.randn(4, LIMIT), 0.0)
    batch = dataclasses.replace(batch, scores=scores)
    options = {"gamma": 0.8, "kl_coef": 0.0, "reward_at": "token"}
    found = fields(shape(batch, config(algorithm, **options)))
    torch.testing.assert_close(found["rewards"], scores)
    assert torch.equal(found["value_mask"], batch.loss_mask)
    assert batch.values is not None
    for i, completion in enumerate(COMPLETIONS):
        length = len(completion)
        rewards = scores[i, :length].tolist()
        if algorithm == "reinforce":
            expected = loop_returns(rewards, 0.8)
        else:
            expected = loop_gae(rewards, batch.values[i, :length].tolist(), 0.8, 0.95)[1]
        torch.testing.assert_close(found["returns"][i, :length], torch.tensor(expected))


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce", "reinforce_baseline"])
def test_padding_changes_nothing(algorithm: str, batch: ScoredBatch) -> None:
    """A batch whose longest completion has room after it, and the same with wider padding."""
    batch = exclude(batch, 1).select(torch.tensor([0, 2, 3]))
    narrow = dataclasses.replace(
        batch,
        **{
            name: getattr(batch, name)[:, :4]
            for name in ("completions", "loss_mask", "logprobs", "ref_logprobs", "values")
        },
    )
    wide, thin = (fields(shape(b, config(algorithm, kl_coef=0.1))) for b in (batch, narrow))
    for name, tensor in thin.items():
        torch.testing.assert_close(wide[name][:, :4], tensor, msg=name)
        assert (wide[name][:, 4:] == 0).all(), name


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce", "reinforce_baseline"])
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_a_sequence_left_out_is_as_if_it_were_not_there(
    algorithm: str, whiten_rewards: bool, batch: ScoredBatch
) -> None:
    options = config(algorithm, whiten_rewards=whiten_rewards)
    with_hole = fields(shape(exclude(batch, 2), options))
    without = fields(shape(batch.select(torch.tensor([0, 1, 3])), options))
    for name, tensor in without.items():
        torch.testing.assert_close(with_hole[name][[0, 1, 3]], tensor, msg=name)
        assert (with_hole[name][2] == 0).all(), name


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce", "reinforce_baseline"])
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_a_batch_without_a_trained_token_is_all_zero(
    algorithm: str, whiten_rewards: bool, batch: ScoredBatch
) -> None:
    nothing = dataclasses.replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    found = shape(nothing, config(algorithm, whiten_rewards=whiten_rewards))
    for name, tensor in fields(found).items():
        assert (tensor == 0).all(), name


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce_baseline"])
def test_equal_scores_and_a_single_sequence_give_no_nan(
    algorithm: str, batch_of: Callable[..., RolloutBatch]
) -> None:
    single = batch_of([[5]], [[2]], width=2)
    scored = ScoredBatch(
        **single.fields(),
        scores=torch.tensor([3.0]),
        ref_logprobs=single.logprobs,
        values=torch.zeros(1, 2),
    )
    advantages = fields(shape(scored, config(algorithm, gae_lambda=0.95)))["advantages"]
    assert advantages.tolist() == [[0.0, 0.0]]

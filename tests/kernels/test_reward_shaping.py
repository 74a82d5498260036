"""kl_penalty and shape_rewards: formulas by hand, score slots, missing EOS, masks."""

import math

import pytest
import torch
from kernel_testing import opcheck, ragged_mask, runnable

import fuserl_kernels as fk
from fuserl_kernels.reward_shaping import KL_FORWARD, SHAPE_FORWARD

BACKENDS = runnable(SHAPE_FORWARD)
NAN = math.nan


@pytest.mark.parametrize("backend", runnable(KL_FORWARD))
@pytest.mark.parametrize(
    ("estimator", "values"),
    [
        ("k1", [0.5, -5.0, 0.0]),
        ("k2", [0.125, 12.5, 0.0]),
        ("k3", [math.exp(-0.5) - 0.5, math.exp(5) - 6, 0.0]),
        ("abs", [0.5, 5.0, 0.0]),
    ],
)
def test_kl_by_hand(backend, estimator, values):
    logprobs, ref_logprobs = torch.tensor([-1.0, -6.0, -2.0]), torch.tensor([-1.5, -1.0, -2.0])
    with fk.use_backend(backend):
        kl = fk.kl_penalty(logprobs, ref_logprobs, estimator)
    torch.testing.assert_close(kl, torch.tensor(values))


@pytest.mark.parametrize("kl_clip", [None, 0.7])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_kl_gradcheck(estimator, kl_clip):
    x, y = (torch.randn(7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(lambda x, y: fk.kl_penalty(x, y, estimator, kl_clip=kl_clip), (x, y))


@pytest.mark.parametrize("backend", runnable(KL_FORWARD))
@pytest.mark.parametrize("kl_clip", [None, 0.7])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_kl_gradients(backend, estimator, kl_clip):
    x, y = (torch.randn(7, 50, requires_grad=True) for _ in range(2))
    g = torch.randn(7, 50)
    d = (x - y).double()
    formula = {"k1": d, "k2": d * d / 2, "k3": torch.expm1(-d) + d, "abs": d.abs()}[estimator]
    expected = formula if kl_clip is None else formula.clamp(-kl_clip, kl_clip)
    with fk.use_backend(backend):
        kl = fk.kl_penalty(x, y, estimator, kl_clip=kl_clip)
        torch.testing.assert_close(kl.double(), expected, atol=1e-6, rtol=2e-6)
        got = torch.autograd.grad(kl, (x, y), g)
        for a, b in zip(got, torch.autograd.grad(expected, (x, y), g.double()), strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)
        opcheck("kl_penalty", x, y, estimator, 0.0)
        opcheck("kl_penalty", x, y, estimator, 0.3)


@pytest.mark.parametrize("backend", runnable(KL_FORWARD))
def test_kl_gradients_are_not_differentiable_twice(backend):
    x, y = (torch.randn(4, requires_grad=True) for _ in range(2))
    with fk.use_backend(backend):
        (gradient,) = torch.autograd.grad(fk.kl_penalty(x, y, "k2").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated once more"):
        gradient.square().sum().backward()


def test_k3_is_exact_for_small_differences():
    d = torch.tensor([1e-4])
    assert fk.kl_penalty(d, torch.zeros(1), "k3").item() == pytest.approx(5e-9, rel=2e-3)


LOGPROBS = torch.tensor([[-1.0, -2.0, NAN, NAN], [-1.0, -2.0, -3.0, -4.0], [NAN] * 4])
REFERENCE = torch.tensor([[-1.5, -1.0, NAN, NAN], [-1.0, -2.5, -3.0, -4.0], [NAN] * 4])
MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
KL = [[0.5, -1.0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kl_coef", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize(
    ("score_slot", "expected"),
    [
        ("last", [[-0.05, 7.1, 0, 0], [0, -0.05, 0, 9.0], [0, 0, 0, 0]]),
        ("after", [[-0.05, 0.1, 7.0, 0], [0, -0.05, 0, 9.0], [0, 0, 0, 0]]),
    ],
)
def test_score_slots(backend, kl_coef, score_slot, expected):
    scores = torch.tensor([7.0, 9.0, NAN])
    with fk.use_backend(backend):
        rewards, kl = fk.shape_rewards(
            scores, LOGPROBS, REFERENCE, MASK, kl_coef=kl_coef, score_slot=score_slot
        )
    torch.testing.assert_close(rewards, torch.tensor(expected))
    torch.testing.assert_close(kl, torch.tensor(KL))


@pytest.mark.parametrize("backend", BACKENDS)
def test_last_slot_of_a_mask_with_holes(backend):
    mask = torch.tensor([[1, 0, 1, 0, 0]], dtype=torch.bool)
    zero = torch.zeros(1, 5)
    with fk.use_backend(backend):
        last, _ = fk.shape_rewards(torch.ones(1), zero, zero, mask, kl_coef=0.0)
        after, _ = fk.shape_rewards(
            torch.ones(1), zero, zero, mask, kl_coef=0.0, score_slot="after"
        )
    assert last.tolist() == [[0, 0, 1, 0, 0]]
    assert after.tolist() == [[0, 0, 0, 1, 0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_max_length_decides_where_a_full_row_has_its_score(backend):
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    zero, scores = torch.zeros(2, 4), torch.ones(2)
    options = {"kl_coef": 0.0, "score_slot": "after"}
    with fk.use_backend(backend):
        full, _ = fk.shape_rewards(scores, zero, zero, mask, max_length=3, **options)
        room, _ = fk.shape_rewards(scores, zero, zero, mask, max_length=9, **options)
        trimmed, _ = fk.shape_rewards(
            scores, zero[:, :3], zero[:, :3], mask[:, :3], max_length=3, **options
        )
        with pytest.raises(ValueError, match=r"loss_mask has T = 3 .* pad T by one"):
            fk.shape_rewards(scores, zero[:, :3], zero[:, :3], mask[:, :3], max_length=9, **options)
    assert full.tolist() == [[0, 0, 1, 0], [0, 0, 1, 0]]
    assert room.tolist() == [[0, 0, 0, 1], [0, 0, 1, 0]]
    assert torch.equal(full[:, :3], trimmed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rule", "expected"),
    [(None, [4.0, -2.0, 4.0]), ("replace", [4.0, -2.0, -1.5]), ("subtract", [4.0, -2.0, 2.5])],
)
def test_clip_then_scale_then_missing_eos(backend, rule, expected):
    zero, mask = torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool)
    with fk.use_backend(backend):
        rewards, _ = fk.shape_rewards(
            torch.tensor([5.0, -1.0, 3.0]),
            zero,
            zero,
            mask,
            kl_coef=0.0,
            score_clip=2.0,
            score_scale=2.0,
            missing_eos=rule,
            missing_eos_penalty=1.5,
            has_eos=torch.tensor([True, True, False]),
        )
    assert rewards[:, 1].tolist() == expected
    assert (rewards[:, 0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_score_for_each_token(backend):
    mask = ragged_mask(5, 6, holes=True)
    scores = torch.where(mask, torch.randn(5, 6), NAN)
    logprobs, ref_logprobs = torch.randn(2, 5, 6)
    with fk.use_backend(backend):
        rewards, kl = fk.shape_rewards(
            scores, logprobs, ref_logprobs, mask, kl_coef=0.2, estimator="k2"
        )
    expected = scores - 0.2 * 0.5 * (logprobs - ref_logprobs) ** 2
    torch.testing.assert_close(rewards, torch.where(mask, expected, 0))
    assert not rewards.requires_grad
    assert (kl[~mask] == 0).all()


def test_a_row_longer_than_the_budget_is_refused():
    x, trained = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="trains a slot past max_length, which is 2"):
        fk.shape_rewards(x[:, 0], x, x, trained, kl_coef=0.1, score_slot="after", max_length=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    x, mask = torch.randn(3, 4), torch.rand(3, 4) > 0.5
    with fk.use_backend(backend):
        for slot, eos in [("last", torch.tensor([True, False, True])), ("after", None)]:
            opcheck(
                "shape_rewards",
                torch.randn(3),
                x,
                x + 1,
                mask,
                eos,
                torch.tensor(0.1) if eos is None else None,
                0.1,
                "k3",
                0.5,
                slot,
                2.0,
                1.0,
                "replace" if eos is not None else "",
                1.0,
                0,
            )


BAD = {
    "scores must have shape": {"scores": torch.zeros(3)},
    "ref_logprobs must have shape": {"ref_logprobs": torch.zeros(2, 4)},
    "score_slot must be one of last, after": {"score_slot": "first"},
    "has_eos is needed": {"missing_eos": "replace"},
    "missing_eos must be one of": {"missing_eos": "drop"},
    "missing_eos goes with one score": {
        "scores": torch.zeros(2, 3),
        "missing_eos": "replace",
        "has_eos": torch.ones(2, dtype=torch.bool),
    },
    "score_clip must be": {"score_clip": 0.0},
    "kl_coef must be": {"kl_coef": torch.ones(3)},
    "estimator must be one of": {"estimator": "k9"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    x = torch.zeros(2, 3)
    arguments = {
        "scores": torch.zeros(2),
        "logprobs": x,
        "ref_logprobs": x,
        "loss_mask": x == 0,
        "kl_coef": 0.1,
    }
    with pytest.raises(ValueError, match=message):
        fk.shape_rewards(**(arguments | BAD[message]))

"""Triton from rewards to advantages, in the interpreter or on a GPU: what only several blocks,
other dtypes and layouts show. Values in general: test_advantages.py and test_rl_properties.py."""

import math

import pytest
import torch

from fuserl_kernels import triton_rewards as rewards_module
from fuserl_kernels import triton_runtime
from fuserl_kernels.reference import rewards as reference
from fuserl_kernels.triton_advantages import discounted_returns_triton, gae_triton
from fuserl_kernels.triton_rewards import (
    BLOCKS,
    FIELD_BLOCKS,
    blocks,
    kl_penalty_bwd_triton,
    kl_penalty_triton,
    shape_rewards_triton,
)
from fuserl_kernels.triton_rewards_to_advantages import rewards_to_advantages_triton
from fuserl_kernels.triton_whitening import (
    MAX_PARTS,
    MOMENTS_CONFIGURATION,
    masked_moments_triton,
    masked_whiten_triton,
)

pytestmark = pytest.mark.skipif(
    triton_runtime.why_absent() is not None, reason="Triton cannot run here"
)
DEVICE = triton_runtime.device_type()
LONGEST = BLOCKS[-1].constants["BLOCK_T"]


def example(num_sequences, num_slots, dtype=torch.float32):
    """(rewards, values, loss_mask, value_mask), NaN and infinite where nothing is read."""
    rewards, values = torch.randn(2, num_sequences, num_slots, device=DEVICE)
    mask = torch.rand(num_sequences, num_slots, device=DEVICE) > 0.3
    value_mask = mask | torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    rewards = torch.where(value_mask, rewards, math.nan).to(dtype)
    values = torch.where(value_mask, values, -math.inf).to(dtype)
    return rewards, values, mask, value_mask


def wide(tensors):
    return [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in tensors]


def assert_gae(*arguments, tolerance=2e-6):
    got, truth = gae_triton(*arguments), reference.gae_fwd(*wide(arguments))
    for a, b in zip(got, truth, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("masked", ["identity", "carry"])
def test_lengths_around_the_blocks(masked):
    sizes = [c.constants["BLOCK_T"] for c in BLOCKS]
    for num_slots in (1, *sizes, *(size + 1 for size in sizes), 3 * LONGEST + 5):
        assert_gae(*example(3, num_slots), None, 0.97, 0.9, masked)


def test_a_hole_across_the_border_of_two_blocks():
    """Both blocks hold one slot beside it, so all that passes the border is what a hole carries."""
    rewards, values, mask, _ = (x.nan_to_num(1.0, 1.0, 1.0) for x in example(1, LONGEST + 9))
    mask = torch.zeros_like(rewards, dtype=torch.bool)
    mask[0, 3] = mask[0, -3] = True
    for masked in ("identity", "carry"):
        assert_gae(rewards, values, mask, mask, None, 0.999, 0.998, masked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_and_strides(dtype):
    rewards, values, mask, value_mask = example(5, 24, dtype)
    assert_gae(rewards, values, mask, value_mask, None, 1.0, 0.95, "identity")
    cut = [x.t()[3:15] for x in (rewards, values, mask, value_mask)]
    assert_gae(*cut, None, 1.0, 0.95, "identity")
    broadcast = value_mask[:1].expand(5, 24)
    clean = rewards.nan_to_num(0.5)
    assert_gae(clean, clean, broadcast, broadcast, None, 1.0, 0.95, "carry")


def test_one_float64_input_makes_the_whole_float64():
    rewards, values, mask, value_mask = example(3, 20)
    arguments = (rewards, values.double(), mask, value_mask, None, 0.97, 0.9, "identity")
    for a, b in zip(gae_triton(*arguments), reference.gae_fwd(*wide(arguments)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_packed_segments_of_all_lengths():
    lengths = torch.tensor([0, 5, 1, 0, 40, 2, 200, 0])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(DEVICE)
    rewards, values, mask, value_mask = (x[0] for x in example(1, int(lengths.sum())))
    for kind in (torch.int32, torch.int64):
        assert_gae(rewards, values, mask, value_mask, cu_seqlens.to(kind), 0.99, 0.9, "carry")
    arguments = (rewards, mask, value_mask, cu_seqlens, 0.9)
    got, truth = (
        discounted_returns_triton(*arguments),
        reference.discounted_returns_fwd(*wide(arguments)),
    )
    torch.testing.assert_close(got.double(), truth, atol=2e-6, rtol=2e-6)
    nothing = rewards[:0]
    empty = cu_seqlens[:1]
    assert gae_triton(nothing, nothing, mask[:0], mask[:0], empty, 1.0, 1.0, "carry")[0].shape == (
        0,
    )


def test_wrong_bounds_of_segments_reach_nothing_outside():
    rewards, values, mask, value_mask = (x[0] for x in example(1, 12))
    cu_seqlens = torch.tensor([-3, 5, 4, 90], device=DEVICE)
    advantages, returns = gae_triton(
        rewards, values, mask, value_mask, cu_seqlens, 1.0, 1.0, "identity"
    )
    assert advantages.isfinite().all()
    assert returns.isfinite().all()


def test_a_row_has_the_same_bits_in_any_batch():
    rewards, values, mask, value_mask = example(37, 7)
    rest = (None, 0.97, 0.9, "identity")
    whole = gae_triton(rewards, values, mask, value_mask, *rest)
    order = torch.randperm(37, device=DEVICE)
    shuffled = gae_triton(rewards[order], values[order], mask[order], value_mask[order], *rest)
    alone = gae_triton(rewards[36:], values[36:], mask[36:], value_mask[36:], *rest)
    for a, b, c in zip(whole, shuffled, alone, strict=True):
        assert torch.equal(a[order], b)
        assert torch.equal(a[36:], c)


def test_a_long_row_keeps_small_advantages():
    """Values that predict the returns to one part in a thousand, gamma = lambda = 1: float32 states
    would lose the advantage in the rounding of the return."""
    rewards = torch.randn(1, LONGEST + 200, device=DEVICE)
    values = rewards.double().flip(1).cumsum(1).flip(1)
    values = (values + 1e-3 * torch.randn_like(values)).float()
    mask = torch.ones_like(rewards, dtype=torch.bool)
    arguments = (rewards, values, mask, mask, None, 1.0, 1.0, "identity")
    advantages, truth = gae_triton(*arguments)[0], reference.gae_fwd(*wide(arguments))[0]
    assert (advantages.double() - truth).abs().max() < 1e-6 * truth.std()


def whole(num_sequences, num_slots, dtype=torch.float32, **changed):
    """The arguments of rewards_to_advantages."""
    mask = torch.rand(num_sequences, num_slots, device=DEVICE) > 0.3
    logprobs, ref_logprobs, values = torch.randn(3, num_sequences, num_slots, device=DEVICE)
    options = {
        "scores": torch.randn(num_sequences, device=DEVICE).to(dtype),
        "logprobs": torch.where(mask, logprobs, math.nan).to(dtype),
        "ref_logprobs": torch.where(mask, ref_logprobs, math.inf).to(dtype),
        "values": values.to(dtype),
        "loss_mask": mask,
        "has_eos": torch.rand(num_sequences, device=DEVICE) > 0.5,
        "kl_coefs": torch.tensor(0.1, device=DEVICE),
        "kl_coef": 0.0,
        "estimator": "k3",
        "kl_clip": 2.0,
        "score_slot": "after",
        "score_clip": 1.0,
        "score_scale": 2.0,
        "missing_eos": "subtract",
        "missing_eos_penalty": 0.5,
        "max_length": 0,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "masked": "identity",
        "whiten": True,
        "whiten_rewards": True,
        "unbiased": True,
    }
    return list((options | changed).values())


def assert_whole(arguments, tolerance=1e-5):
    """Error relative to the spread of each result."""
    got = rewards_to_advantages_triton(*arguments)
    truth = reference.rewards_to_advantages_fwd(*wide(arguments))
    for a, b in zip(got, truth, strict=True):
        assert not a.isnan().any()
        spread = b.abs().max().clamp(min=1e-30)
        assert ((a.double() - b).abs().max() / spread) < tolerance


@pytest.mark.parametrize(("dtype", "masked"), [(torch.float32, "carry"), (torch.half, "identity")])
def test_rewards_to_advantages_of_several_programs(dtype, masked):
    assert_whole(whole(9, 17, dtype, masked=masked))
    assert_whole(whole(9, 17, dtype, masked=masked, whiten_rewards=False))


@pytest.mark.parametrize("whiten", [False, True])
def test_rewards_to_advantages_of_several_blocks(whiten):
    assert_whole(whole(1, FIELD_BLOCKS[-1].constants["BLOCK_T"] + 20, whiten=whiten))


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_a_score_for_each_token(whiten_rewards):
    scores = torch.randn(6, 20, device=DEVICE)
    assert_whole(
        whole(6, 20, scores=scores, has_eos=None, missing_eos="", whiten_rewards=whiten_rewards)
    )


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_whitening_where_values_predict_the_returns(whiten_rewards):
    """The advantage is one part in a hundred of what it is the difference of."""
    arguments = whole(4, 60, gamma=1.0, whiten_rewards=whiten_rewards, whiten=False)
    returns = reference.rewards_to_advantages_fwd(*wide(arguments))[1]
    arguments[3] = (returns + 0.01 * torch.randn_like(returns)).float()
    arguments[19] = True
    assert_whole(arguments)


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_many_rows_share_the_partial_sums(monkeypatch, whiten_rewards):
    """More blocks of rows than parts: each program takes several, and two runs agree in bits."""
    monkeypatch.setattr("fuserl_kernels.triton_rewards_to_advantages.MAX_PARTS", 2)
    arguments = whole(40, 3, whiten_rewards=whiten_rewards)
    assert_whole(arguments)
    runs = [rewards_to_advantages_triton(*arguments) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_score_behind_a_block():
    """ "after" with the last trained token at the end of a block, with and without max_length."""
    for num_slots, last in ((LONGEST + 5, 4), (40, 39), (40, 20)):
        arguments = whole(2, num_slots, whiten=False, whiten_rewards=False)[:16]
        loss_mask = arguments[4]
        loss_mask[:, last + 1 :] = False
        loss_mask[0, last] = True
        loss_mask[1] = False
        arguments[1], arguments[2] = arguments[1].nan_to_num(0.0), torch.zeros_like(arguments[2])
        for max_length in (0, last + 1, last - 2):
            arguments[15] = max_length
            without_values = arguments[:3] + arguments[4:]
            got = shape_rewards_triton(*without_values)
            for a, b in zip(got, reference.shape_rewards_fwd(*without_values), strict=True):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("estimator", reference.ESTIMATORS)
@pytest.mark.parametrize("kl_clip", [0.0, 0.5])
def test_kl_of_mixed_dtypes_with_infinities(estimator, kl_clip):
    """Results in float32, or in float64 beside a float64; no NaN from a token with gradient 0."""
    new = torch.randn(1500, device=DEVICE).bfloat16()
    new[3:6] = torch.tensor([math.inf, -math.inf, 0.0])
    for ref in (torch.randn(1500, device=DEVICE).half(), torch.randn(1500, device=DEVICE).double()):
        got = kl_penalty_triton(new, ref, estimator, kl_clip)
        want = reference.kl_penalty_fwd(new, ref, estimator, kl_clip)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6, equal_nan=True)
        grad = torch.randn(1500, device=DEVICE, dtype=got.dtype)
        one = torch.ones((), device=DEVICE, dtype=got.dtype).expand(1500)
        for g in (grad, one, grad.repeat_interleave(2)[::2]):
            got_grads = kl_penalty_bwd_triton(new, ref, estimator, kl_clip, g)
            want_grads = reference.kl_penalty_bwd(new, ref, estimator, kl_clip, g)
            for a, b in zip(got_grads, want_grads, strict=True):
                step = 2 * max(torch.finfo(a.dtype).eps, 1e-6)
                torch.testing.assert_close(a, b, atol=1e-6, rtol=step, equal_nan=True)
    nan = torch.full((2,), math.nan, device=DEVICE)
    zero = torch.zeros(2, device=DEVICE)
    assert (kl_penalty_bwd_triton(nan, nan, "k1", 0.0, zero)[0] == 0).all()


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_over_many_blocks(offset, monkeypatch):
    """A few blocks, and more blocks than parts; far from 0 no digit of the variance is lost."""
    size = 2 * MOMENTS_CONFIGURATION.constants["BLOCK"] + 77
    x = torch.randn(size, device=DEVICE) + offset
    mask = torch.rand(size, device=DEVICE) > 0.5
    x[~mask] = math.nan
    truth = reference.masked_moments_fwd(x, mask)
    assert truth[0] > MAX_PARTS
    torch.testing.assert_close(masked_moments_triton(x, mask), truth, atol=1e-12, rtol=1e-12)
    monkeypatch.setattr("fuserl_kernels.triton_whitening.MAX_PARTS", 2)
    moments = masked_moments_triton(x, mask)
    torch.testing.assert_close(moments, truth, atol=1e-12, rtol=1e-12)
    assert torch.equal(moments, masked_moments_triton(x, mask))
    white = masked_whiten_triton(x, mask, None, True, False)
    torch.testing.assert_close(white, reference.masked_whiten_fwd(x, mask, None, True, False))


def test_many_given_moments_are_merged_in_blocks():
    """More parts than one block of the merge holds, some of them empty, far apart."""
    x, mask = torch.randn(2, 9, device=DEVICE).bfloat16(), torch.ones(2, 9, device=DEVICE) > 0
    moments = torch.rand(MAX_PARTS + 40, 3, device=DEVICE, dtype=torch.float64) * 100
    moments[::3] = 0
    got = masked_whiten_triton(x, mask, moments, False, True)
    want = reference.masked_whiten_fwd(x, mask, moments, False, True)
    torch.testing.assert_close(got, want)


def test_blocks_grow_with_the_rows_and_not_with_their_number():
    sizes = [blocks(1, n)[1].constants["BLOCK_T"] for n in (1, 2, 4, 9, 17, 90, 1024, 10**6)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == len(rewards_module.BLOCKS)
    assert blocks(10**6, 1024)[1] is blocks(1, 1024)[1]

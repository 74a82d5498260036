"""The one-launch losses where their tiles, programs and layouts differ: against the reference.

Plain formulas and invariants: test_policy_loss.py, test_value_loss.py and so on, which run every
implementation through the public functions."""

import itertools
from importlib import import_module

import pytest
import torch
from kernel_testing import assert_error_rule

from fuserl_kernels import triton_runtime
from fuserl_kernels.reference.pairwise import pairwise_loss_fwd
from fuserl_kernels.reference.policy import (
    AGGREGATIONS,
    CLIPS,
    RATIO_LEVELS,
    CorrectionOptions,
    PolicyOptions,
    policy_loss_fwd,
    ppo_loss_fwd,
)
from fuserl_kernels.reference.value import value_loss_fwd

pytestmark = pytest.mark.skipif(
    triton_runtime.why_absent() is not None, reason="Triton cannot run here"
)
losses = import_module("fuserl_kernels.triton_losses")
pairwise = import_module("fuserl_kernels.triton_pairwise")
partial_sums = import_module("fuserl_kernels.triton_partial_sums")
DEVICE = triton_runtime.device_type()
STEP = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
GATES = {"sapo": (1.0, 1.05, 0.0, 0.0), "vespo": (2.0, 3.0, 3.0, 2.0)}


def choices(clip="ppo", correction="none", correction_level="token", **changes):
    options = PolicyOptions(
        ratio_level="token",
        clip=clip,
        clip_low=0.2,
        clip_high=0.28,
        dual_clip=1.5 if clip == "ppo" else 0.0,
        gate_pos=GATES.get(clip, (0.0,) * 4)[0],
        gate_neg=GATES.get(clip, (0.0,) * 4)[1],
        gate_rate_pos=GATES.get(clip, (0.0,) * 4)[2],
        gate_rate_neg=GATES.get(clip, (0.0,) * 4)[3],
        log_ratio_clip=0.0,
        aggregation="token_mean",
        kl_coef=0.1,
        kl_estimator="k3",
        kl_clip=0.0,
        entropy_coef=0.02,
    )
    return (
        *options._replace(**changes),
        *CorrectionOptions(correction, correction_level, 0.6, 1.5),
        True,
    )


def batch(*shape, dtype=torch.float32):
    """(new_logprobs, logprobs, advantages, loss_mask), (ref, entropy, rollout); masked slots hold
    what must not be read."""
    mask = torch.rand(shape, device=DEVICE) > 0.3
    old = -3 * torch.rand(shape, device=DEVICE)
    near = [old + 0.2 * torch.randn(shape, device=DEVICE) for _ in range(3)]
    tensors = [near[0], old, torch.randn(shape, device=DEVICE)]
    extras = [near[1], torch.rand(shape, device=DEVICE), near[2]]
    if shape[0] > 1:
        mask[1:2] = False
    hidden = [torch.where(mask, x, torch.nan).to(dtype) for x in (*tensors, *extras)]
    return (*hidden[:3], mask), tuple(hidden[3:])


def check(ours, reference, arguments):
    """The error rule for each output, against the reference in float64; returns our outputs."""

    def cast(dtype):
        def change(x):
            floating = isinstance(x, torch.Tensor) and x.is_floating_point()
            return x.to(dtype) if floating else x

        return [change(x) for x in arguments]

    mine, truth, peer = (
        ours(*arguments),
        reference(*cast(torch.float64)),
        reference(*cast(torch.float32)),
    )
    for got, want, other in zip(mine, truth, peer, strict=True):
        assert got.shape == want.shape
        if want.numel():
            size = max(1.0, float(want.abs().max()))
            assert_error_rule(got, other, want, STEP[got.dtype] * size)
    return mine


CASES = [
    (level, clip, aggregation)
    for level, clip, aggregation in itertools.product(RATIO_LEVELS, CLIPS, AGGREGATIONS)
    if clip != "vespo" or level == "sequence_sum"
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_options(number):
    """Each level, clip and aggregation once; the other options in turn."""
    level, clip, aggregation = CASES[number]
    tensors, extras = batch(5, 40)
    corrections = [("none", "token"), ("truncate", "token"), ("mask", "sequence_mean")]
    correction = [*corrections, ("reject", "sequence_sum")][number % 4]
    chosen = choices(
        clip, *correction, ratio_level=level, aggregation=aggregation,
        kl_estimator=["k1", "k2", "k3", "abs"][number // 2 % 4], kl_clip=[0.0, 0.1][number % 2],
        log_ratio_clip=[0.0, 0.3][number // 2 % 2],
    )  # fmt: skip
    denominator = [None, torch.tensor(7.0, device=DEVICE)][number // 4 % 2]
    if correction[0] == "none":
        extras = (*extras[:2], None)
    arguments = (*tensors, denominator, None, *extras, *chosen)
    check(losses.policy_loss_triton, policy_loss_fwd, arguments)


SIZES = [(1, 1), (3, 1023), (2, 2500), (40, 31), (0, 5), (3, 0)]


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("level", ["token", "sequence_mean"])
@pytest.mark.parametrize("max_programs", [2, 256])
def test_tiles_and_programs(shape, level, max_programs, monkeypatch):
    """Sequences longer and shorter than a tile; programs with many tiles and with one."""
    monkeypatch.setattr(losses, "MAX_PROGRAMS", max_programs)
    tensors, extras = batch(*shape)
    chosen = choices(ratio_level=level)
    arguments = (*tensors, None, None, *extras[:2], None, *chosen)
    mine = check(losses.policy_loss_triton, policy_loss_fwd, arguments)
    for one, other in zip(mine, losses.policy_loss_triton(*arguments), strict=True):
        assert torch.equal(one, other)
    assert partial_sums.scratch(mine[0].device)[1].item() == 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("lengths", [[5, 0, 1, 1030, 7], [0, 0], [3] * 50], ids=str)
def test_packed(aggregation, lengths):
    ends = torch.tensor([0, *itertools.accumulate(lengths)], device=DEVICE)
    tensors, extras = batch(sum(lengths))
    for cu_seqlens in (ends, ends.int()):
        chosen = choices(
            "sapo", "mask", "sequence_mean", ratio_level="sequence_mean", aggregation=aggregation
        )
        arguments = (*tensors, None, cu_seqlens, *extras, *chosen)
        check(losses.policy_loss_triton, policy_loss_fwd, arguments)
    per_sequence = torch.randn(len(lengths), 2, device=DEVICE)[:, 1]
    arguments = (*tensors[:2], per_sequence, tensors[3], None, ends, *extras, *chosen)
    check(losses.policy_loss_triton, policy_loss_fwd, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own_mask", [False, True])
def test_ppo_loss(dtype, own_mask):
    tensors, (ref, entropy, _) = batch(4, 300, dtype=dtype)
    *policy, mask = tensors
    value_mask = mask.roll(1, dims=0) if own_mask else mask
    values = [
        torch.where(value_mask, x, torch.nan).to(dtype)
        for x in torch.randn(3, 4, 300, device=DEVICE) + 5
    ]
    arguments = (
        *policy, *values, mask, value_mask, 0.5, 0.2, torch.tensor(900, device=DEVICE),
        None, None, ref, entropy, None, *choices(),
    )  # fmt: skip
    mine = check(losses.ppo_loss_triton, ppo_loss_fwd, arguments)
    assert [x.dtype for x in mine] == [torch.float32] * 3 + [dtype] * 3


def test_a_fortran_mask_at_the_same_address_is_another_mask():
    (*policy, mask), _ = batch(6, 6)
    policy = [x.nan_to_num() for x in policy]
    values = torch.randn(3, 6, 6, device=DEVICE)
    rest = (0.5, 0.2, None, None, None, None, None, None)
    chosen = choices(kl_coef=0.0, entropy_coef=0.0)
    arguments = (*policy, *values, mask, mask.t(), *rest, *chosen)
    check(losses.ppo_loss_triton, ppo_loss_fwd, arguments)


def test_strides():
    """Views of every kind, among them advantages that repeat one number a row."""
    (new, old, advantages, mask), (ref, entropy, rollout) = batch(4, 50)
    chosen = choices(correction="truncate")
    advantages = advantages.nan_to_num()
    turned = [x.t().contiguous().t() for x in (new, old, mask, ref, entropy, rollout)]
    for view in (
        advantages[:, :1].expand(4, 50),
        advantages[:, 3],
        advantages.t().contiguous().t(),
        advantages.repeat(1, 2)[:, ::2],
        torch.ones((), device=DEVICE).expand(4, 50),
    ):
        arguments = (*turned[:2], view, turned[2], None, None, *turned[3:], *chosen)
        check(losses.policy_loss_triton, policy_loss_fwd, arguments)
    flat = (new.flatten(), old.flatten(), torch.ones((), device=DEVICE).expand(200), mask.flatten())
    arguments = (*flat, None, None, None, None, None, *choices(kl_coef=0.0, entropy_coef=0.0))
    check(losses.policy_loss_triton, policy_loss_fwd, arguments)


@pytest.mark.parametrize("level", ["token", "sequence_sum"])
def test_64_bit_token_numbers_give_the_same_bits(level, monkeypatch):
    tensors, extras = batch(3, 1100)
    arguments = (*tensors, None, None, *extras[:2], None, *choices(ratio_level=level))
    expected = losses.policy_loss_triton(*arguments)
    monkeypatch.setattr(losses, "WIDE_FROM", 0)
    for one, other in zip(losses.policy_loss_triton(*arguments), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("log_ratio_clip", [0.0, 0.3])
def test_a_trained_nan_stays(clip, log_ratio_clip):
    (new, old, advantages, mask), _ = batch(2, 20)
    mask[0, 3] = mask[0, 4] = True
    new, old, advantages = (x.nan_to_num() for x in (new, old, advantages))
    new[0, 3] = torch.nan
    chosen = choices(clip, kl_coef=0.0, entropy_coef=0.0, log_ratio_clip=log_ratio_clip)
    loss, metrics, _, gradient, _ = losses.policy_loss_triton(
        new, old, advantages, mask, *[None] * 5, *chosen
    )
    assert loss.isnan()
    assert metrics[0].isnan()
    if clip != "vespo" or not log_ratio_clip:
        assert gradient[0, 3].isnan()
    assert gradient[0, 4].isfinite()
    loss, _, _, gradient = losses.value_loss_triton(new, old, old, mask, 0.2, None, True)
    assert loss.isnan()
    assert gradient[0, 3].isnan()
    assert gradient[0, 4].isfinite()


@pytest.mark.parametrize("clip_range", [0.2, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_loss(clip_range, dtype):
    (new, old, returns, mask), _ = batch(3, 900, dtype=dtype)
    for shift in (0.0, 100.0):  # float64 moments: a mean far from 0 costs no digits
        shifted = [x + shift for x in (new, old, returns)]
        for denominator in (None, torch.tensor(5.0, device=DEVICE, dtype=torch.float64)):
            arguments = (*shifted, mask, clip_range, denominator, True)
            check(losses.value_loss_triton, value_loss_fwd, arguments)
    constant = torch.full_like(returns, 0.1)
    _, metrics, _, _ = losses.value_loss_triton(new, old, constant, mask, clip_range, None, True)
    assert metrics[2] == 0


def test_without_gradients():
    tensors, (ref, entropy, _) = batch(3, 20)
    with_them = (*tensors, None, None, ref, entropy, None, *choices())
    results = losses.policy_loss_triton(*with_them[:-1], False)
    assert [x.shape for x in results[3:]] == [(0,), (0,)]
    for one, other in zip(results[:3], losses.policy_loss_triton(*with_them), strict=False):
        assert torch.equal(one, other)
    assert losses.value_loss_triton(*tensors, 0.2, None, False)[3].shape == (0,)


@pytest.mark.parametrize("num_pairs", [0, 1, 1024, 2500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pairwise_loss(num_pairs, dtype):
    chosen, rejected = torch.randn(2, num_pairs, 2, device=DEVICE).mul(3).to(dtype)[:, :, 1]
    for margin in (None, torch.tensor(0.5, device=DEVICE), chosen.abs()):
        for needs_grad in (True, False):
            arguments = (chosen, rejected, margin, 0.01, needs_grad)
            mine = check(pairwise.pairwise_loss_triton, pairwise_loss_fwd, arguments)
            assert [x.dtype for x in mine] == [torch.float32] * 2 + [dtype] * 2


def test_pairwise_loss_far_apart():
    """Costs of well-separated pairs keep their leading digits, and a NaN stays one."""
    for lead in (20.0, 80.0, -300.0):
        chosen = torch.full((1,), lead, device=DEVICE)
        loss, *_ = pairwise.pairwise_loss_triton(chosen, chosen * 0, None, 0.0, False)
        torch.testing.assert_close(
            loss.double(), torch.nn.functional.softplus(-chosen.double()).sum(), rtol=2e-5, atol=0
        )
    loss, *_ = pairwise.pairwise_loss_triton(chosen * torch.nan, chosen, None, 0.0, False)
    assert loss.isnan()
    with pytest.raises(ValueError, match="rejected_scores is float64"):
        pairwise.pairwise_loss_triton(chosen, chosen.double(), None, 0.0, False)

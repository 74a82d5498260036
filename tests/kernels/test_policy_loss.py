"""policy_loss: every option against a loop over sequences and autograd, and its invariants."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_testing import assert_near, opcheck, ragged_mask, runnable, widest

import fuserl_kernels as fk
from fuserl_kernels.policy_loss import FORWARD

BACKENDS = runnable(FORWARD)
LEVELS = ("token", "sequence_sum", "sequence_mean", "sequence_mean_token")
CLIPS = ("ppo", "cispo", "sapo", "none")
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum")


def kl(new, ref, estimator, bound=None):
    d = new - ref
    value = {"k1": d, "k2": d * d / 2, "k3": torch.exp(-d) - 1 + d, "abs": d.abs()}[estimator]
    return value if bound is None else value.clamp(-bound, bound)


def corrected(old, rollout, correction, level, low, high):
    """What each advantage of one sequence is multiplied by."""
    w = old - rollout
    if level != "token":
        w = (w.sum() if level == "sequence_sum" else w.mean()).expand(len(w))
    w = w.exp()
    inside = (w >= low) & (w <= high)
    return {"truncate": w.clamp(low, high), "mask": w * inside, "reject": inside.to(w.dtype)}[
        correction
    ].detach()


def plain(
    new,
    old,
    advantages,
    mask,
    ref,
    entropy,
    *,
    denominator=None,
    level="token",
    clip="ppo",
    low=0.2,
    high=0.2,
    dual=None,
    aggregation="token_mean",
    kl_coef=0.0,
    estimator="k3",
    entropy_coef=0.0,
    log_ratio_clip=None,
    kl_clip=None,
    rollout=None,
    correction=(),
):
    """The loss sequence by sequence over the trained tokens alone; autograd does the rest."""
    sequences = []
    for row in range(new.shape[0]):
        kept = mask[row].nonzero().squeeze(-1)
        if not len(kept):
            continue
        log_ratio = new[row, kept] - old[row, kept]
        if level == "sequence_sum":
            log_ratio = log_ratio.sum().expand(len(kept))
        elif level == "sequence_mean":
            log_ratio = log_ratio.mean().expand(len(kept))
        elif level == "sequence_mean_token":
            log_ratio = log_ratio.mean().detach() + log_ratio - log_ratio.detach()
        if log_ratio_clip is not None:
            log_ratio = log_ratio.clamp(-log_ratio_clip, log_ratio_clip)
        ratio, a = log_ratio.exp(), advantages[row, kept]
        if correction:
            a = a * corrected(old[row, kept], rollout[row, kept], *correction)
        bounded = ratio.clamp(1 - low, 1 + high)
        if clip == "none":
            term = -ratio * a
        elif clip == "cispo":
            term = -bounded.detach() * a * new[row, kept]
        elif clip == "sapo":
            tau = torch.where(a > 0, 1.0, 1.05)
            term = -(tau * (ratio - 1)).sigmoid() * 4 / tau * a
        elif clip == "vespo":
            k, rate = torch.where(a >= 0, 2.0, 3.0), torch.where(a >= 0, 3.0, 2.0)
            weight = ratio.detach() ** k * (rate * (1 - ratio.detach())).exp()
            term = -weight * a * new[row, kept]
        else:
            term = -torch.min(ratio * a, bounded * a)
            if dual is not None:
                term = torch.where(a < 0, torch.min(term, -dual * a), term)
        term = term + kl_coef * kl(new[row, kept], ref[row, kept], estimator, kl_clip)
        sequences.append(term - entropy_coef * entropy[row, kept])
    if not sequences:
        return new.sum() * 0
    if aggregation == "sequence_mean":
        sequences = [terms.mean() for terms in sequences]
        return torch.stack(sequences).sum() / (denominator or len(sequences))
    default = mask.sum() if aggregation == "token_mean" else len(sequences)
    return torch.cat(sequences).sum() / (denominator or default)


def batch(num_sequences=6, num_slots=7, dtype=torch.float64, holes=True, spread=0.4):
    mask = ragged_mask(num_sequences, num_slots, holes)
    old = -torch.rand(num_sequences, num_slots, dtype=dtype) * 3
    new = (old + spread * torch.randn_like(old)).requires_grad_()
    ref = old + spread * torch.randn_like(old)
    entropy = torch.rand_like(old).requires_grad_()
    return new, old, torch.randn_like(old), mask, ref, entropy


def grads(loss, *leaves):
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("level", "clip", "aggregation"), list(itertools.product(LEVELS, CLIPS, AGGREGATIONS))
)
def test_equals_the_plain_formula(backend, level, clip, aggregation):
    new, old, advantages, mask, ref, entropy = batch(dtype=widest(backend))
    for denominator, estimator in [(None, "k3"), (11.0, "k2")]:
        expected = plain(
            new,
            old,
            advantages,
            mask,
            ref,
            entropy,
            denominator=denominator,
            level=level,
            clip=clip,
            high=0.28,
            aggregation=aggregation,
            kl_coef=0.1,
            estimator=estimator,
            entropy_coef=0.02,
        )
        with fk.use_backend(backend):
            loss, _ = fk.policy_loss(
                new,
                old,
                advantages,
                mask,
                ref_logprobs=ref,
                entropy=entropy,
                denominator=denominator,
                ratio_level=level,
                clip=clip,
                clip_range_high=0.28,
                aggregation=aggregation,
                kl_coef=0.1,
                kl_estimator=estimator,
                entropy_coef=0.02,
            )
        assert_near(loss, expected)
        for got, want in zip(grads(loss, new, entropy), grads(expected, new, entropy), strict=True):
            assert_near(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", LEVELS)
def test_dual_clip(backend, level):
    new, old, advantages, mask, ref, entropy = batch(spread=2.0, dtype=widest(backend))
    expected = plain(new, old, advantages, mask, ref, entropy, level=level, dual=3.0)
    with fk.use_backend(backend):
        loss, _ = fk.policy_loss(new, old, advantages, mask, ratio_level=level, dual_clip=3.0)
    assert_near(loss, expected)
    assert_near(grads(loss, new)[0], grads(expected, new)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_vespo(backend, aggregation):
    new, old, advantages, mask, ref, entropy = batch(spread=0.5, dtype=widest(backend))
    options = {"clip": "vespo", "aggregation": aggregation}
    expected = plain(new, old, advantages, mask, ref, entropy, level="sequence_sum", **options)
    with fk.use_backend(backend):
        loss, _ = fk.policy_loss(new, old, advantages, mask, ratio_level="sequence_sum", **options)
    assert_near(loss, expected)
    assert_near(grads(loss, new)[0], grads(expected, new)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("clip", ["ppo", "sapo", "none"])
def test_bounds_on_the_log_ratio_and_the_kl(backend, level, clip):
    new, old, advantages, mask, ref, entropy = batch(dtype=widest(backend))
    bounds = {"log_ratio_clip": 0.15, "kl_clip": 0.1, "clip": clip}
    expected = plain(
        new, old, advantages, mask, ref, entropy, level=level, kl_coef=0.3, dual=None, **bounds
    )
    with fk.use_backend(backend):
        loss, metrics = fk.policy_loss(
            new, old, advantages, mask, ref_logprobs=ref, ratio_level=level, kl_coef=0.3, **bounds
        )
    assert_near(loss, expected)
    assert_near(grads(loss, new)[0], grads(expected, new)[0])
    held = kl(new, ref, "k3", 0.1)[mask].mean().detach()
    assert_near(metrics["kl"], held)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("correction", ["truncate", "mask", "reject"])
@pytest.mark.parametrize("correction_level", ["token", "sequence_sum", "sequence_mean"])
@pytest.mark.parametrize("clip", ["ppo", "cispo", "sapo"])
def test_corrections(backend, correction, correction_level, clip):
    new, old, advantages, mask, ref, entropy = batch(dtype=widest(backend))
    rollout = old + 0.3 * torch.randn_like(old)
    chosen = (correction, correction_level, 0.8, 1.2)
    expected = plain(
        new, old, advantages, mask, ref, entropy, clip=clip, rollout=rollout, correction=chosen
    )
    with fk.use_backend(backend):
        loss, metrics = fk.policy_loss(
            new,
            old,
            advantages,
            mask,
            rollout_logprobs=torch.where(mask, rollout, torch.nan),
            clip=clip,
            correction=correction,
            correction_level=correction_level,
            correction_range=(0.8, 1.2),
        )
    assert_near(loss, expected)
    assert_near(grads(loss, new)[0], grads(expected, new)[0])
    rows = [row for row in range(6) if mask[row].any()]
    weights = [corrected(old[row, mask[row]], rollout[row, mask[row]], *chosen) for row in rows]
    assert_near(metrics["correction/weight"], torch.cat(weights).mean())
    if correction == "reject":
        assert_near(metrics["correction/clipfrac"], 1 - torch.cat(weights).mean())


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_against_float64(backend):
    new, old, advantages, mask, ref, entropy = batch(20, 50)
    narrow = [x.detach().float() for x in (new, old, advantages)]
    with fk.use_backend(backend):
        loss, _ = fk.policy_loss(*narrow, mask)
    assert loss.dtype == torch.float32
    # Rounding the inputs moves a log-ratio by 6e-8 * 3.
    torch.testing.assert_close(
        loss.double(), plain(new, old, advantages, mask, ref, entropy), atol=2e-6, rtol=2e-6
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_gradcheck(estimator):
    new, old, advantages, mask, ref, entropy = batch(3, 4)
    torch.autograd.gradcheck(
        lambda new, entropy: fk.policy_loss(
            new,
            old,
            advantages,
            mask,
            ref_logprobs=ref,
            entropy=entropy,
            kl_coef=0.3,
            kl_estimator=estimator,
            entropy_coef=0.1,
            ratio_level="sequence_mean",
            clip="none",
        )[0],
        (new, entropy),
    )


def pack(mask, *tensors):
    """Padded rows without their tail, laid end to end: all slots up to each row's last True."""
    lengths = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in mask]
    packed = [
        torch.cat([x[i, :length] for i, length in enumerate(lengths)]) for x in (mask, *tensors)
    ]
    return torch.tensor([0, *itertools.accumulate(lengths)]), *packed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("level", "aggregation"), list(itertools.product(LEVELS, AGGREGATIONS)))
def test_packed_equals_padded(backend, level, aggregation):
    new, old, advantages, mask, *_ = batch(dtype=widest(backend))
    options = {"ratio_level": level, "aggregation": aggregation}
    with fk.use_backend(backend):
        expected, metrics = fk.policy_loss(new, old, advantages, mask, **options)
        (gradient,) = grads(expected, new)
        for dtype in (torch.int32, torch.int64):
            cu_seqlens, flat_mask, *flat = pack(mask, new, old, advantages)
            loss, flat_metrics = fk.policy_loss(
                *flat, flat_mask, cu_seqlens=cu_seqlens.to(dtype), **options
            )
            assert_near(loss, expected)
            assert_near(grads(loss, new)[0], gradient)
            assert_near(flat_metrics, metrics)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), extra=st.integers(1, 4), data=st.data())
def test_padding_order_and_microbatches_change_nothing(seed, extra, data):
    torch.manual_seed(seed)
    num_sequences = data.draw(st.integers(2, 6))
    level, aggregation = (
        data.draw(st.sampled_from(LEVELS)),
        data.draw(st.sampled_from(AGGREGATIONS)),
    )
    new, old, advantages, mask, *_ = batch(num_sequences, 5)
    options = {"ratio_level": level, "aggregation": aggregation}
    whole, _ = fk.policy_loss(new, old, advantages, mask, **options)
    (expected,) = grads(whole, new)

    wider = [torch.nn.functional.pad(x, (0, extra), value=7) for x in (new, old, advantages)]
    wide_mask = torch.nn.functional.pad(mask, (0, extra))
    loss, _ = fk.policy_loss(*wider, wide_mask, **options)
    assert_near(loss, whole)
    assert_near(grads(loss, new)[0], expected)

    order = torch.randperm(num_sequences)
    loss, _ = fk.policy_loss(new[order], old[order], advantages[order], mask[order], **options)
    assert_near(loss, whole)
    assert_near(grads(loss, new)[0], expected)

    count = mask.sum() if aggregation == "token_mean" else mask.any(1).sum()
    cut = data.draw(st.integers(1, num_sequences - 1))
    parts = [
        fk.policy_loss(
            new[part], old[part], advantages[part], mask[part], denominator=count, **options
        )[0]
        for part in (slice(0, cut), slice(cut, None))
    ]
    assert_near(sum(parts), whole)
    assert_near(grads(sum(parts), new)[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", LEVELS)
def test_masked_values_leak_nothing(backend, level):
    new, old, advantages, mask, ref, entropy = batch(dtype=widest(backend))
    dirty = [torch.where(mask, x, torch.nan) for x in (new, old, advantages, ref, entropy)]
    leaf = dirty[0].detach().requires_grad_()
    options = {"kl_coef": 0.1, "entropy_coef": 0.1, "ratio_level": level}
    with fk.use_backend(backend):
        expected, metrics = fk.policy_loss(
            new, old, advantages, mask, ref_logprobs=ref, entropy=entropy, **options
        )
        loss, dirty_metrics = fk.policy_loss(
            leaf, *dirty[1:3], mask, ref_logprobs=dirty[3], entropy=dirty[4].detach(), **options
        )
    assert_near(loss, expected)
    assert_near(dirty_metrics, metrics)
    assert_near(grads(loss, leaf)[0], grads(expected, new)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("level", "aggregation"), list(itertools.product(LEVELS, AGGREGATIONS)))
def test_all_masked_is_zero(backend, level, aggregation):
    new = torch.full((2, 3), torch.nan, requires_grad=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for denominator in (None, torch.tensor(0.0), 5):
        with fk.use_backend(backend):
            loss, metrics = fk.policy_loss(
                new,
                new,
                new,
                nothing,
                ratio_level=level,
                aggregation=aggregation,
                denominator=denominator,
            )
        assert loss.item() == 0
        assert (grads(loss, new)[0] == 0).all()
        assert all(value.item() == 0 for value in metrics.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("level", "clip"), list(itertools.product(LEVELS, CLIPS)))
def test_huge_log_ratios_give_no_nan(backend, level, clip):
    new = torch.tensor([[0.0, -500.0, 0.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-900.0, 0.0, -900.0, -1.0]])
    for advantages in ([1.0, 1.0, 0.0, 1.0], [-1.0, 1.0, 0.0, -1.0]):
        with fk.use_backend(backend):
            loss, metrics = fk.policy_loss(
                new, old, torch.tensor([advantages]), old <= 0, ratio_level=level, clip=clip
            )
        assert loss.isfinite()
        assert grads(loss, new)[0].isfinite().all()
        assert not any(value.isnan() for value in metrics.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_huge_ratio_in_a_power_without_decay(backend):
    """vespo with a rate of 0 weighs by w^k alone: w is held like every ratio."""
    old = torch.tensor([[-900.0, -1.0]])
    new = (old + torch.tensor([[900.0, 0.0]])).requires_grad_()
    with fk.use_backend(backend):
        loss, _ = fk.policy_loss(
            new,
            old,
            torch.ones(1, 2),
            old < 0,
            clip="vespo",
            ratio_level="sequence_sum",
            vespo_gamma=((1.0, 0.0), (1.0, 0.0)),
        )
    assert loss.item() == pytest.approx(math.exp(40) / 2, rel=1e-5)
    torch.testing.assert_close(grads(loss, new)[0], torch.full((1, 2), -math.exp(40) / 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_retained_graph_gives_its_gradients_again(backend):
    new, old, advantages, mask, *_ = batch(dtype=torch.float32)
    with fk.use_backend(backend):
        loss, _ = fk.policy_loss(new, old, advantages, mask)
    (first,) = torch.autograd.grad(loss, new, retain_graph=True)
    expected = first.clone()
    first.zero_()
    (again,) = torch.autograd.grad(loss, new)
    assert torch.equal(again, expected)
    assert expected.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_not_differentiable_twice(backend):
    new, old, advantages, mask, *_ = batch(dtype=widest(backend))
    with fk.use_backend(backend):
        loss, _ = fk.policy_loss(new, old, advantages, mask)
    with pytest.raises(RuntimeError, match="cannot be differentiated once more"):
        torch.autograd.grad(loss, new, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("level", LEVELS)
def test_first_update_has_ratio_one(backend, level):
    _, old, advantages, mask, *_ = batch(dtype=widest(backend))
    new = old.clone().requires_grad_()
    with fk.use_backend(backend):
        loss, metrics = fk.policy_loss(new, old, advantages, mask, ratio_level=level)
    assert metrics["val/ratio"].item() == pytest.approx(1.0, abs=1e-7)
    assert metrics["policy/clipfrac"].item() == 0
    assert metrics["policy/approxkl"].item() == 0
    assert_near(loss, -advantages[mask].sum() / mask.sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics(backend):
    new, old, advantages, mask, ref, entropy = batch(dtype=widest(backend))
    with fk.use_backend(backend):
        _, metrics = fk.policy_loss(
            new,
            old,
            advantages,
            mask,
            ref_logprobs=ref,
            entropy=entropy,
            denominator=1000,
            kl_estimator="k1",
        )
    log_ratio = (new - old)[mask].detach()
    ratio, a = log_ratio.exp(), advantages[mask]
    unclipped, clipped = -ratio * a, -ratio.clamp(0.8, 1.2) * a
    expected = {
        "policy/loss": torch.max(unclipped, clipped).mean(),
        "policy/approxkl": 0.5 * log_ratio.square().mean(),
        "policy/clipfrac": (clipped > unclipped).to(widest(backend)).mean(),
        "val/ratio": ratio.mean(),
        "val/ratio_var": ratio.var(unbiased=False),
        "kl": (new - ref)[mask].mean().detach(),
        "entropy": entropy[mask].mean().detach(),
        "num_tokens": mask.sum().to(widest(backend)),
    }
    assert_near(metrics, expected)
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_advantage_a_sequence(backend):
    new, old, _, mask, *_ = batch(dtype=widest(backend))
    advantages = torch.randn(6, dtype=widest(backend))
    full = advantages.unsqueeze(1).expand(new.shape)
    cu_seqlens, flat_mask, *flat = pack(mask, new, old)
    with fk.use_backend(backend):
        expected, _ = fk.policy_loss(new, old, full, mask)
        loss, _ = fk.policy_loss(new, old, advantages, mask)
        packed, _ = fk.policy_loss(*flat, advantages, flat_mask, cu_seqlens=cu_seqlens)
    assert_near(loss, expected)
    assert_near(packed, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    new, old, advantages, mask, ref, entropy = batch(2, 3, torch.float32)
    with fk.use_backend(backend):
        opcheck(
            "policy_loss",
            new,
            old,
            advantages,
            mask,
            None,
            None,
            ref,
            entropy,
            old + 0.1,
            "sequence_mean",
            "ppo",
            0.2,
            0.2,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            5.0,
            "sequence_mean",
            0.1,
            "k3",
            4.0,
            0.01,
            "mask",
            "sequence_sum",
            0.5,
            2.0,
            True,
        )
        opcheck(
            "policy_loss",
            new.detach(),
            old,
            advantages,
            mask,
            torch.tensor(3.0),
            None,
            None,
            None,
            None,
            "token",
            "cispo",
            0.2,
            0.2,
            0.0,
            0.0,
            0.0,
            0.0,
            0.0,
            5.0,
            "token_mean",
            0.0,
            "k3",
            4.0,
            0.0,
            "none",
            "token",
            0.0,
            3.0,
            False,
        )


BAD = {
    "ref_logprobs is needed": {"kl_coef": 0.1},
    "entropy is needed": {"entropy_coef": 0.1},
    "ratio_level must be one of token": {"ratio_level": "word"},
    "clip must be one of": {"clip": "hard"},
    "aggregation must be one of": {"aggregation": "mean"},
    "kl_estimator must be one of": {"kl_estimator": "k4"},
    "clip_range must be .*-0.1": {"clip_range": -0.1},
    "dual_clip must be .*above 1": {"dual_clip": 1.0},
    "dual_clip goes with": {"dual_clip": 3.0, "clip": "none"},
    "denominator must be .*above 0": {"denominator": 0},
    "denominator must be a number or a 0-d": {"denominator": torch.ones(2)},
    "loss_mask must be a bool": {"loss_mask": torch.ones(2, 3)},
    "logprobs must have shape": {"logprobs": torch.zeros(2, 4)},
    "advantages must have shape": {"advantages": torch.zeros(3)},
    "cu_seqlens goes with packed": {"cu_seqlens": torch.tensor([0, 6])},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    arguments = {
        "new_logprobs": torch.zeros(2, 3),
        "logprobs": torch.zeros(2, 3),
        "advantages": torch.zeros(2, 3),
        "loss_mask": torch.ones(2, 3, dtype=torch.bool),
    }
    with pytest.raises(ValueError, match=message):
        fk.policy_loss(**(arguments | BAD[message]))


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 4, 3, 5]), "must not decrease"),
        (torch.tensor([0, 4]), "must run from 0 to 5"),
        (torch.tensor([1, 5]), "must run from 0 to 5"),
        (torch.tensor([0.0, 5.0]), "must be int32 or int64"),
        (None, "cu_seqlens is needed"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens, message):
    x = torch.zeros(5)
    with pytest.raises(ValueError, match=message):
        fk.policy_loss(x, x, x, x == 0, cu_seqlens=cu_seqlens, ratio_level="sequence_mean")

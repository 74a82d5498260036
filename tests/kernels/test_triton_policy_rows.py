"""The fused policy rows: statistics, loss slope and gradient in one launch."""

from importlib import import_module

import pytest
import torch
from kernel_testing import assert_error_rule

from fuserl_kernels import triton_runtime
from fuserl_kernels.reference.logprobs import token_logprobs_bwd, token_logprobs_fwd
from fuserl_kernels.reference.policy import PolicyOptions, policy_loss_fwd

pytestmark = pytest.mark.skipif(
    triton_runtime.why_absent() is not None, reason="Triton cannot run here"
)
policy_rows_triton = import_module("fuserl_kernels.triton_policy_rows").policy_rows_triton
forward_triton = import_module("fuserl_kernels.token_logprobs").forward_triton
DEVICE = triton_runtime.device_type()
UNCORRECTED = ("none", "token", 0.0, 0.0)


PLAIN = PolicyOptions(
    ratio_level="token",
    clip="ppo",
    clip_low=0.2,
    clip_high=0.28,
    dual_clip=0.0,
    gate_pos=1.0,  # of sapo; nobody else reads them
    gate_neg=1.05,
    gate_rate_pos=0.0,
    gate_rate_neg=0.0,
    log_ratio_clip=0.0,
    aggregation="token_mean",
    kl_coef=0.05,
    kl_estimator="k3",
    kl_clip=0.0,
    entropy_coef=0.0,
)


def example(num_rows=7, vocab_size=2500):
    logits = torch.randn(num_rows, vocab_size, device=DEVICE) * 3
    token_ids = torch.randint(0, vocab_size, (num_rows,), device=DEVICE)
    temperatures = torch.rand(num_rows, device=DEVICE) + 0.5
    new, _, _ = token_logprobs_fwd(logits, token_ids, temperatures, 1.0, 0.0, None, False)
    # Ratios on both sides of the clip, advantages of both signs, and one row without weight.
    old, ref = new + 0.5 * torch.randn(2, num_rows, device=DEVICE)
    old[0], ref[1] = new[0] - 60.0, new[1]  # a ratio past its bound; a divergence of about 0
    advantages = 2 * torch.randn(num_rows, device=DEVICE)
    weights = torch.rand(num_rows, device=DEVICE)
    weights[2] = 0.0
    return logits, token_ids, temperatures, old, advantages, weights, ref


def expected(logits, token_ids, temperatures, softcap, old, advantages, weights, ref, chosen):
    """The same through the reference, in the dtype of logits."""
    dtype = logits.dtype
    new, entropy, stats = token_logprobs_fwd(
        logits, token_ids, temperatures, 1.0, softcap, None, True
    )
    *_, g, h = policy_loss_fwd(
        new,
        old.to(dtype),
        advantages.to(dtype),
        torch.ones_like(new, dtype=torch.bool),
        new.new_ones(()),
        None,
        None if ref is None else ref.to(dtype),
        entropy,
        None,
        *chosen,
        *UNCORRECTED,
        True,
    )
    weights = weights.to(dtype)
    gradient = token_logprobs_bwd(
        logits, token_ids, temperatures, 1.0, softcap, None, stats, entropy, g * weights,
        h * weights,
    )  # fmt: skip
    return new, entropy, gradient


@pytest.mark.parametrize("clip", ["ppo", "cispo", "sapo", "none"])
@pytest.mark.parametrize(
    ("has_ref", "softcap", "changes"),
    [
        (False, 0.0, {}),
        (True, 0.0, {"kl_estimator": "k1", "dual_clip": 3.0, "entropy_coef": 0.01}),
        (True, 20.0, {"kl_estimator": "k2", "entropy_coef": 0.01, "kl_clip": 0.1}),
        (True, 0.0, {"kl_estimator": "k3", "dual_clip": 1.5, "kl_clip": 0.1}),
        (True, 0.0, {"kl_estimator": "abs", "log_ratio_clip": 0.3}),
    ],
)
def test_gradient_of_the_policy_loss(clip, has_ref, softcap, changes):
    logits, token_ids, temperatures, old, advantages, weights, ref = example()
    advantages[0] = -advantages[0].abs()
    chosen = PLAIN._replace(clip=clip, **changes)
    rest = (old, advantages, weights, ref if has_ref else None, chosen)
    truth = expected(logits.double(), token_ids, temperatures, softcap, *rest)
    peer = expected(logits, token_ids, temperatures, softcap, *rest)
    out = logits.clone()
    new, entropy = policy_rows_triton(out, token_ids, temperatures, 1.0, softcap, *rest, out)
    assert_error_rule(new, peer[0], truth[0], 4e-6)
    assert_error_rule(entropy, peer[1], truth[1], 4e-6)
    # A row's gradient may be as large as its ratio: judge each against its own size.
    for mine, other, true in zip(out, peer[2], truth[2], strict=True):
        size = float(true.abs().max())
        assert_error_rule(mine, other, true, 1e-5 * size)
    assert (out[2] == 0).all()


@pytest.mark.parametrize("vocab_size", [100, 9001])
def test_bf16_over_fp32_and_the_bits_of_token_logprobs(vocab_size):
    logits, token_ids, temperatures, *rest = example(5, vocab_size)
    rest = (*rest, PLAIN._replace(entropy_coef=0.01))
    new, entropy, _ = forward_triton(logits, token_ids, temperatures, 1.0, 0.0, None, True)
    narrow = torch.empty(5, vocab_size, dtype=torch.bfloat16, device=DEVICE)
    results = [policy_rows_triton(logits, token_ids, temperatures, 1.0, 0.0, *rest, narrow)]
    overlay = logits.view(torch.bfloat16)[:, :vocab_size]
    results.append(policy_rows_triton(logits, token_ids, temperatures, 1.0, 0.0, *rest, overlay))
    assert torch.equal(overlay, narrow)
    for mine in results:
        assert torch.equal(mine[0], new)
        assert torch.equal(mine[1], entropy)


def test_a_row_does_not_depend_on_its_batch():
    logits, token_ids, temperatures, *rest = example()
    one = slice(4, 5)
    whole, alone = torch.empty_like(logits), torch.empty_like(logits[one])
    chosen = PLAIN
    first = policy_rows_triton(logits, token_ids, temperatures, 1.0, 0.0, *rest, chosen, whole)
    second = policy_rows_triton(
        logits[one], token_ids[one], temperatures[one], 1.0, 0.0, *(x[one] for x in rest), chosen,
        alone,
    )  # fmt: skip
    assert torch.equal(whole[one], alone)
    assert torch.equal(first[0][one], second[0])


def test_a_nan_is_not_hidden_by_the_clip():
    logits, token_ids, temperatures, *rest = example(3)
    logits[0, 100] = torch.nan
    out = torch.empty_like(logits)
    new, _ = policy_rows_triton(logits, token_ids, temperatures, 1.0, 0.0, *rest, PLAIN, out)
    assert new[0].isnan()
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


def test_no_rows_and_a_level_that_needs_other_rows():
    logits, token_ids, _, *rest = example(3)
    none = [x[:0] for x in (logits, token_ids, *rest)]
    new, entropy = policy_rows_triton(none[0], none[1], None, 1.0, 0.0, *none[2:], PLAIN, none[0])
    assert new.shape == entropy.shape == (0,)
    with pytest.raises(ValueError, match="ratio_level must be token"):
        policy_rows_triton(
            logits,
            token_ids,
            None,
            1.0,
            0.0,
            *rest,
            PLAIN._replace(ratio_level="sequence_mean"),
            logits,
        )

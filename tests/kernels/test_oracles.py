"""The log-probability ops against the functions other projects publish: the same numbers, values
and gradients, on inputs where those functions are themselves exact (float32, no -inf)."""

from pathlib import Path

import pytest
import torch

import fuserl_kernels as fk

REASON = "an optional oracle: pip install '.[oracles]'"
N, D, V = 24, 17, 211


def rows():
    hidden = torch.randn(N, D, requires_grad=True)
    weight = (0.7 * torch.randn(V, D)).requires_grad_()
    return hidden, weight, torch.randn(V, requires_grad=True), torch.randint(V, (N,))


def assert_same(ours, theirs, leaves):
    """Values, and the gradients under one random weighting."""
    g = torch.randn_like(theirs)
    torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=1e-5)
    for got, want in zip(
        torch.autograd.grad(ours, leaves, g),
        torch.autograd.grad(theirs, leaves, g),
        strict=True,
    ):
        torch.testing.assert_close(got, want, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_equal_trl(temperature):
    utils = pytest.importorskip("trl.trainer.utils", reason=REASON)
    logits, token_ids = torch.randn(4, 6, V, requires_grad=True), torch.randint(V, (4, 6))
    ours = fk.token_logprobs(logits, token_ids, temperature=temperature)
    theirs = utils.selective_log_softmax(logits, token_ids, temperature)
    assert_same(ours, theirs, [logits])


def test_entropy_equals_trl():
    utils = pytest.importorskip("trl.trainer.utils", reason=REASON)
    logits, token_ids = torch.randn(4, 6, V), torch.randint(V, (4, 6))
    _, entropy = fk.token_logprobs(logits, token_ids, return_entropy=True)
    torch.testing.assert_close(entropy, utils.entropy_from_logits(logits), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_linear_token_logprobs_equal_trl(softcap):
    kernels = pytest.importorskip("trl.kernels", reason=REASON)
    hidden, weight, bias, token_ids = rows()
    ours = fk.linear_token_logprobs(
        hidden, weight, token_ids, bias=bias, temperature=0.8, softcap=softcap
    )
    theirs, *_ = kernels.ChunkedLogProbFunction.apply(
        hidden, weight, bias, token_ids, 0.8, 64, softcap
    )
    assert_same(ours, theirs, [hidden, weight, bias])


def test_linear_token_logprobs_equal_liger():
    liger = pytest.importorskip("liger_kernel.chunked_loss.fused_linear_ppo", reason=REASON)
    hidden, weight, bias, token_ids = rows()
    ours = fk.linear_token_logprobs(hidden, weight, token_ids, bias=bias, temperature=0.8)
    theirs = liger._ChunkedSelectiveLogProbFunction.apply(hidden, weight, token_ids, bias, 0.8, 64)
    assert_same(ours, theirs, [hidden, weight, bias])


OPTIONS = {
    "dapo": ({"loss_type": "dapo"}, {}),
    "grpo": ({"loss_type": "grpo"}, {"aggregation": "sequence_mean"}),
    "clip higher": ({"epsilon_high": 0.28}, {"clip_range_high": 0.28}),
    "kl in the loss": ({"beta": 0.1}, {"kl_coef": 0.1, "kl_estimator": "k3"}),
    "sequence ratio": (
        {"importance_sampling_level": "sequence", "loss_type": "grpo"},
        {"ratio_level": "sequence_mean", "aggregation": "sequence_mean"},
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_linear_policy_loss_equals_liger(name):
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss", reason=REASON)
    theirs_options, ours_options = OPTIONS[name]
    hidden = torch.randn(4, 6, D, requires_grad=True)
    weight = (0.7 * torch.randn(V, D)).requires_grad_()
    token_ids = torch.randint(V, (4, 6))
    mask = torch.arange(6) < torch.tensor([[6], [3], [5], [1]])
    current = fk.linear_token_logprobs(hidden, weight, token_ids).detach()
    old, ref = (current + 0.3 * torch.randn_like(current) for _ in range(2))
    advantages = torch.randn(4)
    options = {"beta": 0.0, "loss_type": "dapo", "compiled": False, "temperature": 0.9}
    theirs, _ = liger.LigerFusedLinearGRPOLoss(**{**options, **theirs_options})(
        hidden,
        weight,
        token_ids,
        mask.float(),
        advantages,
        ref_per_token_logps=ref,
        old_per_token_logps=old,
    )
    ours, _ = fk.linear_policy_loss(
        hidden,
        weight,
        token_ids,
        old,
        advantages,
        mask,
        ref_logprobs=ref,
        temperature=0.9,
        **ours_options,
    )
    assert_same(ours, theirs, [hidden, weight])


def test_the_socket_in_the_documentation(monkeypatch):
    """The code that docs/kernels.md gives for TRL, run as it stands there."""
    utils = pytest.importorskip("trl.trainer.utils", reason=REASON)
    theirs = utils._ChunkedLogProbFunction
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", theirs)  # put back at the end
    monkeypatch.setattr(utils, "selective_log_softmax", utils.selective_log_softmax)
    exec(page.split("```python\n")[1].split("```")[0], {})
    hidden, weight, bias, token_ids = rows()
    arguments = (hidden, weight, bias, token_ids, 0.8, 64, 5.0, 0.5)
    ours = utils._ChunkedLogProbFunction.apply(*arguments)
    want = theirs.apply(*arguments)
    torch.testing.assert_close(ours[1], want[1], atol=3e-6, rtol=1e-5)
    assert_same(ours[0], want[0], [hidden, weight, bias])
    logits, mask = torch.randn(2, 3, V), torch.tensor([[1, 1, 0], [1, 0, 0]])
    got = utils.selective_log_softmax(logits, token_ids[:6].view(2, 3), 0.9, mask)
    plain = (logits / 0.9).log_softmax(-1).gather(-1, token_ids[:6].view(2, 3, 1)).squeeze(-1)
    torch.testing.assert_close(got, plain * mask)

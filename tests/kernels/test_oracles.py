"""The ops against the functions other projects publish: the same numbers, values and gradients, on
inputs where those functions are themselves exact (float32, no -inf)."""

import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from kernel_testing import ragged_mask

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


# --- the losses of TRL's trainers: their own methods, on a stand-in for the trainer

B, T, MAX_LENGTH = 6, 8, 11


def stand_in(**options):
    """What the loss methods of TRL's trainers read of `self`, on one process."""
    given = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1}
    given |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    given |= {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0}
    given |= {"vespo_lambda_neg": 2.0, "center_rewards_coefficient": None}
    given = {name: options.pop(name, default) for name, default in given.items()}
    accelerator = SimpleNamespace(
        num_processes=1,
        sync_gradients=True,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    defaults = {
        "args": SimpleNamespace(**given),
        "accelerator": accelerator,
        "model": SimpleNamespace(training=True),
        "_metrics": {"train": defaultdict(list)},
        "aux_loss_enabled": False,
        "_total_train_tokens": 0,
        "_tp_size": 1,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "loss_type": "dapo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": MAX_LENGTH,
        "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False,
    }
    return SimpleNamespace(**{**defaults, **options})


def policy_inputs(empty_row=True):
    """new, old and reference log-probabilities, entropy, a ragged mask with holes, advantages of
    each sequence."""
    mask = ragged_mask(B, T, holes=True)
    mask[2] = True
    if not empty_row:
        mask[:, 0] = True
    new = (-3 * torch.rand(B, T)).requires_grad_()
    old, ref = (new.detach() + 0.3 * torch.randn(B, T) for _ in range(2))
    entropy = torch.rand(B, T, requires_grad=True)
    return new, old, ref, entropy, mask, torch.tensor([1.0, -0.5, 0.7, -1.0, -1.2, 0.4])


def trainer_loss(trainer, self, new, entropy, mask, advantages, **inputs):
    """trainer._compute_loss with the model's outputs given."""
    self._get_per_token_logps_and_entropies = lambda *_, **__: (new, entropy, None)
    self.get_gamma_weights = getattr(trainer, "get_gamma_weights", None)
    ids = torch.zeros_like(mask, dtype=torch.int64)
    completion_mask = torch.arange(T) <= torch.where(mask, torch.arange(T), -1).amax(-1)[:, None]
    inputs = {
        "prompt_ids": ids[:, :2],
        "prompt_mask": ids[:, :2] + 1,
        "completion_ids": ids,
        "completion_mask": completion_mask.long(),
        "tool_mask": mask.long(),
        "num_items_in_batch": mask.sum(),
        "advantages": advantages,
        **inputs,
    }
    loss = trainer._compute_loss(self, None, inputs)
    return loss, {name: values[0] for name, values in self._metrics["train"].items()}


MEAN = {"aggregation": "sequence_mean", "denominator": B}  # TRL counts a row without a token
SUM = {"aggregation": "sequence_sum", "denominator": B}
SEQUENCE = {"importance_sampling_level": "sequence"}
CISPO = {"clip": "cispo", "clip_range": 1.0, "clip_range_high": 0.5}  # no lower bound
TRL_LOSSES = {
    "dapo": ({"loss_type": "dapo"}, {}),
    "bnpo": ({"loss_type": "bnpo"}, {}),
    "grpo": ({"loss_type": "grpo"}, MEAN),
    "dr_grpo": (
        {"loss_type": "dr_grpo"},
        {"aggregation": "sequence_sum", "denominator": B * MAX_LENGTH},
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.5}, CISPO),
    "sapo": ({"loss_type": "sapo"}, {"clip": "sapo", **MEAN}),
    "sapo, other temperatures": (
        {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 5.0},
        {"clip": "sapo", "sapo_temperatures": (2.0, 5.0), **MEAN},
    ),
    "luspo": ({"loss_type": "luspo", **SEQUENCE}, {"ratio_level": "sequence_mean", **SUM}),
    "luspo of tokens": ({"loss_type": "luspo"}, SUM),
    "vespo": ({"loss_type": "vespo"}, {"clip": "vespo", "ratio_level": "sequence_sum"}),
    "vespo, other gates": (
        {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_neg": 0.5},
        {
            "clip": "vespo",
            "vespo_gamma": ((1.0, 3.0), (3.0, 0.5)),
            "ratio_level": "sequence_sum",
        },
    ),
    "gspo": ({"loss_type": "grpo", **SEQUENCE}, {"ratio_level": "sequence_mean", **MEAN}),
    "sequence ratio, token mean": (SEQUENCE, {"ratio_level": "sequence_mean"}),
    "cispo, sequence ratio": (
        {"loss_type": "cispo", "epsilon_high": 1.5, **SEQUENCE},
        {"ratio_level": "sequence_mean", **CISPO},
    ),
    "sapo, sequence ratio": (
        {"loss_type": "sapo", **SEQUENCE},
        {"clip": "sapo", "ratio_level": "sequence_mean", **MEAN},
    ),
    "clip higher": ({"epsilon_high": 0.28}, {"clip_range_high": 0.28}),
    "clip on two sides": ({"delta": 1.3}, {"dual_clip": 1.3}),
    "clip on two sides, sequence ratio": (
        {"delta": 1.2, "epsilon_low": 0.1, "epsilon_high": 0.1, **SEQUENCE},
        {"dual_clip": 1.2, "clip_range": 0.1, "ratio_level": "sequence_mean"},
    ),
}


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("name", TRL_LOSSES)
def test_policy_loss_equals_trl(name, beta):
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason=REASON).GRPOTrainer
    theirs_options, ours_options = TRL_LOSSES[name]
    new, old, ref, entropy, mask, advantages = policy_inputs()
    theirs, logged = trainer_loss(
        trainer,
        stand_in(**theirs_options, beta=beta),
        new,
        entropy,
        mask,
        advantages,
        old_per_token_logps=old,
        ref_per_token_logps=ref,
    )
    ours, metrics = fk.policy_loss(
        new, old, advantages, mask, ref_logprobs=ref, kl_coef=beta, entropy=entropy, **ours_options
    )
    assert_same(ours, theirs, [new])
    assert metrics["entropy"].item() == pytest.approx(logged["entropy"], rel=1e-5)
    if beta:
        assert metrics["kl"].item() == pytest.approx(logged["kl"], rel=1e-5)
    if "clip_ratio/region_mean" in logged and "sequence" not in str(theirs_options):
        clipped = logged["clip_ratio/region_mean"]
        assert clipped > 0.1, "nothing was clipped"
        if "delta" not in theirs_options:  # TRL leaves what delta bounds out of its count
            assert metrics["policy/clipfrac"].item() == pytest.approx(clipped, rel=1e-5)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_the_denominator_of_an_optimizer_step_equals_trl(loss_type):
    """100 tokens were generated for 5 microbatches, of which a step takes 2: 40 to the step."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason=REASON).GRPOTrainer
    theirs_options, ours_options = TRL_LOSSES[loss_type]
    new, old, _, entropy, mask, advantages = policy_inputs()
    theirs, _ = trainer_loss(
        trainer,
        stand_in(**theirs_options, current_gradient_accumulation_steps=2, steps_per_generation=5),
        new,
        entropy,
        mask,
        advantages,
        old_per_token_logps=old,
        num_items_in_batch=torch.tensor(100),
    )
    ours, _ = fk.policy_loss(new, old, advantages, mask, denominator=40, **ours_options)
    assert_same(ours, theirs, [new])


def test_policy_loss_with_an_entropy_bonus_equals_trl():
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason=REASON).GRPOTrainer
    new, old, _, entropy, mask, advantages = policy_inputs()
    self = stand_in(_entropy_bonus_enabled=True, entropy_coef=0.3)
    theirs, _ = trainer_loss(trainer, self, new, entropy, mask, advantages, old_per_token_logps=old)
    ours, _ = fk.policy_loss(new, old, advantages, mask, entropy=entropy, entropy_coef=0.3)
    assert_same(ours, theirs, [new, entropy])


def test_policy_loss_with_advantages_of_tokens_equals_trl():
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason=REASON).GRPOTrainer
    new, old, _, entropy, mask, _ = policy_inputs()
    advantages = torch.randn(B, T)
    theirs, _ = trainer_loss(
        trainer, stand_in(), new, entropy, mask, advantages, old_per_token_logps=old
    )
    ours, _ = fk.policy_loss(new, old, advantages, mask)
    assert_same(ours, theirs, [new])


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "cispo", "sapo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("correction", ["truncate", "mask"])
def test_corrections_equal_trl(correction, level, loss_type):
    """TRL hands its loss the bounded ratio of old and sampling policy; here it is formed as its
    trainer forms it, within [.7, 1.4]. The KL is not corrected."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason=REASON).GRPOTrainer
    theirs_options, ours_options = TRL_LOSSES[loss_type]
    new, old, ref, entropy, mask, advantages = policy_inputs()
    rollout = old + 0.4 * torch.randn(B, T)
    difference = torch.where(mask, old - rollout, 0)
    ratio = (difference if level == "token" else difference.sum(-1, keepdim=True)).exp()
    outside = (ratio < 0.7) | (ratio > 1.4)
    assert 0 < int(outside.sum()) < outside.numel()
    bounded = ratio.clamp(0.7, 1.4) if correction == "truncate" else ratio.masked_fill(outside, 0)
    theirs, _ = trainer_loss(
        trainer,
        stand_in(**theirs_options, beta=0.1, use_vllm=True),
        new,
        entropy,
        mask,
        advantages,
        old_per_token_logps=old,
        ref_per_token_logps=ref,
        importance_sampling_ratio=bounded,
    )
    ours, _ = fk.policy_loss(
        new,
        old,
        advantages,
        mask,
        ref_logprobs=ref,
        kl_coef=0.1,
        rollout_logprobs=rollout,
        correction=correction,
        correction_level="token" if level == "token" else "sequence_sum",
        correction_range=(0.7, 1.4),
        **ours_options,
    )
    assert_same(ours, theirs, [new])


def test_vespo_of_another_sampler_equals_trl():
    """TRL multiplies the ratio to the sampling policy into its gate; here `logprobs` are those of
    the sampling policy."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason=REASON).GRPOTrainer
    new, old, _, entropy, mask, advantages = policy_inputs()
    rollout = old + 0.2 * torch.randn(B, T)
    theirs, _ = trainer_loss(
        trainer,
        stand_in(loss_type="vespo", use_vllm=True),
        new,
        entropy,
        mask,
        advantages,
        old_per_token_logps=old,
        importance_sampling_ratio=torch.where(mask, old - rollout, 0).exp(),
    )
    ours, _ = fk.policy_loss(
        new, rollout, advantages, mask, clip="vespo", ratio_level="sequence_sum"
    )
    assert_same(ours, theirs, [new])


def test_the_gates_of_vespo_equal_trl():
    """The gradient of sum(log-probability) is minus gate times advantage."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason=REASON).GRPOTrainer
    new, old, _, _, mask, advantages = policy_inputs()
    theirs = trainer.get_gamma_weights(advantages[:, None], (new - old).detach(), mask.int(), None)
    loss, _ = fk.policy_loss(
        new, old, advantages, mask, clip="vespo", ratio_level="sequence_sum", denominator=1
    )
    (gradient,) = torch.autograd.grad(loss, new)
    gates = (-gradient / advantages[:, None])[mask]
    torch.testing.assert_close(gates, theirs.expand(B, T)[mask], atol=3e-6, rtol=1e-5)


def test_rejected_sequences_equal_trl():
    """TRL's off-policy mask at the first update of a batch: a sequence of negative advantage is
    dropped where the mean of log(sampling / policy) exceeds .1."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason=REASON).GRPOTrainer
    new, _, _, _, mask, _ = policy_inputs(empty_row=False)
    drift = torch.linspace(-0.4, 0.6, B)[:, None]
    rollout = new.detach() + drift + 0.05 * torch.randn(B, T)
    advantages = -torch.rand(B) - 0.1
    kept = trainer.get_off_policy_mask(advantages[:, None], new, rollout, mask.int(), 0.1)
    assert 0 < int(kept.sum()) < B
    loss, _ = fk.policy_loss(
        new,
        new.detach(),
        advantages,
        mask,
        rollout_logprobs=rollout,
        correction="reject",
        correction_level="sequence_mean",
        correction_range=(math.exp(-0.1), 1e9),
        denominator=1,
    )
    (gradient,) = torch.autograd.grad(loss, new)
    want = torch.where(mask, -advantages[:, None] * kept, 0)
    torch.testing.assert_close(gradient, want)


def test_the_loss_of_rloo_equals_trl():
    """One ratio a sequence, that of the whole completion."""
    trainer = pytest.importorskip("trl.trainer.rloo_trainer", reason=REASON).RLOOTrainer
    new, old, _, entropy, mask, advantages = policy_inputs(empty_row=False)
    theirs, logged = trainer_loss(
        trainer,
        stand_in(),
        new,
        entropy,
        mask,
        advantages,
        completion_mask=mask.long(),  # RLOOTrainer knows no tool mask
        old_logps=torch.where(mask, old, 0).sum(-1),
    )
    ours, _ = fk.policy_loss(new, old, advantages, mask, ratio_level="sequence_sum", **MEAN)
    assert 0 < logged["clip_ratio/region_mean"] < 1
    assert_same(ours, theirs, [new])


@pytest.mark.parametrize("center_coef", [0.0, 0.01])
@pytest.mark.parametrize("with_margin", [False, True])
def test_pairwise_loss_equals_trl(with_margin, center_coef):
    trainer = pytest.importorskip("trl.trainer.reward_trainer", reason=REASON).RewardTrainer
    scores = (3 * torch.randn(10, 1)).requires_grad_()
    margin = torch.rand(5) if with_margin else None
    self = stand_in(center_rewards_coefficient=center_coef or None)
    inputs = {"attention_mask": torch.ones(10, 3), **({"margin": margin} if with_margin else {})}
    theirs = trainer.compute_loss(self, lambda **_: SimpleNamespace(logits=scores), inputs)
    chosen, rejected = scores.squeeze(-1).chunk(2)
    ours, metrics = fk.pairwise_loss(chosen, rejected, margin=margin, center_coef=center_coef)
    assert_same(ours, theirs, [scores])
    logged = {name: values[0] for name, values in self._metrics["train"].items()}
    assert metrics["reward/accuracy"].item() == pytest.approx(logged["accuracy"])
    assert metrics["reward/margin"].item() == pytest.approx(logged["margin"], rel=1e-5)

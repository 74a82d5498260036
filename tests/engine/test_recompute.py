"""Old log-probabilities of the trainer's own: ratios begin at 1 whatever sampled, and weights
worked by hand correct what the sampler did otherwise."""

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import run_one

from fuserl.batch import RolloutBatch, ScoredBatch, ShapedBatch
from fuserl.config import RLConfig
from fuserl.conventions import conventions
from fuserl.data.examples import Prompt
from fuserl.metrics import read_metrics
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.optimizer import Optimizer
from fuserl.recompute import describe_recomputed, recompute
from fuserl.scoring import score
from fuserl.shaping import shape, whitened
from fuserl.stages.rl import RLTrainer
from fuserl.update import update

NUM = 8
CAP = 1.5
CORRECTIONS = pytest.mark.parametrize("correction", ["none", "token", "sequence", "mask"])
Gradients = dict[str, torch.Tensor]


def config(correction: str = "none", **options: Any) -> RLConfig:
    defaults: dict[str, Any] = {"learning_rate": 1e-2, "schedule": "constant", "warmup_share": 0.0}
    defaults |= {"num_epochs": 1, "old_logprobs": "recomputed"}
    if correction != "none":
        defaults |= {"importance_correction": correction, "importance_cap": CAP}
    return RLConfig(**{"model": "m", "data": "d", "out": "o", **defaults, **options})


@pytest.fixture
def policy(make_model: Callable[..., LanguageModel]) -> LanguageModel:
    return make_model(seed=1)


@pytest.fixture
def critic(make_scalar_model: Callable[..., ScalarModel]) -> ScalarModel:
    return make_scalar_model(seed=2)


@pytest.fixture
def scored(
    policy: LanguageModel,
    critic: ScalarModel,
    make_model: Callable[..., LanguageModel],
    make_prompts: Callable[..., list[Prompt]],
    make_batch: Callable[..., RolloutBatch],
) -> ScoredBatch:
    """Row 3 is left out. What the sampler says of its tokens is off by up to 0.7 nats."""
    prompts = make_prompts(NUM)
    sampled = make_batch(policy, prompts, max_new_tokens=12, seed=2)
    off = 1.4 * torch.rand(sampled.logprobs.shape, generator=torch.Generator().manual_seed(4)) - 0.7
    scores = torch.linspace(-2, 2, NUM)
    scores[3] = math.nan
    return score(
        dataclasses.replace(sampled, logprobs=sampled.logprobs + off),
        prompts,
        reward=lambda *_: scores,
        reference=make_model(seed=8),
        critic=critic,
        temperature=0.7,
        microbatch_size=4,
    )


def run(
    policy: LanguageModel, critic: ScalarModel | None, batch: ShapedBatch, options: RLConfig
) -> tuple[Gradients, dict[str, torch.Tensor]]:
    """Gradients of the first optimizer step, before clipping, and the metrics."""
    found: Gradients = {}

    class Look(Optimizer):
        def step(self) -> dict[str, torch.Tensor]:
            for module_name, module in modules.items():
                for name, parameter in module.named_parameters():
                    if parameter.grad is not None:
                        found.setdefault(f"{module_name}.{name}", parameter.grad.clone())
            return super().step()

    modules: dict[str, torch.nn.Module] = {"policy": copy.deepcopy(policy)}
    if critic is not None:
        modules["critic"] = copy.deepcopy(critic)
    look = Look(modules, options, total_steps=10)
    metrics = update(modules["policy"], modules.get("critic"), look, batch, options, seed=0)  # type: ignore[arg-type]
    return found, metrics


def assert_close(ours: Gradients, theirs: Gradients) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        scale = tensor.abs().max().item()
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=2e-5 * scale, msg=name)


def by_hand(policy: LanguageModel, batch: ScoredBatch) -> torch.Tensor:
    """[B, T], of one row at a time, with gradients; 0 where masked."""
    logprobs = torch.zeros(batch.logprobs.shape)
    for i in range(len(batch)):
        prompt = batch.prompts[i, : batch.prompt_lengths[i]].tolist()
        completion = batch.completions[i, : batch.completion_lengths[i]].tolist()
        logits = policy.logits(run_one(policy, prompt + completion)) / 0.7
        own = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(
            1, torch.tensor(completion)[:, None]
        )
        logprobs = logprobs.index_put(
            (torch.tensor(i), torch.arange(len(completion))), own.squeeze(1)
        )
    return torch.where(batch.loss_mask, logprobs, 0)


# --- the log-probabilities


@pytest.mark.parametrize("microbatch_size", [1, 3, 100])
def test_they_are_the_trainers_own(
    microbatch_size: int, policy: LanguageModel, scored: ScoredBatch
) -> None:
    found = recompute(scored, policy, config(microbatch_size=microbatch_size))
    assert not found.logprobs.requires_grad
    torch.testing.assert_close(found.logprobs, by_hand(policy, scored), rtol=1e-5, atol=1e-5)
    assert found.rollout_logprobs is not None
    assert torch.equal(found.rollout_logprobs, scored.logprobs)
    assert found.importance_weights is None
    assert scored.rollout_logprobs is None, "the batch handed in is not changed"


@pytest.mark.parametrize("preset", ["n+", "trlx", "verl"])
def test_the_first_ratio_is_one_whatever_sampled(
    preset: str, policy: LanguageModel, critic: ScalarModel, scored: ScoredBatch
) -> None:
    options = config(preset=preset, num_epochs=2, num_minibatches=2, microbatch_size=3)
    shaped = shape(recompute(scored, policy, options), options)
    _, metrics = run(policy, critic, shaped, options)
    assert metrics["first/val/ratio"].item() == pytest.approx(1.0, abs=1e-6)
    assert metrics["first/val/ratio_var"].item() == pytest.approx(0.0, abs=1e-11)
    assert metrics["first/policy/clipfrac_avg"].item() == 0.0
    assert not [name for name in metrics if name.startswith("sampling/")]
    _, metrics = run(policy, critic, shape(scored, options), options)
    assert metrics["first/val/ratio_var"].item() > 0.01, "the sampler's would not do"


def test_the_gap_is_that_of_the_whole_rollout(policy: LanguageModel, scored: ScoredBatch) -> None:
    options = config()
    found = describe_recomputed(recompute(scored, policy, options), options)
    gap = (by_hand(policy, scored) - scored.logprobs)[scored.loss_mask].detach()
    expected = {
        "sampling_logp_difference/mean": gap.abs().mean(),
        "sampling_logp_difference/max": gap.abs().max(),
        "importance_sampling_ratio/min": gap.exp().min(),
        "importance_sampling_ratio/mean": gap.exp().mean(),
        "importance_sampling_ratio/max": gap.exp().max(),
    }
    assert found.keys() == {f"sampling/{name}" for name in expected}
    for name, value in expected.items():
        torch.testing.assert_close(found[f"sampling/{name}"], value, rtol=1e-4, atol=1e-5)
    assert describe_recomputed(scored, config()) == {}


# --- the weights


@CORRECTIONS
def test_weights_by_hand(correction: str, policy: LanguageModel, scored: ScoredBatch) -> None:
    options = config(correction)
    batch = recompute(scored, policy, options)
    if correction == "none":
        assert batch.importance_weights is None
        return
    assert batch.importance_weights is not None
    wanted, changed = [], []
    for i in range(NUM):
        length = int(scored.completion_lengths[i]) if i != 3 else 0
        gaps = (batch.logprobs - scored.logprobs)[i, :length].tolist()
        if correction == "sequence":
            gaps = [math.fsum(gaps)] * length
        ratios = [math.exp(gap) for gap in gaps]
        if correction == "mask":
            weights = [r if 1 / CAP <= r <= CAP else 0.0 for r in ratios]
        else:
            weights = [min(r, CAP) for r in ratios]
        own = batch.importance_weights[i]
        torch.testing.assert_close(own[:length], torch.tensor(weights), rtol=1e-5, atol=1e-6)
        assert (own[length:] == 0).all()
        wanted += weights
        changed += [r != w for r, w in zip(ratios, weights, strict=True)]
    assert any(changed)
    assert not all(changed)
    metrics = describe_recomputed(batch, options)
    expected = {
        "min": min(wanted),
        "mean": sum(wanted) / len(wanted),
        "max": max(wanted),
        "truncated": sum(changed) / len(changed),
    }
    for name, value in expected.items():
        assert metrics[f"sampling/importance_weight/{name}"].item() == pytest.approx(value, 1e-5)


@CORRECTIONS
def test_a_batch_without_a_trained_token_is_no_nan(
    correction: str, policy: LanguageModel, scored: ScoredBatch
) -> None:
    options = config(correction)
    nothing = dataclasses.replace(scored, loss_mask=torch.zeros_like(scored.loss_mask))
    metrics = describe_recomputed(recompute(nothing, policy, options), options)
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("preset", ["n+", "trlx"])
@pytest.mark.parametrize("correction", ["token", "sequence", "mask"])
def test_the_loss_is_that_of_the_definition(
    correction: str,
    preset: str,
    policy: LanguageModel,
    critic: ScalarModel,
    scored: ScoredBatch,
    make_model: Callable[..., LanguageModel],
) -> None:
    """-(w * min(r A, clip(r) A)) with a policy that has moved, so that ratios clip; trlx whitens
    its advantages in the update, before the weights."""
    options = config(correction, preset=preset, microbatch_size=3)
    shaped = shape(recompute(scored, policy, options), options)
    moved = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter, other in zip(
            moved.parameters(), make_model(seed=9).parameters(), strict=True
        ):
            parameter.lerp_(other, 0.05)
    found, metrics = run(moved, critic, shaped, options)

    model = copy.deepcopy(moved)
    ratio = (by_hand(model, shaped) - shaped.logprobs).exp()
    advantages = shaped.advantages
    if preset == "trlx":
        advantages = whitened(shaped, conventions(options)).advantages
    unclipped, clipped = ratio * advantages, ratio.clamp(0.8, 1.2) * advantages
    loss = -(shaped.importance_weights * torch.minimum(unclipped, clipped))  # type: ignore[operator]
    loss = loss.sum() / shaped.loss_mask.sum()
    loss.backward()
    assert metrics["policy/clipfrac_avg"].item() > 0.05
    torch.testing.assert_close(metrics["loss/policy_avg"], loss.detach(), rtol=1e-4, atol=1e-6)
    theirs = {f"policy.{name}": p.grad for name, p in model.named_parameters()}
    assert_close({name: g for name, g in found.items() if name.startswith("policy")}, theirs)  # type: ignore[arg-type]

    unweighted, _ = run(
        moved, critic, dataclasses.replace(shaped, importance_weights=None), options
    )
    for name, gradient in unweighted.items():
        if name.startswith("critic"):
            assert torch.equal(found[name], gradient), "the critic's returns have no weight"
    with pytest.raises(AssertionError):
        assert_close(found, unweighted)


def test_without_a_correction_it_is_as_if_there_were_none(
    policy: LanguageModel, critic: ScalarModel, scored: ScoredBatch
) -> None:
    """No weights are weights of one, to the bit."""
    options = config()
    shaped = shape(recompute(scored, policy, options), options)
    ones = dataclasses.replace(shaped, importance_weights=torch.ones_like(shaped.logprobs))
    (ours, _), (theirs, _) = (run(policy, critic, batch, options) for batch in (shaped, ones))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@CORRECTIONS
def test_microbatches_change_nothing(
    correction: str, policy: LanguageModel, critic: ScalarModel, scored: ScoredBatch
) -> None:
    whole, cut = (config(correction, microbatch_size=size) for size in (100, 3))
    ours, theirs = (
        run(policy, critic, shape(recompute(scored, policy, options), options), options)[0]
        for options in (whole, cut)
    )
    assert_close(ours, theirs)


# --- the run


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_a_run_logs_the_phase_and_its_weights(
    algorithm: str, policy_folder: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    def train(name: str, **options: Any) -> list[dict[str, Any]]:
        RLTrainer(
            policy_folder,
            data=rows,
            reward=lambda completion_ids, **_: [float(ids[0]) for ids in completion_ids],
            out=tmp_path / name,
            algorithm=algorithm,
            steps=2,
            batch_size=6,
            max_new_tokens=5,
            **options,
        ).train()
        return list(read_metrics(tmp_path / name / "metrics.jsonl"))

    lines = train("weighted", old_logprobs="recomputed", importance_correction="token")
    for line in lines:
        assert line["seconds/recompute"] > 0
        assert line["first/val/ratio"] == pytest.approx(1.0, abs=1e-6)
        assert line["sampling/sampling_logp_difference/max"] < 1e-4
        assert line["sampling/importance_weight/mean"] == pytest.approx(1.0, abs=1e-4)
        assert line["sampling/importance_weight/truncated"] == 0
    for line in train("plain"):
        assert "seconds/recompute" not in line
        assert line["sampling/sampling_logp_difference/max"] < 1e-4
        assert not [name for name in line if name.startswith("sampling/importance_weight")]

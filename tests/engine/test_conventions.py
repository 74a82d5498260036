"""Presets in the loop: all names of the kernels' table, what the user sets wins, each minibatch is
whitened over what its project takes together, and padding still changes nothing."""

import copy
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fuserl_kernels as fk
from fuserl.batch import RolloutBatch, ScoredBatch, ShapedBatch
from fuserl.cli import parse
from fuserl.config import RLConfig
from fuserl.conventions import conventions
from fuserl.data.examples import Prompt
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.optimizer import Optimizer
from fuserl.scoring import score
from fuserl.shaping import shape, whitened
from fuserl.update import update

PROMPTS = [[5], [6, 7], [8, 9], [10]]
COMPLETIONS = [[11, 12, 2], [13, 14, 15, 16, 17], [2], [18, 19]]  # EOS: yes, no, yes, no
LIMIT = 5
PRESETS = pytest.mark.parametrize("preset", fk.PRESETS)


def config(preset: str, **options: Any) -> RLConfig:
    defaults = {"learning_rate": 1e-2, "schedule": "constant", "warmup_share": 0.0}
    return RLConfig(model="m", data="d", out="o", preset=preset, **{**defaults, **options})  # type: ignore[arg-type]


def make_scored(batch_of: Callable[..., RolloutBatch], width: int = LIMIT) -> ScoredBatch:
    """What stands in a slot does not depend on the width."""
    made = batch_of(PROMPTS, COMPLETIONS, width=width)
    generator = torch.Generator().manual_seed(3)
    noise, values = torch.randn(2, 4, LIMIT, generator=generator)
    padding = (0, width - LIMIT)
    noise = torch.where(made.loss_mask, torch.nn.functional.pad(noise, padding), 0.0)
    return ScoredBatch(
        **made.fields(),
        scores=torch.tensor([12.0, 2.0, -3.0, 4.0]),
        ref_logprobs=made.logprobs + noise,
        values=torch.nn.functional.pad(values, padding),
    )


# --- the configuration


def test_every_name_of_the_table_is_an_option() -> None:
    for preset in fk.PRESETS:
        flags = ["--model", "m", "--data", "d", "--out", "o", "--preset", preset]
        assert parse(RLConfig, flags, prog="rl").preset == preset
    with pytest.raises(ValueError, match=r"preset must be one of .*'verl'"):
        config("mine")


@PRESETS
def test_without_options_the_table_rules(preset: str) -> None:
    assert conventions(config(preset)) == fk.PRESETS[preset]


@PRESETS
def test_what_is_set_wins(preset: str) -> None:
    found = conventions(config(preset, clip_range=0.3, value_clip_range=0.7))
    want = dataclasses.replace(fk.PRESETS[preset], clip_range=0.3, value_clip_range=0.7)
    assert found == want


@PRESETS
def test_a_missing_eos_penalty_needs_a_rule(preset: str) -> None:
    """0 is a value like another, even where it is the default."""
    for penalty in (0.0, 2.0):
        if fk.PRESETS[preset].missing_eos is None:
            with pytest.raises(ValueError, match=f"makes no sense with preset {preset}"):
                config(preset, missing_eos_penalty=penalty)
        else:
            found = conventions(config(preset, missing_eos_penalty=penalty))
            assert found.missing_eos_penalty == penalty


# --- shaping


@PRESETS
def test_the_score_of_each_sequence(preset: str, batch_of: Callable[..., RolloutBatch]) -> None:
    batch = make_scored(batch_of)
    after = {  # clipped, then the missing-EOS rule
        "n+": [12.0, -1.0, -3.0, -1.0],
        "trl": [12.0, 2.0, -3.0, 4.0],
        "trlx": [10.0, 2.0, -3.0, 4.0],
        "openrlhf": [10.0, 2.0, -3.0, 4.0],
        "verl": [12.0, 2.0, -3.0, 4.0],
    }
    behind = preset in ("n+", "trl", "trlx")
    slots = [3, 4, 1, 2] if behind else [2, 4, 0, 1]  # row 1 is full
    for algorithm in ("ppo", "reinforce"):
        shaped = shape(batch, config(preset, algorithm=algorithm, kl_coef=0.0))
        assert shaped.applied_scores.tolist() == after[preset]
        assert shaped.rewards[torch.arange(4), slots].tolist() == after[preset]
        assert int(shaped.value_mask.sum()) == 11 + (3 if behind else 0)


def test_a_penalty_that_is_set_is_subtracted_by_trl(batch_of: Callable[..., RolloutBatch]) -> None:
    shaped = shape(make_scored(batch_of), config("trl", kl_coef=0.0, missing_eos_penalty=1.5))
    assert shaped.applied_scores.tolist() == [12.0, 0.5, -3.0, 2.5]


@PRESETS
def test_rewards_at_every_token_stand_where_they_are(
    preset: str, batch_of: Callable[..., RolloutBatch]
) -> None:
    batch = make_scored(batch_of)
    scores = torch.where(batch.loss_mask, batch.values, 0.0)  # type: ignore[arg-type]
    batch = dataclasses.replace(batch, scores=scores)
    shaped = shape(batch, config(preset, reward_at="token", kl_coef=0.0))
    torch.testing.assert_close(shaped.rewards, scores)
    assert torch.equal(shaped.value_mask, batch.loss_mask)


@PRESETS
def test_advantages_over_the_rollout(preset: str, batch_of: Callable[..., RolloutBatch]) -> None:
    """White over the trained tokens, with the project's variance, unless minibatches are."""
    batch = make_scored(batch_of)
    shaped = shape(batch, config(preset, gae_lambda=0.9))
    raw = (shaped.returns - batch.values)[batch.loss_mask]  # type: ignore[operator]
    if preset == "trlx":
        torch.testing.assert_close(shaped.advantages[batch.loss_mask], raw)
    else:
        spread = raw.std(correction=1 if preset in ("trl", "verl") else 0)
        white = (raw - raw.mean()) / spread
        torch.testing.assert_close(shaped.advantages[batch.loss_mask], white)


@pytest.mark.parametrize("width", [5, 9])
@pytest.mark.parametrize("left_out", [False, True])
def test_a_minibatch_of_trlx_by_hand(
    width: int, left_out: bool, batch_of: Callable[..., RolloutBatch]
) -> None:
    """Rows of 3, 1 and 2 tokens and the slot behind each: 4 columns, padding among them, whatever
    the rollout's width; a row without a trained token is as if it were not there."""
    options = config("trlx", gae_lambda=0.9)
    batch = make_scored(batch_of, width)
    if left_out:
        mask = batch.loss_mask & torch.tensor([[True], [False], [True], [True]])
        batch = dataclasses.replace(batch, loss_mask=mask)
    kept = torch.arange(4) if left_out else torch.tensor([0, 2, 3])
    shaped = shape(batch, options).select(kept)
    together = []
    for row in range(len(kept)):
        if shaped.loss_mask[row].any():
            slots = int(shaped.value_mask[row].sum())
            gains = shaped.returns[row, :slots] - shaped.values[row, :slots]  # type: ignore[index]
            together += gains.tolist() + [0.0] * (4 - slots)
    assert len(together) == 12
    mean, spread = statistics.mean(together), statistics.stdev(together)
    want = torch.where(shaped.loss_mask, (shaped.advantages - mean) / spread, 0.0)
    found = whitened(shaped, conventions(options))
    torch.testing.assert_close(found.advantages, want, rtol=1e-5, atol=1e-5)


# --- the update

Ready = tuple[LanguageModel, ScalarModel, ShapedBatch]


@pytest.fixture
def ready(
    make_model: Callable[..., LanguageModel],
    make_scalar_model: Callable[..., ScalarModel],
    make_prompts: Callable[..., list[Prompt]],
    make_batch: Callable[..., RolloutBatch],
) -> Callable[[RLConfig], Ready]:
    """Models and a shaped batch sampled by the policy."""
    policy, critic, prompts = make_model(seed=1), make_scalar_model(seed=2), make_prompts(8)
    scored = score(
        make_batch(policy, prompts, max_new_tokens=12, seed=2),
        prompts,
        reward=lambda *_: torch.linspace(-3, 3, 8),
        reference=make_model(seed=8),
        critic=critic,
        temperature=0.7,
        microbatch_size=8,
    )
    return lambda options: (policy, critic, shape(scored, options))


def after(policy: LanguageModel, critic: ScalarModel, batch: ShapedBatch, options: RLConfig) -> Any:
    """Gradients of each optimizer step and the metrics."""
    steps: list[dict[str, torch.Tensor]] = []

    class Look(Optimizer):
        def step(self) -> dict[str, torch.Tensor]:
            steps.append(
                {
                    f"{module_name}.{name}": p.grad.clone()
                    for module_name, module in modules.items()
                    for name, p in module.named_parameters()
                    if p.grad is not None
                }
            )
            return super().step()

    modules: dict[str, torch.nn.Module] = {"policy": copy.deepcopy(policy)}
    modules["critic"] = copy.deepcopy(critic)
    look = Look(modules, options, total_steps=10)
    metrics = update(modules["policy"], modules["critic"], look, batch, options, seed=0)  # type: ignore[arg-type]
    return steps, metrics


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        scale = tensor.abs().max().item()
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=2e-5 * scale, msg=name)


@PRESETS
def test_the_first_ratio_is_one(preset: str, ready: Callable[..., Ready]) -> None:
    options = config(preset, num_minibatches=2, num_epochs=2, microbatch_size=3)
    _, metrics = after(*ready(options), options)
    assert metrics["first/val/ratio"].item() == pytest.approx(1.0, abs=1e-5)
    assert all(value.isfinite() for value in metrics.values())


@PRESETS
def test_microbatches_change_nothing(preset: str, ready: Callable[..., Ready]) -> None:
    whole = config(preset, num_epochs=1, num_minibatches=2, microbatch_size=100)
    cut = dataclasses.replace(whole, microbatch_size=3)
    state = ready(whole)
    for ours, theirs in zip(after(*state, whole)[0], after(*state, cut)[0], strict=True):
        assert_close(ours, theirs)


def test_the_first_minibatch_of_trlx(ready: Callable[..., Ready]) -> None:
    """Its gradients are those of trl for advantages whitened here over the minibatch alone, and of
    a critic that learns at trained tokens alone."""
    options = config("trlx", num_epochs=1, num_minibatches=2)
    policy, critic, batch = ready(options)
    found = after(policy, critic, batch, options)[0]
    rows = torch.randperm(8, generator=torch.Generator().manual_seed(0))[:4]
    part = batch.select(rows)
    assert part.values is not None
    together = torch.where(part.value_mask, part.returns - part.values, 0.0)
    together = together[:, : int(part.value_mask.sum(1).max())]
    white = (part.advantages - together.mean()) / together.std()
    assert part.value_mask.sum() > part.loss_mask.sum()
    by_hand = dataclasses.replace(
        part,
        advantages=torch.where(part.loss_mask, white, 0.0),
        value_mask=part.loss_mask,
    )
    plain = config("trl", num_epochs=1)
    assert_close(found[0], after(policy, critic, by_hand, plain)[0][0])
    over_the_rollout = dataclasses.replace(by_hand, advantages=batch.advantages[rows])
    other = after(policy, critic, over_the_rollout, plain)[0][0]
    with pytest.raises(AssertionError):
        assert_close(found[0], other)


def test_a_dual_clip_is_dropped_where_nothing_clips(
    make_model: Callable[..., LanguageModel], ready: Callable[..., Ready]
) -> None:
    options = config("verl", algorithm="reinforce")
    policy, _, batch = ready(options)
    assert conventions(options).dual_clip is None
    look = Optimizer({"policy": copy.deepcopy(policy)}, options, total_steps=10)
    metrics = update(policy, None, look, batch, options, seed=0)
    assert metrics["policy/clipfrac_avg"].item() == 0.0


def test_the_values_may_move_as_far_as_the_preset_says(ready: Callable[..., Ready]) -> None:
    """Old values .4 off: beyond .2, within .5."""
    found = {}
    for preset in ("trl", "verl"):
        options = config(preset, num_epochs=1)
        policy, critic, batch = ready(options)
        assert batch.values is not None
        moved = dataclasses.replace(
            batch, values=batch.values + 0.4, returns=torch.full_like(batch.returns, -9.0)
        )
        found[preset] = after(policy, critic, moved, options)[1]["val/clipfrac_avg"].item()
    assert found == {"trl": 1.0, "verl": 0.0}

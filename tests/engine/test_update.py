"""The update: the first ratio is one, and how rows are cut, ordered or padded changes nothing."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from packed import run_one

from fuserl.batch import RolloutBatch, ShapedBatch
from fuserl.config import RLConfig
from fuserl.data.examples import Prompt
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.optimizer import Optimizer
from fuserl.scoring import score
from fuserl.shaping import shape
from fuserl.update import explained_variance, update

NUM = 10
ALGORITHMS = pytest.mark.parametrize(
    "algorithm", ["ppo", "reinforce", "reinforce_baseline", "grpo"]
)
Ready = tuple[LanguageModel, ScalarModel | None, ShapedBatch]


def config(algorithm: str, **options: Any) -> RLConfig:
    defaults = {"learning_rate": 1e-2, "schedule": "constant", "num_epochs": 1, "warmup_share": 0.0}
    if algorithm == "ppo":
        defaults["vf_coef"] = 0.5
    if algorithm == "grpo":
        defaults |= {"num_samples": 2, "kl_coef": 0.1}
    return RLConfig(
        **{"model": "m", "data": "d", "out": "o", "algorithm": algorithm, **defaults, **options}
    )


@pytest.fixture
def ready(
    make_model: Callable[..., LanguageModel],
    make_scalar_model: Callable[..., ScalarModel],
    make_prompts: Callable[..., list[Prompt]],
    make_batch: Callable[..., RolloutBatch],
) -> Callable[..., Ready]:
    """Models and a shaped batch sampled by the policy; some rows end early, one is left out."""

    def make(options: RLConfig, *, left_out: tuple[int, ...] = (3,)) -> Ready:
        policy = make_model(seed=1)
        critic = make_scalar_model(seed=2) if options.algorithm == "ppo" else None
        prompts = make_prompts(NUM)
        scores = torch.randn(NUM, generator=torch.Generator().manual_seed(5))
        scores[list(left_out)] = math.nan
        sampled = make_batch(
            policy, prompts, max_new_tokens=20, temperature=options.temperature, seed=2
        )
        batch = score(
            sampled,
            prompts,
            reward=lambda *_: scores,
            reference=make_model(seed=8),
            critic=critic,
            temperature=options.temperature,
            microbatch_size=4,
        )
        return policy, critic, shape(batch, options)

    return make


def after(
    policy: LanguageModel,
    critic: ScalarModel | None,
    batch: ShapedBatch,
    options: RLConfig,
    seed: int = 0,
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights after the update, made on copies, and its metrics."""
    modules: dict[str, torch.nn.Module] = {"policy": copy.deepcopy(policy)}
    if critic is not None:
        modules["critic"] = copy.deepcopy(critic)
    optimizer = Optimizer(modules, options, total_steps=10)
    metrics = update(
        modules["policy"],  # type: ignore[arg-type]
        modules.get("critic"),  # type: ignore[arg-type]
        optimizer,
        batch,
        options,
        seed=seed,
    )
    weights = {
        f"{name}.{key}": tensor
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }
    return weights, metrics


def gradients(
    policy: LanguageModel, critic: ScalarModel | None, batch: ShapedBatch, options: RLConfig
) -> dict[str, torch.Tensor]:
    """What one optimizer step is given, before clipping."""
    found: dict[str, torch.Tensor] = {}

    class Look(Optimizer):
        def step(self) -> dict[str, torch.Tensor]:
            for module_name, module in modules.items():
                for name, parameter in module.named_parameters():
                    if parameter.grad is not None:
                        found[f"{module_name}.{name}"] = parameter.grad.clone()
            return super().step()

    modules: dict[str, torch.nn.Module] = {"policy": copy.deepcopy(policy)}
    if critic is not None:
        modules["critic"] = copy.deepcopy(critic)
    look = Look(modules, options, total_steps=10)
    update(modules["policy"], modules.get("critic"), look, batch, options, seed=0)  # type: ignore[arg-type]
    return found


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        scale = tensor.abs().max().item()
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=2e-5 * scale, msg=name)


@ALGORITHMS
def test_the_first_ratio_is_one(algorithm: str, ready: Callable[..., Ready]) -> None:
    options = config(algorithm, num_epochs=3, num_minibatches=2, microbatch_size=3)
    _, metrics = after(*ready(options), options)
    assert metrics["first/val/ratio"].item() == pytest.approx(1.0, abs=1e-5)
    assert metrics["first/val/ratio_var"].item() == pytest.approx(0.0, abs=1e-9)
    assert metrics["first/policy/clipfrac_avg"].item() == 0.0
    assert metrics["first/policy/approxkl_avg"].item() == pytest.approx(0.0, abs=1e-9)
    assert metrics["val/ratio_var"].item() > 1e-6, "the weights moved after the first step"


@ALGORITHMS
@pytest.mark.parametrize("microbatch_size", [1, 3, 7])
def test_microbatches_change_nothing(
    algorithm: str, microbatch_size: int, ready: Callable[..., Ready]
) -> None:
    whole = config(algorithm, microbatch_size=100)
    cut = config(algorithm, microbatch_size=microbatch_size)
    state = ready(whole)
    assert_close(gradients(*state, whole), gradients(*state, cut))
    names = (
        "loss/policy_avg",
        "val/ratio",
        "policy/approxkl_avg",
        "policy/entropy_avg",
        "grad_norm/policy",
    )
    (_, ours), (_, theirs) = after(*state, whole), after(*state, cut)
    for name in names + (("loss/value_avg",) if algorithm == "ppo" else ()):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)


@ALGORITHMS
def test_the_order_of_the_rows_changes_nothing(algorithm: str, ready: Callable[..., Ready]) -> None:
    options = config(algorithm, microbatch_size=4)
    policy, critic, batch = ready(options)
    shuffled = batch.select(torch.randperm(NUM))
    assert_close(
        gradients(policy, critic, batch, options), gradients(policy, critic, shuffled, options)
    )


@ALGORITHMS
def test_padding_changes_nothing(algorithm: str, ready: Callable[..., Ready]) -> None:
    """Wider prompts and completions, with other ids in the padding."""
    options = config(algorithm, microbatch_size=4)
    policy, critic, batch = ready(options)

    def wide(tensor: torch.Tensor, by: int) -> torch.Tensor:
        fill = 7 if tensor.dtype == torch.int64 else 0
        return torch.nn.functional.pad(tensor, (0, by), value=fill)

    slots = torch.arange(batch.completions.shape[1])
    beyond = slots >= batch.completion_lengths[:, None]
    changes: dict[str, Any] = {"completions": wide(batch.completions.masked_fill(beyond, 7), 5)}
    changes["prompts"] = wide(batch.prompts, 3)
    for field in dataclasses.fields(batch):
        tensor = getattr(batch, field.name)
        if field.name not in ("completions", "prompts") and tensor is not None and tensor.ndim == 2:
            changes[field.name] = wide(tensor, 5)
    padded = dataclasses.replace(batch, **changes)
    assert_close(
        gradients(policy, critic, batch, options), gradients(policy, critic, padded, options)
    )


@ALGORITHMS
def test_what_was_left_out_has_no_gradient(algorithm: str, ready: Callable[..., Ready]) -> None:
    options = config(algorithm)
    policy, critic, batch = ready(options, left_out=(3, 6))
    assert batch.loss_mask.any(1).tolist() == [row not in (3, 6) for row in range(NUM)]
    kept = batch.select(batch.loss_mask.any(1).nonzero().squeeze(1))
    assert_close(
        gradients(policy, critic, batch, options), gradients(policy, critic, kept, options)
    )


@ALGORITHMS
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_no_trained_token_means_no_loss_and_no_gradient(
    algorithm: str, entropy_coef: float, ready: Callable[..., Ready]
) -> None:
    options = config(algorithm, num_epochs=2, microbatch_size=4, entropy_coef=entropy_coef)
    policy, critic, batch = ready(options, left_out=tuple(range(NUM)))
    assert not batch.loss_mask.any()
    for name, gradient in gradients(policy, critic, batch, options).items():
        assert (gradient == 0).all(), name
    weights, metrics = after(policy, critic, batch, options)
    assert metrics["loss/policy_avg"].item() == 0.0
    assert all(value.isfinite() for value in metrics.values())
    for name, tensor in policy.state_dict().items():
        assert torch.equal(weights[f"policy.{name}"], tensor), name


@ALGORITHMS
def test_the_gap_between_sampler_and_trainer(algorithm: str, ready: Callable[..., Ready]) -> None:
    """Of the first minibatch's trained tokens, a row that was left out in a microbatch of its own
    among them."""
    options = config(algorithm, microbatch_size=1, num_epochs=2, num_minibatches=2)
    policy, critic, batch = ready(options)
    rows = torch.randperm(NUM, generator=torch.Generator().manual_seed(0)).tensor_split(2)[0]
    assert not batch.loss_mask[rows].any(1).all(), "a row that trains nothing is among them"
    gap = torch.rand(batch.logprobs.shape, generator=torch.Generator().manual_seed(1)) - 0.8
    far = torch.where(batch.loss_mask, gap, 50.0)  # the trainer's are exact: the others move
    _, metrics = after(
        policy, critic, dataclasses.replace(batch, logprobs=batch.logprobs - far), options
    )
    want = gap[rows][batch.loss_mask[rows]]
    expected = {
        "sampling_logp_difference/mean": want.abs().mean(),
        "sampling_logp_difference/max": want.abs().max(),
        "importance_sampling_ratio/min": want.exp().min(),
        "importance_sampling_ratio/mean": want.exp().mean(),
        "importance_sampling_ratio/max": want.exp().max(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(metrics[f"sampling/{name}"], value, rtol=1e-4, atol=1e-5)
    assert not [name for name in metrics if "log_ratio" in name]


@ALGORITHMS
def test_a_sampler_that_is_the_trainer_leaves_no_gap(
    algorithm: str, ready: Callable[..., Ready]
) -> None:
    options = config(algorithm, microbatch_size=3, num_epochs=3)
    _, metrics = after(*ready(options), options)
    assert metrics["val/ratio_var"].item() > 1e-6, "the weights moved after the first step"
    assert metrics["sampling/sampling_logp_difference/max"].item() < 1e-5
    for end in ("min", "mean", "max"):
        ratio = metrics[f"sampling/importance_sampling_ratio/{end}"].item()
        assert ratio == pytest.approx(1.0, abs=1e-5)


def test_the_gradient_is_that_of_the_formula(ready: Callable[..., Ready]) -> None:
    """REINFORCE: - sum of advantage times log-probability over tokens, over their count."""
    options = config("reinforce", microbatch_size=3)
    policy, _, batch = ready(options)
    ours = gradients(policy, None, batch, options)
    model = copy.deepcopy(policy)
    total = torch.zeros(())
    for i in range(NUM):
        prompt = batch.prompts[i, : batch.prompt_lengths[i]].tolist()
        completion = batch.completions[i, : batch.completion_lengths[i]].tolist()
        logits = model.logits(run_one(model, prompt + completion))
        logprobs = (logits / options.temperature).log_softmax(-1)
        for t, token in enumerate(completion):
            if batch.loss_mask[i, t]:
                total = total - batch.advantages[i, t] * logprobs[len(prompt) - 1 + t, token]
    (total / batch.loss_mask.sum()).backward()
    theirs = {f"policy.{name}": p.grad for name, p in model.named_parameters()}
    assert_close(ours, theirs)  # type: ignore[arg-type]


@pytest.mark.parametrize("algorithm", ["grpo", "reinforce"])
@pytest.mark.parametrize("kl_coef", [0.0, 2.0])
def test_the_kl_of_the_loss_is_that_of_the_formula(
    kl_coef: float, algorithm: str, ready: Callable[..., Ready]
) -> None:
    """At the first update: - advantage + kl_coef * k3 against the reference, over tokens."""
    where = {"kl_in": "loss"} if kl_coef else {}
    options = config(algorithm, microbatch_size=3, kl_coef=kl_coef, **where)
    policy, _, batch = ready(options)
    assert batch.ref_logprobs is not None
    ours = gradients(policy, None, batch, options)
    model = copy.deepcopy(policy)
    loss, total_kl = torch.zeros(()), torch.zeros(())
    for i in range(NUM):
        prompt = batch.prompts[i, : batch.prompt_lengths[i]].tolist()
        completion = batch.completions[i, : batch.completion_lengths[i]].tolist()
        logits = model.logits(run_one(model, prompt + completion))
        logprobs = (logits / options.temperature).log_softmax(-1)
        for t, token in enumerate(completion):
            if batch.loss_mask[i, t]:
                own = logprobs[len(prompt) - 1 + t, token]
                d = own - batch.ref_logprobs[i, t]
                kl = (-d).exp() - 1 + d
                loss = loss - batch.advantages[i, t] * (own - batch.logprobs[i, t]).exp()
                loss = loss + kl_coef * kl
                total_kl = total_kl + kl.detach()
    num_tokens = batch.loss_mask.sum()
    (loss / num_tokens).backward()
    assert_close(ours, {f"policy.{name}": p.grad for name, p in model.named_parameters()})  # type: ignore[misc]
    _, metrics = after(policy, None, batch, options)
    assert ("loss/kl_avg" in metrics) is (kl_coef > 0)
    if kl_coef:
        torch.testing.assert_close(metrics["loss/kl_avg"], total_kl / num_tokens, rtol=1e-4, atol=0)


@pytest.mark.parametrize("vf_coef", [0.1, 1.0])
def test_the_critics_gradient_is_that_of_the_formula(
    vf_coef: float, ready: Callable[..., Ready]
) -> None:
    """At the first update no value has moved, so nothing is clipped: half the squared error over
    the value slots, the score's own among them."""
    options = config("ppo", vf_coef=vf_coef, microbatch_size=3)
    policy, critic, batch = ready(options)
    ours = gradients(policy, critic, batch, options)
    model = copy.deepcopy(critic)
    assert model is not None
    total = torch.zeros(())
    for i in range(NUM):
        prompt = batch.prompts[i, : batch.prompt_lengths[i]].tolist()
        completion = batch.completions[i, : batch.completion_lengths[i]].tolist()
        values = run_one(model, prompt + completion)
        for slot in batch.value_mask[i].nonzero().squeeze(1).tolist():
            error = values[len(prompt) - 1 + slot] - batch.returns[i, slot]
            total = total + 0.5 * error.square()
    assert batch.value_mask.sum() > batch.loss_mask.sum()
    (vf_coef * total / batch.value_mask.sum()).backward()
    theirs = {f"critic.{name}": p.grad for name, p in model.named_parameters()}
    assert_close({name: g for name, g in ours.items() if name.startswith("critic")}, theirs)  # type: ignore[arg-type]


def test_minibatches_see_every_row_once_an_epoch(
    ready: Callable[..., Ready], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = config("ppo", num_epochs=2, num_minibatches=3)
    policy, critic, batch = ready(options)
    seen: list[list[int]] = []
    select = RolloutBatch.select

    def watched(self: RolloutBatch, rows: torch.Tensor) -> RolloutBatch:
        if self is batch:
            seen.append(rows.tolist())
        return select(self, rows)

    monkeypatch.setattr(RolloutBatch, "select", watched)
    first, _ = after(policy, critic, batch, options, seed=0)
    assert len(seen) == 6
    assert sorted(sum(seen[:3], [])) == sorted(sum(seen[3:], [])) == list(range(NUM))  # noqa: RUF017
    assert seen[:3] != seen[3:]
    again, _ = after(policy, critic, batch, options, seed=0)
    other, _ = after(policy, critic, batch, options, seed=1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_explained_variance() -> None:
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert float(explained_variance(returns, returns)) == 1.0
    assert float(explained_variance(torch.full_like(returns, 3.0), returns)) == 0.0
    same = torch.full((5000,), 0.1)  # the rounding of its mean is no variance
    assert float(explained_variance(torch.randn(5000), same)) == 0.0
    assert float(explained_variance(torch.zeros(4), torch.ones(4))) == 0.0  # nothing to explain
    assert float(explained_variance(torch.empty(0), torch.empty(0))) == 0.0
    assert float(explained_variance(-returns, returns)) == pytest.approx(-3.0)


def test_an_entropy_bonus_raises_the_entropy(ready: Callable[..., Ready]) -> None:
    entropies = []
    for coef in (0.0, 1.0):
        options = config("reinforce", num_epochs=4, entropy_coef=coef)
        _, metrics = after(*ready(options), options)
        entropies.append(metrics["policy/entropy_avg"].item())
    assert entropies[1] > entropies[0] + 1e-3

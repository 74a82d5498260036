"""The models beside the policy, by choice: what they start from and share, what a run leaves, and
that a run stopped anywhere ends as if it had not been."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import fuserl.stages.rl_step as rl_step
from fuserl.config import RLConfig
from fuserl.interrupt import Interrupted
from fuserl.metrics import read_metrics
from fuserl.model.critic_head import save_critic_head, shared_critic
from fuserl.model.folder import load_scalar_model, save_model
from fuserl.model.heads import LanguageModel, ScalarModel, SharedCritic
from fuserl.model.stored import CRITIC_FILE
from fuserl.policy import Policy, load_policy
from fuserl.rewards import ModelReward
from fuserl.stages.reward import RewardTrainer
from fuserl.stages.rl import RLTrainer
from fuserl.stages.rl_models import open_models
from fuserl.stages.trainable import make_trainable

Rows = list[dict[str, Any]]
HYDRA: dict[str, Any] = {"frozen_layers": 1, "reference": "hydra", "critic": "hydra"}
CHOICES: dict[str, dict[str, Any]] = {
    "hydra": HYDRA,
    "hydra reference": {"frozen_layers": 1, "reference": "hydra"},
    "hydra critic": {"frozen_layers": 0.5, "critic": "hydra", "critic_head": "mlp"},
    "shared critic": {"critic": "shared", "critic_head": "mlp"},
    "hydra reference, shared critic": {
        "frozen_layers": 1,
        "reference": "hydra",
        "critic": "shared",
    },
    "copy of what trains": {"frozen_layers": 1, "critic_head": "mlp"},
    "hydra in bf16": {**HYDRA, "dtype": "bfloat16"},
}
each_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)


@pytest.fixture
def train(policy_folder: Path, reward_folder: Path, rows: Rows) -> Callable[..., dict[str, Any]]:
    def run(**options: Any) -> dict[str, Any]:
        defaults: dict[str, Any] = {"batch_size": 4, "learning_rate": 1e-3, "save_every": 1}
        defaults |= {"policy": policy_folder, "data": rows, "reward": reward_folder, "steps": 3}
        defaults |= {"max_new_tokens": 4, "num_epochs": 2, "num_samples": 2}
        return RLTrainer(**{**defaults, **options}).train()

    return run


def weights(folder: Path) -> dict[str, Tensor]:
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def numbers(out: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if not k.startswith(("seconds/", "throughput/"))}
        for line in read_metrics(out / "metrics.jsonl")
    ]


def opened(policy_folder: Path, source: Any, **options: Any) -> tuple[Policy, Any]:
    config = RLConfig(model="m", data="d", out="o", **options)
    policy = load_policy(policy_folder)
    make_trainable(policy.model, config)
    return policy, open_models(config, source, policy)


@each_choice
def test_stop_and_resume_is_the_same_run(
    choice: dict[str, Any],
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped in the middle of the second rollout."""
    whole = train(out=tmp_path / "whole", **choice)
    rollout, calls = rl_step.rollout, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise Interrupted("stop")
        return rollout(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(rl_step, "rollout", interrupted)
        with pytest.raises(Interrupted, match="after step 1 of 3"):
            train(out=tmp_path / "cut", **choice)
    again = train(out=tmp_path / "cut", resume=True, **choice)
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    first = numbers(tmp_path / "whole")[0]
    tolerance = 0.05 if "dtype" in choice else 1e-5
    assert first["first/val/ratio"] == pytest.approx(1.0, abs=tolerance)
    assert first["objective/kl"] == pytest.approx(0.0, abs=10 * tolerance), "no step was taken"
    is_hydra = "hydra" in (choice.get("reference"), choice.get("critic"))
    for found in (whole, again):
        assert (0 < found.get("hydra/flops_saved_share", 0) < 1) is is_hydra
    kept = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert ("hydra/flops_saved_share" in kept) is is_hydra


# What they start from and share


def test_a_reference_copies_only_what_trains(policy_folder: Path, reward_folder: Path) -> None:
    for reference in ("copy", "hydra"):
        policy, models = opened(policy_folder, reward_folder, frozen_layers=1, reference=reference)
        own = dict(models.reference.named_parameters())
        for name, parameter in policy.model.named_parameters():
            assert (own[name].data_ptr() != parameter.data_ptr()) is parameter.requires_grad
            assert torch.equal(own[name], parameter)
        assert not any(parameter.requires_grad for parameter in own.values())
        assert models.reference.trunk.shared_layers == (reference == "hydra")
        assert policy.model.trunk.shared_layers == (reference == "hydra")


@pytest.mark.parametrize("options", [{"kl_coef": 0.0}, {"algorithm": "grpo", "num_samples": 2}])
def test_without_a_kl_penalty_no_reference_is_made(
    options: dict[str, Any],
    policy_folder: Path,
    reward_folder: Path,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    _, models = opened(policy_folder, reward_folder, **options)
    assert models.reference is None
    summary = train(out=tmp_path, **options)
    assert "kl" not in summary
    assert [line for line in numbers(tmp_path) if "objective/kl" in line] == []


def test_a_hydra_critic_needs_no_reference(
    train: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Its FLOPs are those of a run with one, less the reference's pass; a recomputation is a pass
    like the reference's, whose layers above the frozen ones run."""
    options: dict[str, Any] = {"frozen_layers": 1, "critic": "hydra", "steps": 1}
    train(out=tmp_path / "neither", kl_coef=0.0, **options)
    train(out=tmp_path / "reference", reference="hydra", **options)
    train(out=tmp_path / "recomputed", kl_coef=0.0, old_logprobs="recomputed", **options)
    train(out=tmp_path / "both", reference="hydra", old_logprobs="recomputed", **options)
    for name in ("hydra/flops", "hydra/naive_flops"):
        neither, reference, recomputed, both = (
            numbers(tmp_path / run)[0][name]
            for run in ("neither", "reference", "recomputed", "both")
        )
        assert neither < reference == recomputed
        assert both - reference == reference - neither


def test_a_separate_critic_is_the_reward_model(policy_folder: Path, reward_folder: Path) -> None:
    """With frozen layers the two share them; with another head it is drawn anew."""
    _, models = opened(policy_folder, reward_folder, frozen_layers=1)
    assert isinstance(models.reward, ModelReward)
    assert isinstance(models.critic, ScalarModel)
    judge = dict(models.reward.model.named_parameters())
    for name, parameter in models.critic.named_parameters():
        assert torch.equal(parameter, judge[name])
        assert (parameter.data_ptr() != judge[name].data_ptr()) is parameter.requires_grad
    assert not any(parameter.requires_grad for parameter in judge.values())

    first, second = (
        opened(policy_folder, reward_folder, critic_head="mlp", seed=seed)[1].critic
        for seed in (0, 1)
    )
    assert first.head_kind == "mlp"
    assert not torch.equal(first.score.weight, second.score.weight)
    for name, parameter in first.trunk.named_parameters():
        assert torch.equal(parameter, judge[f"trunk.{name}"])


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_hydras_critic_starts_from_the_policy(
    policy_folder: Path, reward_folder: Path, head: str
) -> None:
    policy, models = opened(policy_folder, reward_folder, **{**HYDRA, "critic_head": head})
    assert models.critic.head_kind == head
    for name, parameter in models.critic.trunk.named_parameters():
        theirs = policy.model.trunk.get_parameter(name)
        assert torch.equal(parameter, theirs)
        assert (parameter is theirs) is not parameter.requires_grad


def test_a_function_is_judge_enough(policy_folder: Path) -> None:
    policy, models = opened(policy_folder, lambda completions, **_: [0.0], critic="shared")
    assert isinstance(models.critic, SharedCritic)
    assert models.critic.trunk is policy.model.trunk
    assert models.critic.state_dict().keys() == {"score.weight", "score.bias"}


def test_a_share_that_freezes_no_layer_is_no_hydra(
    policy_folder: Path, reward_folder: Path
) -> None:
    with pytest.raises(ValueError, match="a hydra needs a frozen layer"):
        opened(policy_folder, reward_folder, **{**HYDRA, "frozen_layers": 0.3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "hydra"}, "reference hydra needs frozen_layers"),
        ({"critic": "hydra"}, "critic hydra needs frozen_layers"),
        ({"critic": "shared", "critic_model": "m"}, "critic_model makes no sense with critic sha"),
        ({**HYDRA, "critic_model": "m"}, "critic_model makes no sense with critic hydra"),
        ({"critic": "shared", "algorithm": "reinforce"}, "critic makes no sense with reinforce"),
        ({"critic_head": "mlp", "algorithm": "reinforce"}, "critic_head makes no sense with"),
        ({**HYDRA, "lora_rank": 2}, "lora_rank and frozen_layers exclude each other"),
        ({"critic": "none"}, "critic must be one of"),
        ({"critic_head": "wide"}, "critic_head must be one of"),
        ({"reference": None}, "reference must be one of"),
    ],
)
def test_choices_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RLConfig(model="m", data="d", out="o", **options)


# What a run leaves


def test_a_hydras_critic_is_saved_whole(
    train: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    train(out=tmp_path, **{**HYDRA, "critic_head": "mlp"})
    critic, head_is_new = load_scalar_model(tmp_path / "critic")
    assert not head_is_new
    assert critic.head_kind == "mlp"
    policy = load_policy(tmp_path).model.trunk
    lower = [name for name, _ in policy.named_parameters() if "layers.1." not in name]
    lower.remove("norm.weight")
    for name, parameter in critic.trunk.named_parameters():
        assert torch.equal(parameter, policy.get_parameter(name)) is (name in lower), name


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_shared_critics_head_lies_beside_the_policy(
    head: str, train: Callable[..., dict[str, Any]], tmp_path: Path, reward_folder: Path
) -> None:
    """transformers opens the folder; the next run with a shared critic starts from it."""
    from transformers import AutoModelForCausalLM

    out = tmp_path / "a"
    train(out=out, critic="shared", critic_head=head)
    assert not (out / "critic").exists()
    _, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    saved = load_file(out / CRITIC_FILE)
    _, models = opened(out, reward_folder, critic="shared", seed=7)
    assert models.critic.head_kind == head
    for name, tensor in models.critic.state_dict().items():
        assert torch.equal(tensor, saved[name])
    other = "mlp" if head == "linear" else "linear"
    _, models = opened(out, reward_folder, critic="shared", critic_head=other)
    assert models.critic.head_kind == other
    train(out=tmp_path / "b", policy=out, critic="shared", steps=1)
    with pytest.raises(ValueError, match="would be written over"):
        train(out=out, policy=out, critic="shared", overwrite=True)


def test_a_head_that_does_not_fit_is_named(
    tmp_path: Path, make_model: Callable[..., LanguageModel]
) -> None:
    save_critic_head(SharedCritic(make_model(hidden_size=24)), tmp_path)
    with pytest.raises(ValueError, match=rf"{CRITIC_FILE}: score.weight has shape \(1, 24\)"):
        shared_critic(make_model(), tmp_path, None, 0)
    (tmp_path / CRITIC_FILE).write_bytes(b"torn")
    with pytest.raises(ValueError, match=rf"{CRITIC_FILE} is truncated"):
        shared_critic(make_model(), tmp_path, None, 0)
    save_model(make_model(), tmp_path)
    assert not (tmp_path / CRITIC_FILE).exists(), "it belonged to another policy"


def test_layers_a_run_shared_train_in_the_next(
    policy_folder: Path, train: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """The same policy object, handed from a run with a hydra to one without."""
    policy = load_policy(policy_folder)
    train(policy=policy, out=tmp_path / "hydra", steps=1, **HYDRA)
    before = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    train(policy=policy, out=tmp_path / "whole", steps=1)
    for name, tensor in policy.model.state_dict().items():
        assert not torch.equal(tensor, before[name]), name


def test_a_reward_model_may_have_an_mlp_head(
    policy_folder: Path,
    train: Callable[..., dict[str, Any]],
    tmp_path: Path,
    rows: Rows,
) -> None:
    """It scores as it did before it was saved, the critic inherits its head, and transformers
    opens it without."""
    from transformers import AutoModelForSequenceClassification

    out = tmp_path / "reward"
    RewardTrainer(
        policy_folder, data=rows, out=out, head="mlp", batch_size=8, epochs=4, learning_rate=3e-3
    ).train()
    losses = [line["loss/train"] for line in numbers(out) if "loss/train" in line]
    assert losses[-1] < 0.5 * losses[0]
    model, head_is_new = load_scalar_model(out)
    assert not head_is_new
    assert model.head_kind == "mlp"
    _, report = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert set(report["missing_keys"]) == {"score.weight"}
    _, models = opened(policy_folder, out)
    for name, tensor in models.critic.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    train(out=tmp_path / "rl", reward=out, steps=1)
    kept, _ = load_scalar_model(tmp_path / "rl" / "critic")
    assert kept.head_kind == "mlp"
    with pytest.raises(ValueError, match="head must be one of"):
        RewardTrainer(policy_folder, data=rows, out=out, head="wide")

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

import fuserl.stages.rl as rl_stage
from fuserl.config import RLConfig
from fuserl.interrupt import Interrupted
from fuserl.metrics import read_metrics
from fuserl.policy import Policy, load_policy
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
    rollout, calls = rl_stage.rollout, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise Interrupted("stop")
        return rollout(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(rl_stage, "rollout", interrupted)
        with pytest.raises(Interrupted, match="after step 1 of 3"):
            train(out=tmp_path / "cut", **choice)
    again = train(out=tmp_path / "cut", resume=True, **choice)
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    first = numbers(tmp_path / "whole")[0]
    assert first["first/val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4), "the reference is the start"
    is_hydra = "hydra" in (choice.get("reference"), choice.get("critic"))
    for found in (whole, again):
        assert (0 < found.get("hydra/flops_saved_share", 0) < 1) is is_hydra
    kept = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert ("hydra/flops_saved_share" in kept) is is_hydra

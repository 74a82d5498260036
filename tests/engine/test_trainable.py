"""Precision, recomputation and partial training through the stages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fuserl.metrics import read_metrics
from fuserl.policy import Policy, load_policy
from fuserl.stages.reward import RewardTrainer
from fuserl.stages.rl import RLTrainer
from fuserl.stages.sft import SFTTrainer

Rows = list[dict[str, Any]]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def losses(out: Path) -> Tensor:
    return torch.tensor(
        [row["loss/train"] for row in list(read_metrics(out / "metrics.jsonl"))[1:]]
    )


def fine_tune(model: Path | Policy, rows: Rows, out: Path, **options: Any) -> Path:
    SFTTrainer(
        model,
        data=rows,
        out=out,
        **{"batch_size": 8, "learning_rate": 3e-3, "epochs": 4, **options},
    ).train()
    return out


@pytest.fixture(scope="module")
def plain(policy_folder: Path, rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with no option set."""
    return fine_tune(policy_folder, rows, tmp_path_factory.mktemp("plain"))


def test_bf16_learns_as_fp32_and_saves_bf16(
    plain: Path, policy_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    fine_tune(policy_folder, rows, tmp_path, dtype="bfloat16")
    assert {tensor.dtype for tensor in weights(plain).values()} == {torch.float32}
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.bfloat16}
    wide, narrow = losses(plain), losses(tmp_path)
    assert wide[-1] < wide[0] - 0.5
    torch.testing.assert_close(narrow, wide, rtol=0.01, atol=0)


def test_recomputing_changes_no_bit(
    plain: Path, policy_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    fine_tune(policy_folder, rows, tmp_path, activation_checkpointing=True)
    ours, theirs = weights(tmp_path), weights(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(losses(tmp_path), losses(plain))


def test_frozen_layers_stay(policy_folder: Path, rows: Rows, tmp_path: Path) -> None:
    fine_tune(policy_folder, rows, tmp_path, frozen_layers=1)
    before, after = weights(policy_folder), weights(tmp_path)
    for name, tensor in after.items():
        frozen = name.startswith(("model.embed_tokens.", "model.layers.0."))
        assert torch.equal(tensor, before[name]) == frozen, name


def test_the_next_stage_trains_everything_again(
    policy_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    policy = load_policy(policy_folder)
    fine_tune(policy, rows, tmp_path / "a", frozen_layers=2, activation_checkpointing=True)
    fine_tune(policy, rows, tmp_path / "b")
    assert not policy.model.trunk.checkpointing
    before, after = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert not any(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("model", ["policy", "reward"])
def test_reward_and_rl_train_in_bf16(
    model: str, policy_folder: Path, reward_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"data": rows, "out": tmp_path, "batch_size": 8}
    options |= {"dtype": "bfloat16", "frozen_layers": 1, "activation_checkpointing": True}
    if model == "reward":
        summary = RewardTrainer(policy_folder, epochs=6, learning_rate=3e-3, **options).train()
        accuracy = [
            row["reward/accuracy"] for row in list(read_metrics(tmp_path / "metrics.jsonl"))[1:]
        ]
        assert accuracy[-1] > 0.8
        assert summary["steps"] == 18
        trained, start = tmp_path, policy_folder
    else:
        RLTrainer(policy_folder, reward=reward_folder, steps=2, max_new_tokens=5, **options).train()
        first = next(iter(read_metrics(tmp_path / "metrics.jsonl")))
        assert first["first/val/ratio"] == pytest.approx(1, abs=0.02)
        trained, start = tmp_path / "critic", reward_folder
    after, before = weights(trained), weights(start)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    rounded = {name: tensor.bfloat16() for name, tensor in before.items()}
    lower = [name for name in after if name.startswith("model.layers.0.")]
    upper = [name for name in after if name.startswith("model.layers.1.")]
    assert lower
    assert all(torch.equal(after[name], rounded[name]) for name in lower)
    assert not any(torch.equal(after[name], rounded[name]) for name in upper if "proj" in name)


def test_a_policy_of_another_dtype_is_refused(
    policy_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"dtype bfloat16 was asked for, but the policy is .*32"):
        fine_tune(load_policy(policy_folder), rows, tmp_path, dtype="bfloat16")


def test_a_float16_policy_trains_in_float32(
    make_policy: Callable[..., Policy], rows: Rows, tmp_path: Path
) -> None:
    policy = make_policy(init_std=0.1)
    policy.model.half()
    fine_tune(policy, rows, tmp_path, epochs=1)
    assert {tensor.dtype for tensor in weights(tmp_path).values()} == {torch.float32}

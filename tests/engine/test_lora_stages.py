"""The stages with adapters: they learn, nothing else moves, a stopped run ends as if it had not
been stopped, and what they leave opens in transformers and in PEFT."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fuserl.cli import main
from fuserl.config import RLConfig
from fuserl.data.examples import Prompt
from fuserl.interrupt import EXIT_CODE, InterruptFlag
from fuserl.metrics import read_metrics
from fuserl.model.lora import adapters_off, add_lora, find_adapters
from fuserl.policy import Policy, load_policy
from fuserl.rollout import engine
from fuserl.sequences import Sequences, completion_logprobs
from fuserl.stages.reward import RewardTrainer
from fuserl.stages.rl import RLTrainer
from fuserl.stages.rl_models import open_models
from fuserl.stages.sft import SFTTrainer
from fuserl.stages.trainable import make_trainable

Rows = list[dict[str, Any]]


def even_ids(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[list[float]]:
    """A reward of every token that is easy to raise."""
    return [[float(token % 2 == 0) for token in row] for row in completion_ids]


def tensors(folder: Path) -> dict[str, Tensor]:
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def learned(out: Path) -> list[dict[str, float]]:
    """The metrics of every step but the times."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("seconds/", "throughput/"))}
        for line in read_metrics(out / "metrics.jsonl")
    ]


def moved(start: Path, out: Path) -> set[str]:
    """The stored names, without their layer, of what differs from the start."""
    before, after = load_file(start / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() - {"score.weight"}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    return {name.split(".", 3)[-1] for name in changed}


@pytest.fixture
def data(rows: Rows, tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("algorithm", "steps"),
    [("ppo", 8), ("reinforce_baseline", 10)],
)
def test_rl_raises_the_reward_with_adapters_alone(
    algorithm: str,
    steps: int,
    make_policy: Callable[..., Policy],
    rows: Rows,
    tmp_path: Path,
) -> None:
    """The head is frozen: its weights must be large enough for some tokens to become likely."""
    policy, start = make_policy(init_std=0.35), tmp_path / "start"
    policy.save(start)
    summary = RLTrainer(
        policy,
        data=rows,
        out=tmp_path / "out",
        reward=even_ids,
        reward_at="token",
        algorithm=algorithm,  # type: ignore[arg-type]
        steps=steps,
        batch_size=24,
        max_new_tokens=5,
        num_samples=3,
        microbatch_size=72,
        learning_rate=3e-2,
        schedule="constant",
        max_grad_norm=0.0,
        kl_coef=1e-6,
        lora_rank=4,
        lora_alpha=16.0,
    ).train()
    assert summary["scores_last"] > summary["scores_first"] + 0.6
    lines = learned(tmp_path / "out")
    for line in lines:
        assert line["first/val/ratio"] == pytest.approx(1.0, abs=1e-4)
    assert lines[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert lines[-1]["objective/kl"] > 0.1
    products = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {name.split(".")[1] for name in moved(start, tmp_path / "out")} == products
    assert find_adapters(policy.model) == {}, "what was handed over is what was written"
    assert (tmp_path / "out" / "critic").exists() == (algorithm == "ppo")


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_reference_and_critic_hold_the_weights_under_the_adapters_in_common(
    critic: str, make_policy: Callable[..., Policy], make_prompts: Callable[..., list[Prompt]]
) -> None:
    """The reference is the start, bit for bit, though the policy has moved."""
    policy = make_policy(seed=1)
    start = copy.deepcopy(policy.model)
    config = RLConfig(model="made", data="rows", out="out", lora_rank=4, critic=critic)  # type: ignore[arg-type]
    make_trainable(policy.model, config)
    models = open_models(config, even_ids, policy)
    for layer in find_adapters(policy.model).values():
        torch.nn.init.normal_(layer.lora_b[0], std=0.3)
    sequences = Sequences.of([p.ids for p in make_prompts(3)], [(7, 8), (9,), (11, 5, 6)], "cpu")
    with torch.no_grad():
        found = completion_logprobs(models.reference, sequences)
        assert torch.equal(found, completion_logprobs(start, sequences))
        assert float((found - completion_logprobs(policy.model, sequences)).abs().max()) > 0.1
        with adapters_off(policy.model):
            assert torch.equal(found, completion_logprobs(policy.model, sequences))
    assert models.critic is not None
    assert len(find_adapters(models.reference)) == 0
    theirs = {name: p.data_ptr() for name, p in policy.model.trunk.named_parameters()}
    for trunk in (models.reference.trunk, models.critic.trunk):
        for name, p in trunk.named_parameters():
            if ".lora_" not in name:
                assert theirs[name] == p.data_ptr()
                assert not p.requires_grad
    trained = {name for name, p in models.critic.named_parameters() if p.requires_grad}
    assert {"score.weight", "score.bias"} == {name for name in trained if ".lora_" not in name}
    assert any(".lora_a" in name for name in trained) == (critic == "separate")


@pytest.mark.parametrize("stop", [4, 9, 14])
def test_the_command_resumes_to_the_same_bits(
    stop: int,
    policy_folder: Path,
    reward_folder: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = [
        *("rl", "--model", str(policy_folder), "--reward-model", str(reward_folder)),
        *("--data", str(data), "--batch-size", "6", "--max-new-tokens", "5", "--steps", "3"),
        *("--save-every", "1", "--learning-rate", "0.01", "--lora-rank", "4"),
        *("--lora-alpha", "6", "--lora-targets", "q_proj,mlp.down_proj"),
    ]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main([*command, "--out", str(whole)]) == 0
    asked, check = [0], InterruptFlag.check

    def stopping(flag: InterruptFlag) -> None:
        asked[0] += 1
        flag.requested = flag.requested or asked[0] == stop
        check(flag)

    with monkeypatch.context() as patch:
        patch.setattr(InterruptFlag, "check", stopping)
        patch.setattr(engine, "STEPS_BETWEEN_CALLS", 1)  # a rollout of five tokens asks five times
        assert main([*command, "--out", str(out)]) == EXIT_CODE
    for name, others in (("policy", set()), ("critic", {"score.weight", "score.bias"})):
        kept = load_file(out / "checkpoint" / f"{name}.safetensors")
        assert {key for key in kept if ".lora_" not in key} == others
    assert main([*command, "--out", str(out), "--resume"]) == 0
    ours, theirs = tensors(out), tensors(whole)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert learned(out) == learned(whole)
    assert {n.split(".")[1] for n in moved(policy_folder, out)} == {"q_proj", "down_proj"}
    assert main([*command, "--out", str(out), "--overwrite", "--steps", "1"]) == 0
    for path in (out / "adapter" / "adapter_config.json", out / "adapter", out / "critic"):
        assert path.exists()
    full = [part for part in command[:-6] if part]
    assert main([*full, "--out", str(out), "--overwrite", "--steps", "1"]) == 0
    assert not (out / "adapter").exists()


def test_sft_leaves_a_model_and_its_adapter(
    policy_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    """transformers opens the one, PEFT puts the other on the start; they are the same model."""
    peft = pytest.importorskip("peft", reason="PEFT is an oracle: the extra `oracles` has it")
    from transformers import AutoModelForCausalLM

    summary = SFTTrainer(
        policy_folder,
        data=rows,
        validation_data=rows[:5],
        out=tmp_path,
        batch_size=8,
        epochs=3,
        learning_rate=1e-2,
        lora_rank=2,
        lora_targets="q_proj, v_proj",
    ).train()
    lines = [line for line in learned(tmp_path) if "validation/loss" in line]
    assert summary["validation/loss"] < lines[0]["validation/loss"] - 0.1
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(policy_folder)
    assert (config["r"], config["lora_alpha"]) == (2, 4.0)
    start = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"])
    again = load_policy(policy_folder, adapter=tmp_path / "adapter").model
    kept = load_policy(tmp_path).model
    assert list(again.state_dict()) == list(kept.state_dict())
    assert all(map(torch.equal, again.state_dict().values(), kept.state_dict().values()))
    adapted = peft.PeftModel.from_pretrained(start, tmp_path / "adapter").eval()
    token_ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            adapted(token_ids).logits, whole(token_ids).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_reward_model_learns_with_adapters(
    dtype: str, policy_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    """In bf16 too: adapters are fp32, and the weights under them stay as they are."""
    out = tmp_path / "reward"
    summary = RewardTrainer(
        policy_folder,
        data=rows,
        validation_data=rows[:5],
        out=out,
        batch_size=8,
        epochs=3,
        learning_rate=1e-2,
        dtype=dtype,
        lora_rank=2,
    ).train()
    assert summary["validation/accuracy"] == 1.0
    stored = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if "lora" in name} == {torch.float32}
    assert "base_model.model.score.weight" in stored
    if dtype == "float32":
        assert all(name.split(".")[1].endswith("_proj") for name in moved(policy_folder, out))
    again = RewardTrainer(out, data=rows, out=tmp_path / "again", batch_size=8).train()
    assert again["steps"] == 3, "what it left is where the next run starts"


def test_what_makes_no_sense_is_refused(policy_folder: Path, rows: Rows, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data": rows, "out": tmp_path / "out"}
    for wrong, message in (
        ({"lora_rank": -1}, "lora_rank must not be negative, got -1"),
        ({"lora_rank": 2, "lora_alpha": 0.0}, "lora_alpha must be positive, got 0.0"),
        ({"lora_rank": 2, "lora_targets": "q_proj,"}, "lora_targets must be names with commas"),
        ({"lora_rank": 2, "frozen_layers": 1}, "lora_rank and frozen_layers exclude each other"),
        ({"lora_alpha": 2.0}, "lora_alpha and lora_targets make no sense without a lora_rank"),
    ):
        with pytest.raises(ValueError, match=message):
            SFTTrainer(policy_folder, **options, **wrong)
    with pytest.raises(ValueError, match="targets names 'c_attn', which is no product"):
        SFTTrainer(policy_folder, **options, lora_rank=2, lora_targets="c_attn").train()
    with pytest.raises(ValueError, match="tiny starts from random weights"):
        SFTTrainer("tiny", **options, lora_rank=2).train()
    policy = load_policy(policy_folder)
    add_lora(policy.model, 2, 4.0)
    with pytest.raises(ValueError, match=r"the model has adapters.*merge them first"):
        SFTTrainer(policy, **options).train()
    assert not (tmp_path / "out").exists()

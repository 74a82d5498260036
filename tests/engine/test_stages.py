"""The three stages on a data set of two dozen rows: they learn, they start from each other's
folders, and a run that was stopped anywhere ends as if it had not been."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from packed import run_one
from safetensors.torch import load_file, save_file
from torch import Tensor

import fuserl.stages.rl_step as rl_step
from fuserl.batch import RolloutBatch
from fuserl.checkpoint import digest
from fuserl.config import QuickstartConfig, RLConfig
from fuserl.data.examples import Ranking
from fuserl.interrupt import EXIT_CODE, Interrupted, InterruptFlag
from fuserl.metrics import read_metrics
from fuserl.model.folder import load_scalar_model
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.model.packing import Packing
from fuserl.policy import Policy, load_policy
from fuserl.quickstart import pipeline
from fuserl.rewards import RewardError
from fuserl.rollout import engine
from fuserl.rollout.collect import choose_prompts
from fuserl.stages.reward import PairwiseLoss, RewardTrainer
from fuserl.stages.rl import RLTrainer
from fuserl.stages.rl_opening import open_prompts
from fuserl.stages.sft import SFTTrainer

Rows = list[dict[str, Any]]
ALGORITHMS = ["ppo", "reinforce", "reinforce_baseline"]


def even_ids(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[list[float]]:
    """A reward of every token that is easy to raise."""
    return [[float(token % 2 == 0) for token in row] for row in completion_ids]


def brevity(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    return [-float(len(row)) for row in completion_ids]


def numbers(out: Path) -> list[dict[str, Any]]:
    """The metrics of every step but the times."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("seconds/", "throughput/"))}
        for line in read_metrics(out / "metrics.jsonl")
    ]


def untimed(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in summary.items() if "second" not in k}


def weights(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            found[f"{path.relative_to(folder)}:{name}"] = tensor
    assert found
    return found


def assert_same_run(first: Path, second: Path) -> None:
    ours, theirs = weights(first), weights(second)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert numbers(first) == numbers(second)
    assert sorted(p.name for p in first.iterdir()) == sorted(p.name for p in second.iterdir())


Stage = Callable[..., dict[str, Any]]


@pytest.fixture
def stages(policy_folder: Path, reward_folder: Path, rows: Rows) -> dict[str, Stage]:
    """Each stage with small options; `out` and any other option come on top."""

    def sft(**options: Any) -> dict[str, Any]:
        defaults: dict[str, Any] = {"batch_size": 8, "learning_rate": 3e-3, "save_every": 2}
        defaults |= {"model": policy_folder, "data": rows, "validation_data": rows[:5]}
        return SFTTrainer(**{**defaults, **options}).train()

    def reward(**options: Any) -> dict[str, Any]:
        defaults: dict[str, Any] = {"batch_size": 8, "learning_rate": 3e-3, "save_every": 2}
        defaults |= {"model": policy_folder, "data": rows, "validation_data": rows[:5]}
        return RewardTrainer(**{**defaults, **options}).train()

    def rl(**options: Any) -> dict[str, Any]:
        defaults: dict[str, Any] = {"batch_size": 6, "learning_rate": 1e-3, "save_every": 2}
        defaults |= {"policy": policy_folder, "data": rows, "reward": reward_folder}
        defaults |= {"steps": 3, "max_new_tokens": 5}
        return RLTrainer(**{**defaults, **options}).train()

    return {"sft": sft, "reward": reward, "rl": rl}


# They learn


def test_sft_lowers_the_loss(stages: dict[str, Stage], tmp_path: Path) -> None:
    summary = stages["sft"](out=tmp_path, lm_epochs=1, epochs=6)
    lines = numbers(tmp_path)
    assert summary["steps"] == 7 * 3
    assert summary["rows"] == 24
    assert [line["step"] for line in lines] == list(range(22))
    assert lines[0]["validation/loss"] > 4
    assert summary["validation/loss"] < lines[0]["validation/loss"] - 1
    assert summary["validation/loss"] == lines[-1]["validation/loss"]
    assert lines[-1]["loss/train"] < lines[1]["loss/train"] - 1


def test_sft_from_scratch_brings_its_own_tokenizer(tmp_path: Path, rows: Rows) -> None:
    options: dict[str, Any] = {"batch_size": 8, "learning_rate": 3e-3, "vocab_size": 280}
    for out in ("a", "b"):
        SFTTrainer(
            "tiny", data=rows, out=tmp_path / out, prompt_template="{prompt} =>", **options
        ).train()
    assert_same_run(tmp_path / "a", tmp_path / "b")
    policy = load_policy(tmp_path / "a")
    assert policy.tokenizer is not None
    assert policy.tokenizer.vocab_size == policy.model.config.vocab_size == 280
    assert policy.notes.prompt_template == "{prompt} =>"
    assert policy.model.config.eos_token_id == policy.tokenizer.eos_token_id


def test_the_reward_model_learns_the_order_and_is_centred(
    stages: dict[str, Stage], tmp_path: Path, rows: Rows
) -> None:
    summary = stages["reward"](out=tmp_path, epochs=8, validation_data=rows)
    first = numbers(tmp_path)[0]
    assert summary["validation/accuracy"] > max(0.9, first["validation/accuracy"])
    assert summary["validation/loss"] < first["validation/loss"]
    policy = load_policy(tmp_path)
    model, head_is_new = load_scalar_model(tmp_path)
    assert not head_is_new
    assert policy.tokenizer is not None
    prompts = policy.encode([row["prompt"] for row in rows])
    scores = []
    for prompt, row in zip(prompts, rows, strict=True):
        chosen = [*policy.tokenizer.encode_text(row["chosen"]), policy.tokenizer.eos_token_id]
        with torch.no_grad():
            scores.append(run_one(model, prompt + chosen)[-1].item())
    assert sum(scores) / len(scores) == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rl_raises_the_reward(algorithm: str, stages: dict[str, Stage], tmp_path: Path) -> None:
    summary = stages["rl"](
        out=tmp_path,
        reward=even_ids,
        reward_at="token",
        algorithm=algorithm,
        steps=30,
        batch_size=24,
        learning_rate=1e-2 if algorithm == "ppo" else 3e-2,  # four epochs of a rollout, or one
        kl_coef=1e-6,
        monitors={"odd": lambda completion_ids, **_: [float(r[0] % 2) for r in completion_ids]},
    )
    assert summary["scores_first"] < 3.5
    assert summary["scores_last"] > 4.0
    lines = numbers(tmp_path)
    assert lines[-1]["odd"] < lines[0]["odd"]
    for line in lines:
        assert line["first/val/ratio"] == pytest.approx(1.0, abs=1e-4)
        assert line["first/policy/clipfrac_avg"] == 0.0
    assert lines[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert lines[-1]["objective/kl"] > 0.1
    assert (tmp_path / "critic").exists() == (algorithm == "ppo")


def num_even(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    return [float(sum(token % 2 == 0 for token in row)) for row in completion_ids]


@pytest.mark.parametrize("options", [{}, {"kl_coef": 1e-3}, {"old_logprobs": "recomputed"}])
def test_grpo_raises_the_reward(
    options: dict[str, Any], stages: dict[str, Stage], tmp_path: Path
) -> None:
    """A score a completion, compared with those of five more of its prompt; by default without a
    reference, whose KL is then not logged."""
    summary = stages["rl"](
        out=tmp_path,
        reward=num_even,
        algorithm="grpo",
        steps=30,
        batch_size=8,
        num_samples=6,
        microbatch_size=48,
        learning_rate=3e-2,
        preset="trl",
        **options,
    )
    assert summary["scores_first"] < 3.5
    assert summary["scores_last"] > 4.0
    lines = numbers(tmp_path)
    for line in lines:
        assert line["first/val/ratio"] == pytest.approx(1.0, abs=1e-4)
    assert ("objective/kl" in lines[0]) == ("kl" in summary) == ("kl_coef" in options)
    if "kl_coef" in options:
        assert lines[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
        assert lines[-1]["objective/kl"] > 0.1
        assert lines[-1]["loss/kl_avg"] > 0.01
    assert not (tmp_path / "critic").exists()


def test_the_reference_does_not_move(
    stages: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a run, a stop and a resume."""
    seen: list[tuple[str, str]] = []
    real_score = rl_step.score

    def watched(batch: RolloutBatch, prompts: Any, **options: Any) -> RolloutBatch:
        reference = options["reference"]
        assert not any(p.requires_grad for p in reference.parameters())
        seen.append(digest(reference))  # type: ignore[arg-type]
        return real_score(batch, prompts, **options)

    monkeypatch.setattr(rl_step, "score", watched)
    with interrupted_at(12):
        stages["rl"](out=tmp_path)
    stages["rl"](out=tmp_path, resume=True)
    assert len(seen) == 3
    assert len(set(seen)) == 1


def test_the_judge_is_not_trained_though_the_critic_starts_from_it(
    stages: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judges, critics = [], []
    real_score = rl_step.score

    def watched(batch: RolloutBatch, prompts: Any, **options: Any) -> RolloutBatch:
        judges.append(digest(options["reward"].model))
        critics.append(digest(options["critic"]))
        return real_score(batch, prompts, **options)

    monkeypatch.setattr(rl_step, "score", watched)
    stages["rl"](out=tmp_path)
    assert judges == [judges[0]] * 3
    assert critics[0] == judges[0]
    assert len(set(critics)) == 3


def test_each_step_draws_anew(
    stages: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same prompts and (nearly) the same weights: other completions, another row order."""
    drawn: list[list[list[int]]] = []
    seeds: list[int] = []
    real_update = rl_step.update

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        drawn.append(completion_ids)
        return [1.0] * len(completion_ids)

    def watched(*arguments: Any, seed: int) -> dict[str, Tensor]:
        seeds.append(seed)
        return real_update(*arguments, seed=seed)

    monkeypatch.setattr(rl_step, "update", watched)
    data = [{"prompt": "red dog"}]
    stages["rl"](out=tmp_path, data=data, reward=reward, learning_rate=1e-9, batch_size=2)
    completions = [tuple(row) for rollout in drawn for row in rollout]
    assert len(set(completions)) == len(completions) == 6
    assert len(set(seeds)) == 3


# Rankings


def test_a_ranking_of_three_is_three_pairs_from_one_forward(
    make_scalar_model: Callable[..., ScalarModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_scalar_model(seed=3)
    completions = ((11, 2), (12, 13, 14, 2), (15, 16, 2))
    rankings = [Ranking((5, 6), completions, "a"), Ranking((7,), completions[:2], "b")]
    pairs = [
        Ranking(ranking.prompt_ids, (ranking.completions[i], ranking.completions[j]), "pair")
        for ranking in rankings
        for i in range(len(ranking.completions))
        for j in range(i + 1, len(ranking.completions))
    ]
    shapes: list[int] = []
    forward = ScalarModel.forward

    def counted(self: ScalarModel, token_ids: Tensor, packing: Packing) -> Tensor:
        shapes.append(len(packing.lengths))
        return forward(self, token_ids, packing)

    monkeypatch.setattr(ScalarModel, "forward", counted)

    def loss_and_gradients(rows: list[Ranking]) -> tuple[Tensor, dict[str, float], list[Tensor]]:
        objective = PairwiseLoss(model, rows)
        model.zero_grad(set_to_none=True)
        loss, metrics = objective.loss(range(len(rows)))
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert objective.weight(range(len(rows))) == 4
        return loss, {name: float(value) for name, value in metrics.items()}, grads

    ours = loss_and_gradients(rankings)
    assert shapes == [5], "one forward over the five completions"
    theirs = loss_and_gradients(pairs)
    assert shapes == [5, 8]
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4, abs=1e-6)
    for gradient, expected in zip(ours[2], theirs[2], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_the_reward_stage_takes_rankings(
    stages: dict[str, Stage], tmp_path: Path, rows: Rows
) -> None:
    ranked = [
        {"prompt": r["prompt"], "ranked": [r["chosen"], r["rejected"], " old" + r["rejected"]]}
        for r in rows
    ]
    summary = stages["reward"](out=tmp_path, data=ranked, validation_data=ranked, epochs=6)
    assert summary["validation/accuracy"] > 0.8


# Microbatches


@pytest.mark.parametrize("stage", ["sft", "reward", "rl"])
def test_microbatches_change_nothing(stage: str, stages: dict[str, Stage], tmp_path: Path) -> None:
    """After the first optimizer steps, before rounding is amplified."""
    options: dict[str, Any] = {"steps": 1, "num_epochs": 1} if stage == "rl" else {}
    for size in (32, 3):
        stages[stage](out=tmp_path / str(size), microbatch_size=size, **options)
    ours, theirs = numbers(tmp_path / "32")[:2], numbers(tmp_path / "3")[:2]
    for line, other in zip(ours, theirs, strict=True):
        assert line.keys() == other.keys()
        for name in set(line) - {"stage"}:
            assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


# From stage to stage


@pytest.fixture(scope="module")
def finished(
    policy_folder: Path, reward_folder: Path, rows: Rows, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A folder of each stage."""
    out = tmp_path_factory.mktemp("finished")
    SFTTrainer(policy_folder, data=rows, out=out / "sft").train()
    RewardTrainer(out / "sft", data=rows, out=out / "reward").train()
    options: dict[str, Any] = {"steps": 1, "max_new_tokens": 4, "batch_size": 4}
    RLTrainer(out / "sft", data=rows, reward=out / "reward", out=out / "rl", **options).train()
    return {
        "sft": out / "sft",
        "reward": out / "reward",
        "rl": out / "rl",
        "critic": out / "rl" / "critic",
    }


@pytest.mark.parametrize("start", ["sft", "reward", "rl", "critic"])
@pytest.mark.parametrize("stage", ["sft", "reward", "rl"])
def test_every_stage_starts_from_every_folder(
    stage: str, start: str, finished: dict[str, Path], stages: dict[str, Stage], tmp_path: Path
) -> None:
    """The small models are tied: a reward model's folder is a policy's, too."""
    options: dict[str, Any] = {"out": tmp_path, "learning_rate": 1e-12}
    options["policy" if stage == "rl" else "model"] = finished[start]
    stages[stage](**options | ({"steps": 1} if stage == "rl" else {}))
    trunk = weights(finished[start])
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if name != "score.weight" or start in ("reward", "critic"):
            before = trunk[f"model.safetensors:{name}"]
            torch.testing.assert_close(tensor, before, rtol=1e-5, atol=1e-6)
    assert load_policy(tmp_path).notes.prompt_template == "{prompt} =>"


def first_critic(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The critic's weights at the first scoring."""
    seen: list[dict[str, Tensor]] = []
    real_score = rl_step.score

    def watched(batch: RolloutBatch, prompts: Any, **options: Any) -> RolloutBatch:
        if not seen:
            seen.append({k: v.clone() for k, v in options["critic"].state_dict().items()})
        return real_score(batch, prompts, **options)

    monkeypatch.setattr(rl_step, "score", watched)
    return seen


@pytest.mark.parametrize("source", ["reward model", "critic_model", "policy"])
def test_where_the_critic_starts(
    source: str,
    finished: dict[str, Path],
    stages: dict[str, Stage],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = first_critic(monkeypatch)
    options: dict[str, Any] = {"out": tmp_path, "steps": 1, "policy": finished["sft"]}
    options["reward"] = brevity if source == "policy" else finished["reward"]
    if source == "critic_model":
        options["critic_model"] = str(finished["critic"])
    stages["rl"](**options)
    if source == "policy":
        expected = load_policy(finished["sft"]).model.state_dict()
        expected = {k: v for k, v in expected.items() if k != "lm_head.weight"}
        assert seen[0]["score.weight"].abs().max() > 0
    else:
        folder = finished["reward" if source == "reward model" else "critic"]
        expected = load_scalar_model(folder)[0].state_dict()
    assert all(torch.equal(seen[0][name], tensor) for name, tensor in expected.items())


def test_transformers_opens_what_the_stages_leave(finished: dict[str, Path]) -> None:
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    policy = load_policy(finished["rl"])
    [ids] = policy.encode(["red dog"])
    for name, auto in (
        ("sft", AutoModelForCausalLM),
        ("rl", AutoModelForCausalLM),
        ("reward", AutoModelForSequenceClassification),
        ("critic", AutoModelForSequenceClassification),
    ):
        theirs, info = auto.from_pretrained(finished[name], output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        tokenizer = AutoTokenizer.from_pretrained(finished[name])
        assert tokenizer("red dog =>")["input_ids"][0] == ids[0]
        assert tokenizer.decode(ids[1:]) == "red dog =>"
        token_ids = torch.tensor([ids])
        with torch.no_grad():
            out = theirs(token_ids).logits
            if auto is AutoModelForCausalLM:
                model: Any = load_policy(finished[name]).model
                expected = model.logits(run_one(model, ids))
            else:
                model, _ = load_scalar_model(finished[name])
                expected = run_one(model, ids)[-1:] - model.score.bias
            torch.testing.assert_close(out[0], expected, rtol=1e-5, atol=1e-5)


# Stop and resume


@pytest.fixture(autouse=True)
def _asked_before_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a signal has come, so that a rollout of a few tokens can be stopped inside."""
    monkeypatch.setattr(engine, "STEPS_BETWEEN_CALLS", 1)


class interrupted_at:
    """Within, the nth question whether a signal has come is answered yes, and the run stops. A
    rollout asks before each token, as one of many tokens does every few: it stops in the middle."""

    def __init__(self, nth: int) -> None:
        self._nth = nth

    def __enter__(self) -> None:
        self._patch = pytest.MonkeyPatch()
        asked, nth, check = [0], self._nth, InterruptFlag.check

        def counted(flag: InterruptFlag) -> None:
            asked[0] += 1
            flag.requested = flag.requested or asked[0] == nth
            check(flag)

        self._patch.setattr(InterruptFlag, "check", counted)
        self._patch.setattr(engine, "STEPS_BETWEEN_CALLS", 1)

    def __exit__(self, kind: type | None, *_: object) -> bool:
        self._patch.undo()
        assert kind is not None, "the run was never stopped"
        return issubclass(kind, Interrupted)


@pytest.mark.parametrize(
    ("stage", "stops", "options"),
    [
        ("sft", (1, 2, 5), {"lm_epochs": 1, "epochs": 1}),
        ("reward", (1, 3), {"validate_every": 2, "epochs": 2}),
        # A step of RL asks once, before each of 5 tokens, and once after the rollout.
        ("rl", (1, 4, 9, 14), {"num_epochs": 2, "num_minibatches": 2, "num_samples": 2}),
        ("rl", (10,), {"algorithm": "reinforce_baseline"}),
        ("rl", (9,), {"algorithm": "grpo", "num_samples": 3, "num_epochs": 2}),
        ("rl", (9,), {"algorithm": "grpo", "num_samples": 3, "kl_coef": 0.1}),
        ("rl", (9,), {"old_logprobs": "recomputed", "importance_correction": "sequence"}),
        ("sft", (2,), {"dtype": "bfloat16", "frozen_layers": 0.5}),
        ("rl", (9,), {"dtype": "bfloat16", "num_epochs": 2, "num_minibatches": 2}),
    ],
    ids=[
        *("sft", "reward", "ppo", "reinforce", "grpo", "grpo-kl", "recomputed"),
        *("sft-bf16-frozen", "ppo-bf16"),
    ],
)
def test_stop_anywhere_and_resume_is_the_same_run(
    stage: str,
    stops: tuple[int, ...],
    options: dict[str, Any],
    stages: dict[str, Stage],
    tmp_path: Path,
) -> None:
    whole = stages[stage](out=tmp_path / "whole", **options)
    for stop in stops:
        out = tmp_path / str(stop)
        with interrupted_at(stop):
            stages[stage](out=out, **options)
        assert not (out / "summary.json").exists()
        resumed = stages[stage](out=out, resume=True, **options)
        assert untimed(resumed) == untimed(whole)
        assert_same_run(out, tmp_path / "whole")
        assert stages[stage](out=out, resume=True, **options) == resumed, "nothing is left to do"


def test_two_stops_in_one_run(stages: dict[str, Stage], tmp_path: Path) -> None:
    stages["rl"](out=tmp_path / "whole", steps=4)
    out = tmp_path / "twice"
    with interrupted_at(10):
        stages["rl"](out=out, steps=4)
    with interrupted_at(9):
        stages["rl"](out=out, steps=4, resume=True)
    stages["rl"](out=out, steps=4, resume=True)
    assert_same_run(out, tmp_path / "whole")


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_disk_that_is_full_at_the_end_loses_nothing(
    stage: str, stages: dict[str, Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stages[stage](out=tmp_path / "whole")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("fuserl.policy.save_model", full)
        with pytest.raises(OSError, match="No space left"):
            stages[stage](out=out)
    assert not (out / "summary.json").exists()
    assert untimed(stages[stage](out=out, resume=True)) == untimed(whole)
    assert_same_run(out, tmp_path / "whole")


def test_a_reward_function_that_raises_stops_with_the_state_saved(
    stages: dict[str, Stage], tmp_path: Path
) -> None:
    stages["rl"](out=tmp_path / "whole", reward=brevity)
    calls = [0]

    def failing(**columns: Any) -> list[float]:
        calls[0] += 1
        if calls[0] == 2:
            raise OSError("the judge is away")
        return brevity(**columns)

    out = tmp_path / "failed"
    with pytest.raises(RewardError, match=r"raised OSError: the judge is away\n.*\n.*data\[\d+\]"):
        stages["rl"](out=out, reward=failing)
    stages["rl"](out=out, reward=failing, resume=True)
    assert_same_run(out, tmp_path / "whole")


def test_a_policy_that_was_trained_is_no_start_to_resume_from(
    stages: dict[str, Stage], tmp_path: Path, policy_folder: Path
) -> None:
    """In one process the trained policy would become its own reference."""
    policy = load_policy(policy_folder)
    with interrupted_at(12):
        stages["rl"](out=tmp_path / "run", policy=policy)
    with pytest.raises(ValueError, match="the starting policy differs from that of the run"):
        stages["rl"](out=tmp_path / "run", policy=policy, resume=True)
    stages["rl"](out=tmp_path / "run", policy=load_policy(policy_folder), resume=True)
    stages["rl"](out=tmp_path / "whole", policy=load_policy(policy_folder))
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("stage", ["sft", "reward", "rl"])
def test_data_that_changed_is_refused(
    stage: str, stages: dict[str, Stage], tmp_path: Path, rows: Rows
) -> None:
    """As many rows and tokens as before, in another order."""
    with interrupted_at(2):
        stages[stage](out=tmp_path, data=rows)
    with pytest.raises(ValueError, match="the data differs from that of the run"):
        stages[stage](out=tmp_path, data=rows[::-1], resume=True)
    stages[stage](out=tmp_path, data=rows, resume=True)


@pytest.mark.parametrize(
    ("stage", "option", "name"),
    [
        ("sft", "model", "starting policy"),
        ("reward", "model", "starting model"),
        ("rl", "policy", "starting policy"),
        ("rl", "reward", "reward model"),
        ("rl", "critic_model", "starting critic"),
    ],
)
def test_a_start_that_changed_is_refused(
    stage: str,
    option: str,
    name: str,
    stages: dict[str, Stage],
    policy_folder: Path,
    reward_folder: Path,
    tmp_path: Path,
) -> None:
    """In the same folder, under the same name."""
    source = policy_folder if option in ("model", "policy") else reward_folder
    start = shutil.copytree(source, tmp_path / "start")
    options: dict[str, Any] = {"out": tmp_path / "run", option: str(start)}
    with interrupted_at(2):
        stages[stage](**options)
    tensors = load_file(start / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, start / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"the {name} differs from that of the run to resume"):
        stages[stage](**options, resume=True)


def test_a_tokenizer_that_changed_is_refused(tmp_path: Path) -> None:
    """Both give their own rows the same ids."""
    options: dict[str, Any] = {"out": tmp_path, "vocab_size": 262, "epochs": 2}
    with interrupted_at(2):
        SFTTrainer("tiny", data=[{"text": "abab"}] * 4, **options).train()
    with pytest.raises(ValueError, match="the tokenizer differs from that of the run"):
        SFTTrainer("tiny", data=[{"text": "cdcd"}] * 4, resume=True, **options).train()


@pytest.fixture
def small_quickstart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline in seconds; what it reports is not looked at."""
    monkeypatch.setattr(pipeline, "NUM_TRAIN", 48)
    monkeypatch.setattr(pipeline, "NUM_HELD_OUT", 8)
    monkeypatch.setattr(pipeline, "SFT", {"epochs": 1, "learning_rate": 3e-3})
    monkeypatch.setattr(pipeline, "REWARD", {"epochs": 1, "learning_rate": 1e-3})
    small = {"steps": 2, "batch_size": 4, "max_new_tokens": 4}
    monkeypatch.setattr(pipeline, "PPO", {**pipeline.PPO, **small})
    monkeypatch.setattr(pipeline, "write_report", lambda *_: None)


@pytest.mark.usefixtures("small_quickstart")
def test_the_quickstart_reuses_what_is_not_outdated(tmp_path: Path) -> None:
    config = QuickstartConfig(out=str(tmp_path))
    again = dataclasses.replace(config, resume=True)

    def when() -> list[int]:
        return [(tmp_path / s / "summary.json").stat().st_mtime_ns for s in pipeline.STAGES]

    with pytest.raises(ValueError, match="there is no run to resume in"):
        pipeline.run_quickstart(again)
    pipeline.run_quickstart(config)
    first = when()
    data = (tmp_path / "data" / "train_preferences.jsonl").read_text()
    with pytest.raises(ValueError, match="holds a finished run: add --resume, or --overwrite"):
        pipeline.run_quickstart(config)
    with pytest.raises(ValueError, match=r"options differ.*seed: 0 -> 1"):
        pipeline.run_quickstart(dataclasses.replace(again, seed=1))
    assert (tmp_path / "data" / "train_preferences.jsonl").read_text() == data
    pipeline.run_quickstart(again)
    assert when() == first

    (tmp_path / "summary.json").unlink()
    with pytest.raises(ValueError, match="holds an unfinished run: add --resume, or --overwrite"):
        pipeline.run_quickstart(config)
    (tmp_path / "reward" / "summary.json").unlink()
    pipeline.run_quickstart(again)
    second = when()
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, False]

    (tmp_path / "notes.txt").touch()
    with interrupted_at(1):
        pipeline.run_quickstart(dataclasses.replace(config, overwrite=True))
    assert not (tmp_path / "policy" / "model.safetensors").exists(), "of the run that is lost"
    assert (tmp_path / "notes.txt").exists()
    pipeline.run_quickstart(again)
    assert all(a != b for a, b in zip(second, when(), strict=True))


def test_a_real_ctrl_c(
    policy_folder: Path, reward_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    import json

    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"steps": 40, "batch_size": 8, "max_new_tokens": 8, "save_every": 7}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fuserl", "rl", f"--model={policy_folder}", f"--data={data}"]
    command += [f"--reward-model={reward_folder}", f"--out={out}", *flags]
    path = os.pathsep.join(sys.path)  # the same packages as here, native kernels and so bits too
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 100
        while process.poll() is None and len(list(read_metrics(out / "metrics.jsonl"))) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == EXIT_CODE == 130, said
    assert f"saved in {out}; to go on, run the same command with --resume" in said
    assert "Traceback" not in said
    assert not (out / "summary.json").exists()

    done = subprocess.run(
        [*command, "--resume"], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    RLTrainer(
        policy_folder, data=data, reward=reward_folder, out=tmp_path / "whole", **options
    ).train()
    assert_same_run(out, tmp_path / "whole")


# What a run is given


def test_scores_of_none_leave_sequences_out_and_are_counted(
    stages: dict[str, Stage], tmp_path: Path
) -> None:
    def reward(number: Sequence[int], **_: Any) -> list[float | None]:
        return [None if n % 2 else float("nan") if n % 3 == 0 else 5.0 for n in number]

    stages["rl"](out=tmp_path, reward=reward, batch_size=24, steps=1)
    [line] = numbers(tmp_path)
    assert line["objective/excluded"] == 16
    assert line["objective/raw_scores"] == 5.0, "a mean over those that were scored"


def test_every_sequence_left_out_changes_no_weight(
    stages: dict[str, Stage], tmp_path: Path, policy_folder: Path
) -> None:
    stages["rl"](out=tmp_path, reward=lambda prompts, **_: [None] * len(prompts), steps=1)
    before, after = load_policy(policy_folder), load_policy(tmp_path)
    assert digest(before.model) == digest(after.model)
    [line] = numbers(tmp_path)
    assert line["objective/excluded"] == 6
    assert all(value == value for value in line.values()), "no NaN"


def test_prompts_are_drawn_by_seed_and_step(
    policy_folder: Path, rows: Rows, tmp_path: Path
) -> None:
    config = RLConfig(
        model=str(policy_folder), data="rows", out=str(tmp_path), batch_size=8, num_samples=2
    )
    prompts = open_prompts(config, rows, load_policy(policy_folder))

    def drawn(step: int, seed: int = 0) -> list[int]:
        chosen = choose_prompts(prompts, dataclasses.replace(config, seed=seed), step)
        return [prompt.columns["number"] for prompt in chosen]

    assert all(drawn(0)[i] == drawn(0)[i + 1] for i in range(0, 16, 2))
    first, second = ([n for s in range(3) for n in drawn(3 * e + s)[::2]] for e in range(2))
    assert sorted(first) == sorted(second) == list(range(24)), "each epoch sees every prompt"
    assert first != second
    assert drawn(4) == drawn(4)
    assert drawn(0) != drawn(0, seed=1)
    few = choose_prompts(prompts[:3], config, 5)
    assert len(few) == 16


def test_a_policy_that_is_handed_over_takes_the_options(
    stages: dict[str, Stage], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"prompt_template": "Q: {prompt} A:"}
    stages["sft"](out=tmp_path / "sft", model=make_policy(), **options)
    stages["rl"](out=tmp_path / "rl", policy=make_policy(), steps=1, **options)
    for stage in ("sft", "rl"):
        assert load_policy(tmp_path / stage).notes.prompt_template == "Q: {prompt} A:"


def test_the_reward_stage_copies_a_policy_that_is_handed_over(
    stages: dict[str, Stage], policy_folder: Path, tmp_path: Path
) -> None:
    policy = load_policy(policy_folder)
    before = digest(policy.model)
    template = "Q: {prompt} A:"
    stages["reward"](out=tmp_path / "given", model=policy, prompt_template=template)
    assert digest(policy.model) == before
    stages["reward"](out=tmp_path / "folder", model=policy_folder, prompt_template=template)
    assert_same_run(tmp_path / "given", tmp_path / "folder")
    assert load_policy(tmp_path / "given").notes.prompt_template == template


def test_a_generator_is_read_once(tmp_path: Path, rows: Rows) -> None:
    options: dict[str, Any] = {"vocab_size": 280, "batch_size": 8}
    SFTTrainer("tiny", data=(row for row in rows), out=tmp_path / "a", **options).train()
    SFTTrainer("tiny", data=rows, out=tmp_path / "b", **options).train()
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_policy_without_a_tokenizer_cannot_read_rows(
    stage: str, stages: dict[str, Stage], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy()
    policy.tokenizer = None
    key = "policy" if stage == "rl" else "model"
    with pytest.raises(ValueError, match="made has no tokenizer files, and the rows are text"):
        stages[stage](out=tmp_path, **{key: policy})


def test_a_tokenizer_without_a_pad_token_works(
    stages: dict[str, Stage], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Masks come from lengths: the EOS may stand in for the padding."""
    policy = make_policy(init_std=0.1, pad_token_id=None)
    assert policy.tokenizer is not None
    policy.save(tmp_path / "model")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = tmp_path / "model" / name
        if path.exists():
            import json

            content = json.loads(path.read_text())
            content.pop("pad_token", None)
            path.write_text(json.dumps(content))
    loaded = load_policy(tmp_path / "model")
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.pad_token_id == loaded.tokenizer.eos_token_id
    stages["sft"](out=tmp_path / "sft", model=tmp_path / "model")
    stages["reward"](out=tmp_path / "reward", model=tmp_path / "sft")
    stages["rl"](out=tmp_path / "rl", policy=tmp_path / "sft", reward=tmp_path / "reward")


def test_the_reward_model_must_be_one_and_read_the_same_ids(
    stages: dict[str, Stage],
    policy_folder: Path,
    reward_folder: Path,
    rows: Rows,
    make_policy: Callable[..., Policy],
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=r"is no reward model: it has no score\.weight"):
        stages["rl"](out=tmp_path / "a", reward=policy_folder)

    SFTTrainer(
        "tiny", data=[{"text": "zebras zig zag"}] * 4, out=tmp_path / "other", vocab_size=265
    ).train()
    RewardTrainer(tmp_path / "other", data=rows, out=tmp_path / "other-reward").train()
    with pytest.raises(ValueError, match=r"reward model .* has another tokenizer than the policy"):
        stages["rl"](out=tmp_path / "b", reward=tmp_path / "other-reward")
    with pytest.raises(ValueError, match=r"critic .* has another tokenizer than the policy"):
        stages["rl"](out=tmp_path / "c", critic_model=str(tmp_path / "other-reward"))

    wider = make_policy(vocab_size=512, init_std=0.1)
    with pytest.raises(ValueError, match=r"has vocab_size \d+, and the policy made 512"):
        stages["rl"](out=tmp_path / "d", policy=wider)


def test_lengths_that_leave_no_room_are_named(stages: dict[str, Stage], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_new_tokens \(96\) leaves no room for a prompt.*96"):
        stages["rl"](out=tmp_path, max_new_tokens=96)


def test_a_vocabulary_size_is_for_models_from_scratch(
    stages: dict[str, Stage], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    for model in (None, make_policy()):
        given = {} if model is None else {"model": model}
        with pytest.raises(ValueError, match="vocab_size is for a model from scratch"):
            stages["sft"](out=tmp_path, vocab_size=300, **given)


def test_a_broken_policy_stops_the_run(
    stages: dict[str, Stage], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy()
    with torch.no_grad():
        policy.model.trunk.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits hold no distribution"):
        stages["rl"](out=tmp_path, policy=policy)


def test_models_train_in_place(
    stages: dict[str, Stage], policy_folder: Path, tmp_path: Path
) -> None:
    policy = load_policy(policy_folder)
    model: LanguageModel = policy.model
    before = digest(model)
    stages["rl"](out=tmp_path, policy=policy, steps=1)
    assert policy.model is model
    assert digest(model) != before
    assert digest(model) == digest(load_policy(tmp_path).model)

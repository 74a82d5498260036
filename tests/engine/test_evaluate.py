"""`fuserl evaluate`: numbers equal to ones computed here one row at a time."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fuserl.config import EvaluateConfig
from fuserl.evaluate import _judge, evaluate_policy, evaluate_reward_model, run_evaluate
from fuserl.model.folder import load_scalar_model
from fuserl.policy import Policy, load_policy
from fuserl.rouge import rouge_l
from fuserl.statistics import bootstrap_ci95

Rows = list[dict[str, Any]]


@pytest.fixture
def data(rows: Rows, tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:9]))
    return path


@pytest.fixture
def config(policy_folder: Path, reward_folder: Path, data: Path) -> EvaluateConfig:
    return EvaluateConfig(
        model=str(policy_folder),
        data=str(data),
        reward_model=str(reward_folder),
        max_new_tokens=6,
        batch_size=4,
    )


def token_ids(policy: Policy, row: dict[str, Any], key: str) -> tuple[list[int], list[int]]:
    assert policy.tokenizer is not None
    [prompt] = policy.encode([row["prompt"]])
    return prompt, [*policy.tokenizer.encode_text(row[key]), policy.tokenizer.eos_token_id]


def test_a_policy(config: EvaluateConfig, rows: Rows) -> None:
    result, lines = evaluate_policy(config)
    policy = load_policy(config.model)
    assert policy.tokenizer is not None
    scorer, _ = load_scalar_model(str(config.reward_model))
    total, count, wins, scores, rouge = 0.0, 0, [], [], []
    for row, line in zip(rows[:9], lines, strict=True):
        prompt, completion = token_ids(policy, row, "completion")
        [logprobs] = policy.logprobs([prompt], [completion])
        total -= logprobs.sum().item()
        count += len(completion)
        out = policy.generate([prompt], max_new_tokens=6, temperature=0.0)
        assert out.texts is not None
        assert line["completion"] == out.texts[0]
        assert line["reference"] == row["completion"]
        with torch.no_grad():
            ours, theirs = (
                scorer.values(torch.tensor([prompt + ids]))[0, -1].item()
                for ids in (out.token_ids[0], completion)
            )
        assert line["score"] == pytest.approx(ours, abs=1e-5)
        assert line["reference_score"] == pytest.approx(theirs, abs=1e-5)
        wins.append(float(ours > theirs))
        scores.append(ours)
        rouge.append(rouge_l(out.texts, [row["completion"]])[0])
    assert result["rows"] == 9
    assert result["loss"] == pytest.approx(total / count, rel=1e-5)
    assert result["win_rate"] == pytest.approx(sum(wins) / 9)
    assert result["score"] == pytest.approx(sum(scores) / 9, abs=1e-5)
    assert result["rouge_l"] == pytest.approx(sum(rouge) / 9)
    for name in ("rouge_l", "win_rate", "score"):
        low, high = result[f"{name}_ci95"]
        assert low <= result[name] <= high


def test_completions_equal_to_the_rows_tie(
    config: EvaluateConfig, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against itself a policy wins half."""
    from fuserl.data.examples import load_completions

    policy = load_policy(config.model)
    assert policy.tokenizer is not None
    examples, _ = load_completions(rows, policy.tokenizer, max_length=96)
    ours, theirs = _judge(config, policy, examples, [list(e.completion_ids) for e in examples])
    assert ours == theirs
    assert len(set(ours)) > 9

    def judge_itself(
        config: EvaluateConfig, policy: Policy, examples: Any, completions: Any
    ) -> tuple[list[float], list[float]]:
        return _judge(config, policy, examples, [list(e.completion_ids) for e in examples])

    monkeypatch.setattr("fuserl.evaluate._judge", judge_itself)
    result, _ = evaluate_policy(config)
    assert result["win_rate"] == 0.5
    assert result["score"] == result["reference_score"]


def test_rouge_of_identical_texts_is_one() -> None:
    assert rouge_l(["the red dog", "a"], ["the red dog", "a"]) == [1.0, 1.0]
    assert rouge_l(["red cat"], ["the dog"]) == [0.0]
    assert rouge_l(["the red dog ran"], ["the dog"])[0] == pytest.approx(2 * (0.5 * 1) / 1.5)
    assert rouge_l([""], ["the dog"]) == [0.0]


def test_a_reward_model(reward_folder: Path, data: Path, rows: Rows) -> None:
    config = EvaluateConfig(model=str(reward_folder), data=str(data), batch_size=4)
    result = evaluate_reward_model(config)
    policy = load_policy(reward_folder)
    scorer, _ = load_scalar_model(reward_folder)
    right, loss = [], 0.0
    for row in rows[:9]:
        chosen, rejected = (
            scorer.values(torch.tensor([sum(token_ids(policy, row, key), [])]))[0, -1]  # noqa: RUF017
            for key in ("chosen", "rejected")
        )
        right.append(float(chosen > rejected))
        loss -= torch.nn.functional.logsigmoid(chosen - rejected).item()
    assert result["rankings"] == 9
    assert result["reward_accuracy"] == pytest.approx(sum(right) / 9)
    assert result["loss"] == pytest.approx(loss / 9, rel=1e-5)


def test_untrained_weights_have_a_name(
    policy_folder: Path, data: Path, config: EvaluateConfig
) -> None:
    options = dataclasses.replace(config, model="tiny", tokenizer=str(policy_folder))
    result, _ = evaluate_policy(options)
    policy = load_policy(policy_folder)
    assert policy.tokenizer is not None
    uniform = torch.tensor(float(policy.tokenizer.vocab_size)).log().item()
    assert result["loss"] == pytest.approx(uniform, rel=0.25)
    with pytest.raises(ValueError, match="untrained weights: say whose --tokenizer"):
        evaluate_policy(dataclasses.replace(config, model="tiny"))
    with pytest.raises(ValueError, match="tokenizer is for untrained weights"):
        evaluate_policy(dataclasses.replace(config, tokenizer=str(policy_folder)))


def test_the_first_rows_only(config: EvaluateConfig) -> None:
    whole, lines = evaluate_policy(config)
    part, first = evaluate_policy(dataclasses.replace(config, limit=3))
    assert part["rows"] == 3
    assert [line["completion"] for line in first] == [line["completion"] for line in lines[:3]]
    assert whole["rows"] == 9


def test_a_row_that_fills_the_model_is_measured(
    make_policy: Callable[..., Policy], tmp_path: Path, config: EvaluateConfig
) -> None:
    """Its completion is cut where the positions end, not refused."""
    make_policy(init_std=0.1, max_positions=24).save(tmp_path / "short")
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"prompt": "x" * 20, "completion": " dog"}) + "\n")
    options = dataclasses.replace(
        config, model=str(tmp_path / "short"), data=str(data), reward_model=None
    )
    result, _ = evaluate_policy(dataclasses.replace(options, max_new_tokens=64))
    assert 1 <= result["completion_tokens"] <= 3


def test_the_result_goes_to_files(config: EvaluateConfig, tmp_path: Path) -> None:
    out = tmp_path / "new" / "result.json"
    run_evaluate(dataclasses.replace(config, out=str(out)))
    result = json.loads(out.read_text())
    assert result["rows"] == 9
    assert len(out.with_suffix(".jsonl").read_text().splitlines()) == 9


def test_pairs_that_make_no_sense(config: EvaluateConfig, policy_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is no reward model: it has no score\.weight"):
        evaluate_policy(dataclasses.replace(config, reward_model=str(policy_folder)))
    with pytest.raises(ValueError, match="is itself a reward model"):
        run_evaluate(dataclasses.replace(config, model=str(config.reward_model)))


def test_the_interval_holds_the_mean_and_shrinks() -> None:
    few = [0.0, 1.0] * 10
    many = few * 40
    low, high = bootstrap_ci95(few, seed=0)
    assert low < 0.5 < high
    narrow = bootstrap_ci95(many, seed=0)
    assert high - low > 4 * (narrow[1] - narrow[0])
    assert bootstrap_ci95(few, seed=0) == (low, high)
    assert bootstrap_ci95([0.25] * 5, seed=1) == (0.25, 0.25)

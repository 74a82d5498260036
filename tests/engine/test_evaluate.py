"""`fuserl evaluate`: numbers equal to ones computed here one row at a time."""

import dataclasses
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from late_device import LateRunner, use_late_device
from packed import run_one

from fuserl.config import EvaluateConfig
from fuserl.device import default_device
from fuserl.evaluate import _judge, evaluate_policy, evaluate_reward_model, run_evaluate
from fuserl.model.folder import load_scalar_model, save_model
from fuserl.policy import Policy, load_policy
from fuserl.rollout import module_runner
from fuserl.rouge import rouge_l
from fuserl.statistics import bootstrap_ci95
from fuserl.tokenizer import train_tokenizer

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
                run_one(scorer, prompt + ids)[-1].item() for ids in (out.token_ids[0], completion)
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
    own = [e.completion_ids for e in examples]
    ours, theirs = _judge(config, policy, examples, [own, own])
    assert ours == theirs
    assert len(set(ours)) > 9

    def judge_itself(
        config: EvaluateConfig, policy: Policy, examples: Any, candidates: Any
    ) -> list[list[float]]:
        own = [e.completion_ids for e in examples]
        return _judge(config, policy, examples, [own] * len(candidates))

    monkeypatch.setattr("fuserl.evaluate._judge", judge_itself)
    result, _ = evaluate_policy(config)
    assert result["win_rate"] == 0.5
    assert result["score"] == result["reference_score"]


def test_the_judge_has_the_memory_of_the_policies(
    config: EvaluateConfig, policy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device, where a policy keeps its cache for the next call."""
    monkeypatch.setattr(module_runner, "_can_pack", lambda model: False)
    monkeypatch.setattr(Policy, "_keeps", property(lambda self: True))
    made = use_late_device(monkeypatch)
    alive: list[weakref.ref[LateRunner]] = []

    def judge(*arguments: Any) -> list[list[float]]:
        alive.extend(weakref.ref(made.pop()) for _ in range(len(made)))
        assert [runner() for runner in alive] == [None, None]
        return _judge(*arguments)

    monkeypatch.setattr("fuserl.evaluate._judge", judge)
    evaluate_policy(dataclasses.replace(config, against=str(policy_folder)))
    assert len(alive) == 2


def test_rouge_of_identical_texts_is_one() -> None:
    assert rouge_l(["the red dog", "a"], ["the red dog", "a"]) == [1.0, 1.0]
    assert rouge_l(["red cat"], ["the dog"]) == [0.0]
    assert rouge_l(["the red dog ran"], ["the dog"])[0] == pytest.approx(2 * (0.5 * 1) / 1.5)
    assert rouge_l([""], ["the dog"]) == [0.0]


@pytest.mark.parametrize(
    "text", ["Красная собака бежит", "狗 跑 在 树林", "Überschöne Grüne", "ΑΒΓ δ"]
)
def test_rouge_reads_every_script(text: str) -> None:
    assert rouge_l([text.upper()], [text]) == [1.0]
    assert rouge_l([text], ["夏 Лето 7"]) == [0.0]
    assert rouge_l([f"{text} 夏"], [text])[0] < 1


def test_rouge_of_ascii_is_that_of_the_package() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    texts = ["The re_d dog's 3.5 km RUN!", "a_dog -- isn't; red", "  ", "the dog ran 5 km, red_"]
    for first in texts:
        for second in texts:
            theirs = scorer.score(second, first)["rougeL"].fmeasure
            assert rouge_l([first], [second]) == [theirs]


def test_a_reward_model(reward_folder: Path, data: Path, rows: Rows) -> None:
    config = EvaluateConfig(model=str(reward_folder), data=str(data), batch_size=4)
    result = evaluate_reward_model(config)
    policy = load_policy(reward_folder)
    scorer, _ = load_scalar_model(reward_folder)
    right, loss = [], 0.0
    for row in rows[:9]:
        chosen, rejected = (
            run_one(scorer, sum(token_ids(policy, row, key), []))[-1]  # noqa: RUF017
            for key in ("chosen", "rejected")
        )
        right.append(float(chosen > rejected))
        loss -= torch.nn.functional.logsigmoid(chosen - rejected).item()
    assert result["rankings"] == 9
    assert result["reward_accuracy"] == pytest.approx(sum(right) / 9)
    assert result["loss"] == pytest.approx(loss / 9, rel=1e-5)


def test_accuracy_and_its_interval_weigh_pairs_alike(
    reward_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ranking of four in order and a pair that is not: 6 of 7, and each score taken once."""
    data = tmp_path / "ranked.jsonl"
    rankings = [["a", "b", "c", "d"], ["d", "a"]]
    data.write_text("".join(json.dumps({"prompt": "x", "ranked": r}) + "\n" for r in rankings))
    scored = []

    def count_down(model: Any, sequences: Any, batch_size: int) -> list[float]:
        scored.append(len(sequences))
        return [3.0, 2.0, 1.0, 0.0, 0.0, 3.0]

    monkeypatch.setattr("fuserl.evaluate._scores", count_down)
    result = evaluate_reward_model(EvaluateConfig(model=str(reward_folder), data=str(data)))
    assert scored == [6]
    assert result["reward_accuracy"] == pytest.approx(6 / 7)
    assert result["reward_accuracy_ci95"] == bootstrap_ci95([6, 0], [6, 1], seed=0) == (0.0, 1.0)
    differences = torch.tensor([1.0, 2, 3, 1, 2, 1, -3])
    loss = -torch.nn.functional.logsigmoid(differences).mean().item()
    assert result["loss"] == pytest.approx(loss, rel=1e-6)


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
    lender = dataclasses.replace(config, model="tiny", against=str(policy_folder))
    assert evaluate_policy(lender)[0]["loss"] == result["loss"]
    with pytest.raises(ValueError, match="untrained weights: say whose --tokenizer"):
        evaluate_policy(dataclasses.replace(config, model="tiny", against="small"))


@pytest.fixture
def other_folder(make_policy: Callable[..., Policy], tmp_path: Path) -> Path:
    make_policy(seed=7, init_std=0.1, template="other {prompt}").save(tmp_path / "other")
    return tmp_path / "other"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_against_another_policy(
    temperature: float, config: EvaluateConfig, other_folder: Path, rows: Rows
) -> None:
    alone, own_lines = evaluate_policy(dataclasses.replace(config, temperature=temperature))
    result, lines = evaluate_policy(
        dataclasses.replace(config, temperature=temperature, against=str(other_folder))
    )
    assert {name: result[name] for name in alone} == alone
    kl_temperature = 0.7 if temperature else 1.0
    assert result["kl_temperature"] == kl_temperature
    policy, other = load_policy(config.model), load_policy(other_folder)
    prompts = policy.encode([row["prompt"] for row in rows[:9]])  # the model's template for both
    theirs = other.generate(prompts, max_new_tokens=6, temperature=temperature).texts
    assert [line["against"]["completion"] for line in lines] == theirs
    assert [line["completion"] for line in lines] == [line["completion"] for line in own_lines]
    against = result["against"]
    assert against["model"] == str(other_folder)
    for name in ("rouge_l", "score"):
        gains = [line[name] - line["against"][name] for line in lines]
        assert result[f"{name}_gain"] == pytest.approx(sum(gains) / 9)
        assert result[f"{name}_gain"] == pytest.approx(result[name] - against[name])
        assert result[f"{name}_gain_ci95"] == bootstrap_ci95(gains, seed=config.seed)
    sampled = policy.generate(prompts, max_new_tokens=6, temperature=kl_temperature)
    total = 0.0
    for prompt, ids in zip(prompts, sampled.token_ids, strict=True):
        for sign, each in ((1, policy), (-1, other)):
            [logprobs] = each.logprobs([prompt], [ids], temperature=kl_temperature)
            total += sign * logprobs.sum().item()
    assert result["kl"] == pytest.approx(total / 9, abs=1e-4)
    assert abs(result["kl"]) > 0.1
    low, high = result["kl_ci95"]
    assert low < result["kl"] < high


def test_against_itself_nothing_is_gained(config: EvaluateConfig) -> None:
    result, _ = evaluate_policy(dataclasses.replace(config, against=config.model))
    for name in ("rouge_l_gain", "score_gain", "kl"):
        assert result[name] == 0
        assert result[f"{name}_ci95"] == (0, 0)
    assert result["against"]["loss"] == result["loss"]


def test_against_untrained_weights(
    config: EvaluateConfig, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    padded = make_policy(init_std=0.1, vocab_size=320)
    padded.save(tmp_path / "padded")  # it may sample ids that the tokenizer lacks
    options = dataclasses.replace(
        config, model=str(tmp_path / "padded"), against="tiny", reward_model=None, temperature=1.0
    )
    result, _ = evaluate_policy(options)
    assert result["against"]["model"] == "tiny"
    assert result["against"]["loss"] == pytest.approx(torch.tensor(320.0).log().item(), rel=0.25)
    assert "score_gain" not in result


def test_against_another_tokenizer_is_refused(config: EvaluateConfig, tmp_path: Path) -> None:
    policy = load_policy(config.model)
    policy.tokenizer = train_tokenizer(["quite another text"] * 5, 290)
    policy.save(tmp_path / "foreign")
    with pytest.raises(ValueError, match=r"policy .*foreign has another tokenizer"):
        evaluate_policy(dataclasses.replace(config, against=str(tmp_path / "foreign")))


def test_the_first_rows_only(config: EvaluateConfig) -> None:
    whole, lines = evaluate_policy(config)
    part, first = evaluate_policy(dataclasses.replace(config, limit=3))
    assert part["rows"] == 3
    assert [line["completion"] for line in first] == [line["completion"] for line in lines[:3]]
    assert whole["rows"] == 9


def test_a_limit_keeps_places_and_counts(
    config: EvaluateConfig, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with data.open("a") as file:
        file.write('{"prompt": "no completion"}\n')
    limited = dataclasses.replace(config, limit=2)
    with pytest.raises(ValueError, match=r"rows\.jsonl:10: "):
        evaluate_policy(limited)
    evaluate_policy(dataclasses.replace(limited, skip_bad_rows=True))
    said = capsys.readouterr().out
    assert "10 rows: 9 kept, 1 bad skipped" in said
    assert "the first 2 of the rows kept" in said


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
    for name in ("result.json", "lines.jsonl", "bare"):
        out = tmp_path / "new" / name
        run_evaluate(dataclasses.replace(config, out=str(out)))
        result = json.loads(out.read_text())
        assert result["rows"] == 9
        beside = out.with_name(f"{out.stem}.completions.jsonl")
        assert len(beside.read_text().splitlines()) == 9


def test_pairs_that_make_no_sense(config: EvaluateConfig, policy_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is no reward model: it has no score\.weight"):
        evaluate_policy(dataclasses.replace(config, reward_model=str(policy_folder)))
    with pytest.raises(ValueError, match="is itself a reward model"):
        run_evaluate(dataclasses.replace(config, model=str(config.reward_model)))
    against = dataclasses.replace(
        config, model=str(config.reward_model), reward_model=None, against=str(policy_folder)
    )
    with pytest.raises(ValueError, match="against is for policies"):
        run_evaluate(against)


def test_devices_that_are_none() -> None:
    with pytest.raises(ValueError, match="device must be cpu, cuda or cuda:N, got 'foo'"):
        default_device("foo")
    assert default_device("cpu").type == "cpu"


def test_a_folder_without_a_tokenizer_says_what_to_do(
    config: EvaluateConfig, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    save_model(make_policy().model, tmp_path / "bare")
    bare = dataclasses.replace(config, model=str(tmp_path / "bare"))
    remedy = r"bare has no tokenizer files.*tokenizer\.save_pretrained\(folder\)"
    with pytest.raises(ValueError, match=remedy):
        evaluate_policy(bare)
    with pytest.raises(ValueError, match=remedy):
        evaluate_policy(dataclasses.replace(config, model="tiny", tokenizer=bare.model))


def test_the_interval_holds_the_mean_and_shrinks() -> None:
    few = [0.0, 1.0] * 10
    many = few * 40
    low, high = bootstrap_ci95(few, seed=0)
    assert low < 0.5 < high
    narrow = bootstrap_ci95(many, seed=0)
    assert high - low > 4 * (narrow[1] - narrow[0])
    assert bootstrap_ci95(few, seed=0) == (low, high)
    assert bootstrap_ci95([0.25] * 5, seed=1) == (0.25, 0.25)


def test_the_interval_of_sums_is_that_of_what_they_sum() -> None:
    assert bootstrap_ci95([3.0, 12.0, 6.0], [1, 4, 2], seed=0) == (3.0, 3.0)
    low, high = bootstrap_ci95([8.0] * 30 + [0.0] * 30, [9] * 30 + [1] * 30, seed=0)
    assert low < 0.8 < high  # the mean of means would be 4 / 9
    assert low > 4 / 9

"""`fuserl evaluate`: what a policy or a reward model is worth on held-out rows."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fuserl.config import EvaluateConfig
from fuserl.data.examples import PromptCompletion, Ranking, load_completions, load_rankings
from fuserl.data.rows import read_rows
from fuserl.device import default_device
from fuserl.model.config import SMALL_NAMES
from fuserl.model.folder import is_reward_model, load_scalar_model, resolve_folder
from fuserl.model.heads import ScalarModel
from fuserl.policy import Policy
from fuserl.rouge import rouge_l
from fuserl.stages.opening import (
    loading,
    open_notes,
    open_policy,
    open_tokenizer,
    tell,
    untrained_policy,
)
from fuserl.stages.reward import PairwiseLoss
from fuserl.stages.sft import CompletionLoss
from fuserl.stages.supervised import evaluate_on
from fuserl.statistics import bootstrap_ci95


def run_evaluate(config: EvaluateConfig) -> None:
    """Print the result as JSON, or write it to config.out with the completions beside it."""
    if config.model not in SMALL_NAMES and is_reward_model(resolve_folder(config.model)):
        if config.reward_model is not None:
            raise ValueError(
                f"reward_model judges a policy's completions, and {config.model} is itself a "
                "reward model"
            )
        result = evaluate_reward_model(config)
        lines: list[dict[str, Any]] = []
    else:
        result, lines = evaluate_policy(config)
    text = json.dumps(result, indent=2)
    print(text)
    if config.out is not None:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        Path(config.out).write_text(text + "\n", encoding="utf-8")
        if lines:
            Path(config.out).with_suffix(".jsonl").write_text(
                "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
                encoding="utf-8",
            )


def evaluate_reward_model(config: EvaluateConfig) -> dict[str, Any]:
    """Loss and accuracy over all pairs; equal scores count half."""
    folder = resolve_folder(config.model)
    model, _ = load_scalar_model(folder, device=default_device(config.device))
    rankings, counts = load_rankings(
        _rows(config),
        open_tokenizer(folder, config),
        max_length=min(config.max_length, model.config.max_positions),
        **loading(config, open_notes(folder, config)),
    )
    tell("rows", counts)
    found = evaluate_on(PairwiseLoss(model, rankings), config.batch_size)
    accuracy = [float(correct) for correct in _each_accuracy(model, rankings, config.batch_size)]
    return {
        "model": config.model,
        "data": config.data,
        "rankings": len(rankings),
        "loss": float(found["validation/loss"]),
        "reward_accuracy": float(found["validation/accuracy"]),
        "reward_accuracy_ci95": bootstrap_ci95(accuracy, seed=config.seed),
    }


def evaluate_policy(config: EvaluateConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Loss of the rows' completions, ROUGE-L of the policy's against them, and with a reward
    model its scores of both: the policy wins a row where its completion scores higher."""
    policy = _policy(config)
    tokenizer = policy.text_tokenizer
    examples, counts = load_completions(
        _rows(config),
        tokenizer,
        max_length=min(config.max_length, policy.model.config.max_positions),
        **loading(config, policy.notes),
    )
    tell("rows", counts)
    loss = float(evaluate_on(CompletionLoss(policy.model, examples), 16)["validation/loss"])
    out = policy.generate(
        [example.prompt_ids for example in examples],
        max_new_tokens=[
            min(config.max_new_tokens, policy.model.config.max_positions - len(example.prompt_ids))
            for example in examples
        ],
        temperature=config.temperature,
        seed=config.seed,
        batch_size=config.batch_size,
    )
    texts = [tokenizer.decode(token_ids) for token_ids in out.token_ids]
    references = [tokenizer.decode(example.completion_ids) for example in examples]
    rouge = rouge_l(texts, references)
    result: dict[str, Any] = {
        "model": config.model,
        "data": config.data,
        "rows": len(examples),
        "loss": loss,
        "rouge_l": sum(rouge) / len(rouge),
        "rouge_l_ci95": bootstrap_ci95(rouge, seed=config.seed),
        "completion_tokens": sum(map(len, out.token_ids)) / len(examples),
    }
    lines = [
        {
            "prompt": tokenizer.decode(example.prompt_ids),
            "completion": text,
            "reference": reference,
            "rouge_l": score,
        }
        for example, text, reference, score in zip(
            examples, texts, references, rouge, strict=True
        )
    ]
    if config.reward_model is not None:
        ours, theirs = _judge(config, policy, examples, out.token_ids)
        wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(ours, theirs, strict=True)]
        result["reward_model"] = config.reward_model
        result["score"] = sum(ours) / len(ours)
        result["score_ci95"] = bootstrap_ci95(ours, seed=config.seed)
        result["reference_score"] = sum(theirs) / len(theirs)
        result["win_rate"] = sum(wins) / len(wins)
        result["win_rate_ci95"] = bootstrap_ci95(wins, seed=config.seed)
        for line, score, reference_score in zip(lines, ours, theirs, strict=True):
            line.update(score=score, reference_score=reference_score)
    return result, lines


def _rows(config: EvaluateConfig) -> list[dict[str, Any]] | str:
    if config.limit is None:
        return config.data
    rows, _ = read_rows(config.data, skip_bad_rows=config.skip_bad_rows)
    return [row.fields for row in rows[: config.limit]]


def _policy(config: EvaluateConfig) -> Policy:
    if config.model not in SMALL_NAMES:
        if config.tokenizer is not None:
            raise ValueError(f"tokenizer is for untrained weights: {config.model} has its own")
        return open_policy(config)
    if config.tokenizer is None:
        raise ValueError(f"model {config.model!r} is untrained weights: say whose --tokenizer")
    folder = resolve_folder(config.tokenizer)
    tokenizer = open_tokenizer(folder, config)
    return untrained_policy(config, tokenizer, open_notes(folder, config))


@torch.no_grad()
def _judge(
    config: EvaluateConfig,
    policy: Policy,
    examples: Sequence[PromptCompletion],
    completions: Sequence[Sequence[int]],
) -> tuple[list[float], list[float]]:
    """The reward model's scores of the policy's completions and of the rows' own."""
    assert config.reward_model is not None
    folder = resolve_folder(config.reward_model)
    model, head_is_new = load_scalar_model(folder, device=default_device(config.device))
    if head_is_new:
        raise ValueError(f"{folder} is no reward model: it has no score.weight")
    if not open_tokenizer(folder, config).same_ids(policy.text_tokenizer):
        raise ValueError(f"the reward model {folder} has another tokenizer than {config.model}")
    pairs = [
        Ranking(example.prompt_ids, (tuple(ours), example.completion_ids), example.where)
        for example, ours in zip(examples, completions, strict=True)
    ]
    scores = _scores(model, pairs, config.batch_size)
    return scores[::2], scores[1::2]


def _scores(model: ScalarModel, rankings: Sequence[Ranking], batch_size: int) -> list[float]:
    """Scores of all completions, in the rankings' order."""
    judge = PairwiseLoss(model, rankings)
    scores: list[float] = []
    for first in range(0, len(rankings), batch_size):
        scores += judge.scores(rankings[first : first + batch_size]).tolist()
    return scores


@torch.no_grad()
def _each_accuracy(model: ScalarModel, rankings: Sequence[Ranking], batch_size: int) -> list[float]:
    """The share of each ranking's pairs that are in order."""
    scores = iter(_scores(model, rankings, batch_size))
    shares = []
    for ranking in rankings:
        own = [next(scores) for _ in ranking.completions]
        pairs = [(a, b) for i, a in enumerate(own) for b in own[i + 1 :]]
        shares.append(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))
    return shares

"""`fuserl evaluate`: what a policy or a reward model is worth on held-out rows."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from fuserl.config import EvaluateConfig
from fuserl.data.examples import PromptCompletion, load_completions, load_rankings
from fuserl.device import default_device
from fuserl.generation import Generation
from fuserl.model.config import SMALL_NAMES
from fuserl.model.folder import is_reward_model, load_scalar_model
from fuserl.model.heads import ScalarModel
from fuserl.model.hub import resolve_folder
from fuserl.policy import Policy
from fuserl.rouge import rouge_l
from fuserl.sequences import Sequences, last_values
from fuserl.stages.opening import (
    loading,
    open_notes,
    open_policy,
    open_tokenizer,
    tell,
    untrained_policy,
)
from fuserl.stages.rl_models import check_same_ids, load_reward_model
from fuserl.stages.sft import CompletionLoss
from fuserl.stages.supervised import evaluate_on
from fuserl.statistics import bootstrap_ci95

Example = TypeVar("Example")


def run_evaluate(config: EvaluateConfig) -> None:
    """Print the result as JSON, or write it to config.out too, with the completions beside it."""
    if config.model not in SMALL_NAMES and is_reward_model(resolve_folder(config.model)):
        for name in ("reward_model", "against"):
            if getattr(config, name) is not None:
                raise ValueError(f"{name} is for policies: {config.model} is itself a reward model")
        result = evaluate_reward_model(config)
        lines: list[dict[str, Any]] = []
    else:
        result, lines = evaluate_policy(config)
    text = json.dumps(result, indent=2)
    print(text)
    if config.out is not None:
        out = Path(config.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")
        if lines:
            out.with_suffix(".completions.jsonl").write_text(
                "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
                encoding="utf-8",
            )


def evaluate_reward_model(config: EvaluateConfig) -> dict[str, Any]:
    """Loss and accuracy are means over all pairs, where equal scores count half; the interval
    draws whole rankings, as the pairs of one are not independent."""
    folder = resolve_folder(config.model)
    model, _ = load_scalar_model(folder, device=default_device(config.device))
    rankings, counts = load_rankings(
        config.data,
        open_tokenizer(folder, config),
        max_length=min(config.max_length, model.config.max_positions),
        **loading(config, open_notes(folder, config)),
    )
    tell("rows", counts)
    rankings = _first(rankings, config)
    scores = iter(
        _scores(
            model,
            [(*r.prompt_ids, *completion) for r in rankings for completion in r.completions],
            config.batch_size,
        )
    )
    loss, correct, num_pairs = 0.0, [], []  # a ranking: pairs in order, pairs
    for ranking in rankings:
        own = torch.tensor([next(scores) for _ in ranking.completions])
        better, worse = torch.combinations(own).unbind(1)  # earlier ones are better
        loss -= torch.nn.functional.logsigmoid(better - worse).sum().item()
        correct.append(((better > worse) + 0.5 * (better == worse)).sum().item())
        num_pairs.append(len(better))
    return {
        "model": config.model,
        "data": config.data,
        "rankings": len(rankings),
        "loss": loss / sum(num_pairs),
        "reward_accuracy": sum(correct) / sum(num_pairs),
        "reward_accuracy_ci95": bootstrap_ci95(correct, num_pairs, seed=config.seed),
    }


def evaluate_policy(config: EvaluateConfig) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Loss of the rows' completions, ROUGE-L of the policy's against them, and with a reward
    model its scores of both: the policy wins a row where its completion scores higher.

    config.against is measured on the same prompt ids, those of the model's template. The gains
    are the model's numbers minus its, their intervals over the rows' differences. kl is the
    mean over rows of log p(completion) - log q(completion), in nats, p the model and q the
    other, of completions sampled from p: at the temperature, or at 1 where that is 0, as greedy
    completions estimate no KL. Both distributions are taken at that kl_temperature.
    """
    policies = _policies(config)
    policy = policies[0]
    tokenizer = policy.text_tokenizer
    positions = min(each.model.config.max_positions for each in policies)
    examples, counts = load_completions(
        config.data,
        tokenizer,
        max_length=min(config.max_length, positions),
        **loading(config, policy.notes),
    )
    tell("rows", counts)
    examples = _first(examples, config)
    references = [tokenizer.decode(example.completion_ids) for example in examples]
    results: list[dict[str, Any]] = []  # one a policy
    answers: list[list[dict[str, Any]]] = []  # one a policy and row
    outs = [_complete(each, examples, config, config.temperature) for each in policies]
    for each, out in zip(policies, outs, strict=True):
        texts = [tokenizer.decode(token_ids) for token_ids in out.token_ids]
        rouge = rouge_l(texts, references)
        loss = evaluate_on(CompletionLoss(each.model, examples), 16)["validation/loss"]
        results.append(
            {
                "model": each.source,
                "loss": float(loss),
                **_mean("rouge_l", rouge, config),
                "completion_tokens": sum(map(len, out.token_ids)) / len(examples),
            }
        )
        answers.append(
            [
                {"completion": text, "rouge_l": score}
                for text, score in zip(texts, rouge, strict=True)
            ]
        )
    rows: list[dict[str, Any]] = [
        {"prompt": tokenizer.decode(example.prompt_ids), "reference": reference}
        for example, reference in zip(examples, references, strict=True)
    ]
    result: dict[str, Any] = {"model": config.model, "data": config.data, "rows": len(examples)}
    if config.reward_model is not None:
        candidates: list[Sequence[Sequence[int]]] = [out.token_ids for out in outs]
        candidates.append([example.completion_ids for example in examples])
        *all_scores, reference_scores = _judge(config, policy, examples, candidates)
        result["reward_model"] = config.reward_model
        result["reference_score"] = sum(reference_scores) / len(reference_scores)
        for row, score in zip(rows, reference_scores, strict=True):
            row["reference_score"] = score
        for measured, answer, scores in zip(results, answers, all_scores, strict=True):
            wins = [
                (ours > theirs) + 0.5 * (ours == theirs)
                for ours, theirs in zip(scores, reference_scores, strict=True)
            ]
            measured |= _mean("score", scores, config) | _mean("win_rate", wins, config)
            for line, score in zip(answer, scores, strict=True):
                line["score"] = score
    result |= results[0]
    for row, line in zip(rows, answers[0], strict=True):
        row |= line
    if config.against is not None:
        result["against"] = results[1]
        for row, line in zip(rows, answers[1], strict=True):
            row["against"] = line
        for name in ("rouge_l",) if config.reward_model is None else ("rouge_l", "score"):
            gain = [row[name] - row["against"][name] for row in rows]
            result |= _mean(f"{name}_gain", gain, config)
        temperature = config.temperature or 1.0
        out = outs[0] if config.temperature else _complete(policy, examples, config, temperature)
        log_ratios = _log_ratios(policies, examples, out, temperature, config.batch_size)
        result |= _mean("kl", log_ratios, config) | {"kl_temperature": temperature}
    return result, rows


def _first(examples: list[Example], config: EvaluateConfig) -> list[Example]:
    if config.limit is None or config.limit >= len(examples):
        return examples
    print(f"the first {config.limit:,} of the rows kept are used", flush=True)
    return examples[: config.limit]


def _policies(config: EvaluateConfig) -> list[Policy]:
    """The model and, where there is one, the policy it is measured against."""
    policy = _policy(config)
    if config.against is None:
        return [policy]
    beside = dataclasses.replace(config, model=config.against)
    if config.against in SMALL_NAMES:
        size = policy.model.config.vocab_size  # any id the model may sample
        other = untrained_policy(beside, policy.text_tokenizer, policy.notes, size)
    else:
        other = open_policy(beside)
        check_same_ids(other.model.config, other.tokenizer, policy, f"policy {config.against}")
    return [policy, other]


def _policy(config: EvaluateConfig) -> Policy:
    """Untrained weights take tokenizer and templates of --tokenizer, else of --against."""
    if config.model not in SMALL_NAMES:
        if config.tokenizer is not None:
            raise ValueError(f"tokenizer is for untrained weights: {config.model} has its own")
        return open_policy(config)
    source = config.tokenizer or (None if config.against in SMALL_NAMES else config.against)
    if source is None:
        raise ValueError(f"model {config.model!r} is untrained weights: say whose --tokenizer")
    folder = resolve_folder(source)
    tokenizer = open_tokenizer(folder, config)
    return untrained_policy(config, tokenizer, open_notes(folder, config))


def _complete(
    policy: Policy,
    examples: Sequence[PromptCompletion],
    config: EvaluateConfig,
    temperature: float,
) -> Generation:
    positions = policy.model.config.max_positions
    out = policy.generate(
        [example.prompt_ids for example in examples],
        max_new_tokens=[
            min(config.max_new_tokens, positions - len(example.prompt_ids)) for example in examples
        ],
        temperature=temperature,
        seed=config.seed,
        num_slots=config.num_slots,
    )
    policy.release()  # another policy and the judge want the memory, and no call like it follows
    return out


def _log_ratios(
    policies: Sequence[Policy],
    examples: Sequence[PromptCompletion],
    out: Generation,
    temperature: float,
    batch_size: int,
) -> list[float]:
    """log p - log q of each row's whole completion, p the first policy and q the second."""
    sums: list[list[float]] = []
    for policy in policies:
        sums.append([])
        for first in range(0, len(examples), batch_size):
            part = slice(first, first + batch_size)
            logprobs = policy.logprobs(
                [example.prompt_ids for example in examples[part]],
                out.token_ids[part],
                temperature=temperature,
            )
            sums[-1] += [row.sum().item() for row in logprobs]
    return [p - q for p, q in zip(*sums, strict=True)]


def _mean(name: str, values: Sequence[float], config: EvaluateConfig) -> dict[str, Any]:
    return {
        name: sum(values) / len(values),
        f"{name}_ci95": bootstrap_ci95(values, seed=config.seed),
    }


def _judge(
    config: EvaluateConfig,
    policy: Policy,
    examples: Sequence[PromptCompletion],
    candidates: Sequence[Sequence[Sequence[int]]],
) -> list[list[float]]:
    """The reward model's scores of the candidates, [candidates][rows]."""
    assert config.reward_model is not None
    folder = resolve_folder(config.reward_model)
    model = load_reward_model(folder, policy, torch.float32)
    scores = _scores(
        model,
        [
            (*example.prompt_ids, *completion)
            for example, *completions in zip(examples, *candidates, strict=True)
            for completion in completions
        ],
        config.batch_size * len(candidates),
    )
    return [scores[i :: len(candidates)] for i in range(len(candidates))]


@torch.no_grad()
def _scores(model: ScalarModel, sequences: Sequence[Sequence[int]], batch_size: int) -> list[float]:
    """The head at the last token of each sequence. Equal sequences are computed once: they have
    equal scores to the bit."""
    distinct = list(dict.fromkeys(tuple(sequence) for sequence in sequences))
    scores: list[float] = []
    for first in range(0, len(distinct), batch_size):
        part = distinct[first : first + batch_size]
        packed = Sequences.of(part, [()] * len(part), model.device)
        scores += last_values(model, packed).tolist()
    score_of = dict(zip(distinct, scores, strict=True))
    return [score_of[tuple(sequence)] for sequence in sequences]

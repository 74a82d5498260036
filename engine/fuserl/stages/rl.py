"""Reinforcement learning: rollout, score, shape, update, over one frozen batch record."""

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuserl.algorithms import ALGORITHMS
from fuserl.batch import RolloutBatch, ShapedBatch
from fuserl.checkpoint import digest
from fuserl.config import RLConfig
from fuserl.data.batching import epoch_batches
from fuserl.data.examples import Prompt, load_prompts
from fuserl.data.rows import Source, source_name
from fuserl.metrics import read_metrics
from fuserl.model.folder import load_scalar_model, resolve_folder, save_model, write_notes
from fuserl.model.heads import LanguageModel, ScalarModel
from fuserl.optimizer import Optimizer
from fuserl.policy import Policy, load_policy
from fuserl.rewards import FunctionReward, ModelReward, Reward, RewardFunction, observe
from fuserl.rollout.decode import decode
from fuserl.rollout.sampling import SamplingParams
from fuserl.run import Run, prepare_folder
from fuserl.scoring import score
from fuserl.sequences import mask_of_lengths
from fuserl.shaping import shape
from fuserl.stages.opening import (
    loading,
    open_notes,
    open_tokenizer,
    room_for_prompts,
    tell,
    with_options,
)
from fuserl.tokenizer import load_tokenizer
from fuserl.update import update


class RLTrainer:
    """RLTrainer(policy, data="prompts.jsonl", reward=fn, algorithm="ppo", out="runs/rl").train()

    policy: a Policy, a folder or a hub id. reward: a reward model's folder, or a function (see
    rewards.RewardFunction). monitors: functions that are logged under their names and not
    trained on. options: RLConfig's fields.
    """

    def __init__(
        self,
        policy: str | Path | Policy,
        *,
        data: Source,
        out: str | Path,
        reward: str | Path | RewardFunction,
        monitors: Mapping[str, RewardFunction] | None = None,
        **options: Any,
    ) -> None:
        self._data, self._reward, self._monitors = data, reward, monitors or {}
        self._given = policy if isinstance(policy, Policy) else None
        self.config = RLConfig(
            model=policy.source if isinstance(policy, Policy) else str(policy),
            data=source_name(data),
            out=str(out),
            reward_model=None if callable(reward) else str(reward),
            **options,
        )

    def train(self) -> dict[str, Any]:
        """Train and save the policy (and the critic, in `critic/`); returns what summary.json
        says."""
        config = self.config
        if (finished := prepare_folder(config)) is not None:
            return finished
        policy = self._policy()
        prompts = self._prompts(policy)
        num_tokens = sum(len(prompt.ids) for prompt in prompts)
        facts: dict[str, Any] = {"data": {"rows": len(prompts), "tokens": num_tokens}}
        facts["starting policy"] = digest(policy.model)
        reference = copy.deepcopy(policy.model).requires_grad_(False)
        reward, critic = self._reward_and_critic(policy)
        monitors = {
            name: FunctionReward(function, policy.tokenizer, at_tokens=False)
            for name, function in self._monitors.items()
        }
        modules: dict[str, torch.nn.Module] = {"policy": policy.model}
        if critic is not None:
            modules["critic"] = critic
        num_epochs = config.num_epochs or ALGORITHMS[config.algorithm].num_epochs
        optimizer = Optimizer(
            modules,
            config,
            total_steps=config.steps * num_epochs * config.num_minibatches,
            learning_rates={"critic": config.critic_learning_rate or config.learning_rate},
        )
        with Run(
            "rl",
            config,
            total_steps=config.steps,
            modules=modules,
            optimizer=optimizer,
            facts=facts,
        ) as run:
            for step in run.steps():
                clock = Clock()
                chosen = choose_prompts(prompts, config, step)
                batch = rollout(policy, chosen, config, step=step, run=run)
                clock.lap("rollout")
                run.check()
                batch = score(
                    batch,
                    chosen,
                    reward=reward,
                    reference=reference,
                    critic=critic,
                    temperature=config.temperature,
                    microbatch_size=config.microbatch_size,
                )
                clock.lap("score")
                batch = shape(batch, config)
                clock.lap("shape")
                watched = observe(monitors, batch, chosen)  # before weights move: it may raise
                if monitors:
                    clock.lap("monitors")
                learned = update(
                    policy.model, critic, optimizer, batch, config, seed=config.seed + step
                )
                clock.lap("update")
                metrics: dict[str, float | Tensor] = {
                    **describe(batch),
                    **learned,
                    **watched,
                    **clock.metrics(batch),
                }
                run.log(step, metrics, show=("objective/scores", "objective/kl"))
            policy.save(run.out)
            if critic is not None:
                save_critic(critic, policy, run.out / "critic")
            return run.finish({"steps": config.steps, **summarize(run.out / "metrics.jsonl")})

    def _policy(self) -> Policy:
        config = self.config
        if self._given is not None:
            return with_options(self._given, config)
        folder = resolve_folder(config.model)
        policy = load_policy(folder, device=config.device, dtype=torch.float32)
        policy.tokenizer = open_tokenizer(folder, config)
        policy.notes = open_notes(folder, config)
        return policy

    def _prompts(self, policy: Policy) -> list[Prompt]:
        config = self.config
        if policy.tokenizer is None:
            raise ValueError(f"{config.model} has no tokenizer files, and the rows are text")
        room = room_for_prompts(policy.model.config, config.max_new_tokens)
        prompts, counts = load_prompts(
            self._data,
            policy.tokenizer,
            max_prompt_length=min(config.max_prompt_length, room),
            **loading(config, policy.notes),
        )
        tell("prompts", counts)
        return prompts

    def _reward_and_critic(self, policy: Policy) -> tuple[Reward, ScalarModel | None]:
        config = self.config
        at_tokens = config.reward_at == "token"
        device = policy.model.device
        scorer: ScalarModel | None = None
        if callable(self._reward):
            reward: Reward = FunctionReward(self._reward, policy.tokenizer, at_tokens=at_tokens)
        else:
            scorer = _trained_scorer(resolve_folder(self._reward), policy, device)
            reward = ModelReward(
                scorer.requires_grad_(False),
                microbatch_size=config.microbatch_size,
                at_tokens=at_tokens,
            )
        if not ALGORITHMS[config.algorithm].has_critic:
            return reward, None
        if config.critic_model is not None:
            folder = resolve_folder(config.critic_model)
            critic, _ = load_scalar_model(folder, device=device, head_seed=config.seed)
            _check_same_ids(critic, folder, policy, "critic")
            return reward, critic
        if scorer is not None:
            return reward, copy.deepcopy(scorer).requires_grad_(True)
        return reward, _critic_on_trunk(policy.model, config.seed)


def choose_prompts(prompts: Sequence[Prompt], config: RLConfig, step: int) -> list[Prompt]:
    """The prompts of one rollout, num_samples times each: a function of (seed, step) alone, so
    that a resumed run sees the same. A data set smaller than a batch is gone through again."""
    per_epoch = max(1, len(prompts) // config.batch_size)
    epoch, batch = divmod(step, per_epoch)
    order = epoch_batches([0] * len(prompts), len(prompts), seed=config.seed, epoch=epoch)[0]
    first = batch * config.batch_size
    chosen = [prompts[order[i % len(order)]] for i in range(first, first + config.batch_size)]
    return [prompt for prompt in chosen for _ in range(config.num_samples)]


def rollout(
    policy: Policy, prompts: Sequence[Prompt], config: RLConfig, *, step: int, run: Run
) -> RolloutBatch:
    """Sample one completion for each of `prompts` (samples of one prompt stand together)."""
    out = decode(
        policy.model,
        [prompt.ids for prompt in prompts[:: config.num_samples]],
        max_new_tokens=config.max_new_tokens,
        sampling=SamplingParams(temperature=config.temperature, seed=config.seed),
        eos_token_id=policy.eos_token_id,
        num_samples=config.num_samples,
        request_ids=range(step * len(prompts), (step + 1) * len(prompts)),
        on_step=run.check,
    )
    # One slot more than the longest completion, where the limit leaves room for it.
    width = min(config.max_new_tokens, out.token_ids.shape[1] + 1)
    padding = (0, width - out.token_ids.shape[1])
    return RolloutBatch(
        prompts=out.prompts,
        prompt_lengths=out.prompt_lengths,
        completions=torch.nn.functional.pad(out.token_ids, padding),
        completion_lengths=out.lengths,
        has_eos=out.has_eos,
        loss_mask=mask_of_lengths(out.lengths, width),
        logprobs=torch.nn.functional.pad(out.logprobs, padding),
    )


def describe(batch: ShapedBatch) -> dict[str, Tensor]:
    """What one shaped batch says, under the names users know; KL and entropy are summed over a
    sequence and averaged over sequences, in nats. Sequences left out enter no mean but that of
    the lengths."""
    included = batch.loss_mask.any(1)

    def mean(of_sequence: Tensor) -> Tensor:
        return torch.where(included, of_sequence, 0).sum() / included.sum().clamp(min=1)

    return {
        "objective/scores": mean(batch.scores if batch.scores.ndim == 1 else batch.scores.sum(1)),
        "objective/kl": mean(batch.kl.sum(1)),
        "objective/entropy": mean(-batch.logprobs.sum(1)),
        "objective/rlhf_reward": mean(batch.rewards.sum(1)),
        "objective/completion_length": batch.completion_lengths.float().mean(),
        "objective/excluded": (~included).sum(),
        "val/num_eos_tokens": batch.has_eos.sum(),
    }


class Clock:
    """Seconds and tokens per second of each phase of a step."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self._seconds[phase] = now - self._last
        self._last = now

    def metrics(self, batch: RolloutBatch) -> dict[str, float]:
        """Tokens are the completions': what the step is for."""
        num_tokens = int(batch.completion_lengths.sum())
        metrics = {f"seconds/{phase}": seconds for phase, seconds in self._seconds.items()}
        for phase, seconds in self._seconds.items():
            metrics[f"throughput/{phase}_tokens_per_second"] = num_tokens / seconds
        return metrics


def _trained_scorer(folder: Path, policy: Policy, device: torch.device) -> ScalarModel:
    """A reward model that reads the policy's token ids as they are."""
    model, head_is_new = load_scalar_model(folder, device=device)
    if head_is_new:
        raise ValueError(f"{folder} is no reward model: it has no score.weight")
    _check_same_ids(model, folder, policy, "reward model")
    return model


def _check_same_ids(model: ScalarModel, folder: Path, policy: Policy, name: str) -> None:
    """Refuse a model that would read other tokens out of the policy's ids."""
    tokenizer = load_tokenizer(folder)
    if tokenizer and policy.tokenizer and not tokenizer.same_ids(policy.tokenizer):
        raise ValueError(
            f"the {name} {folder} has another tokenizer than the policy {policy.source}: "
            "train it from the policy's folder"
        )
    if model.config.vocab_size < policy.model.config.vocab_size:
        raise ValueError(
            f"the {name} {folder} has vocab_size {model.config.vocab_size}, and the policy "
            f"{policy.source} {policy.model.config.vocab_size}: it may sample ids beyond it"
        )


def _critic_on_trunk(model: LanguageModel, seed: int) -> ScalarModel:
    critic = ScalarModel(model.config).to(model.device)
    critic.model.load_state_dict(model.model.state_dict())
    critic.initialize_head(seed)
    return critic


def save_critic(critic: ScalarModel, policy: Policy, folder: Path) -> None:
    save_model(critic, folder)
    if policy.tokenizer:
        policy.tokenizer.save(folder)
    write_notes(policy.notes, folder)


def summarize(metrics_file: Path) -> dict[str, float]:
    """Means over the first and the last tenth of the steps."""
    lines = [line for line in read_metrics(metrics_file) if line["stage"] == "rl"]
    tenth = max(1, len(lines) // 10)

    def mean(name: str, part: Sequence[Mapping[str, Any]]) -> float:
        return sum(line[name] for line in part) / len(part)

    return {
        "scores_first": mean("objective/scores", lines[:tenth]),
        "scores_last": mean("objective/scores", lines[-tenth:]),
        "kl": mean("objective/kl", lines[-tenth:]),
        "rollout_tokens_per_second": mean("throughput/rollout_tokens_per_second", lines),
    }

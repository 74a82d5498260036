"""Reinforcement learning: rollout, score, shape, update, over one frozen batch record."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fuserl.checkpoint import digest, digest_ids
from fuserl.config import RLConfig
from fuserl.data.examples import Prompt, load_prompts
from fuserl.data.rows import Source, source_name
from fuserl.exactness import make_exact
from fuserl.optimizer import Optimizer
from fuserl.policy import Policy
from fuserl.recompute import describe_recomputed, recompute
from fuserl.rewards import FunctionReward, ModelReward, RewardFunction, observe, once
from fuserl.rollout.collect import choose_prompts, rollout
from fuserl.rollout.engine import RolloutFacts
from fuserl.rollout.kept_runner import RolloutMemory
from fuserl.rollout.room import with_room
from fuserl.run import Run, prepare_folder
from fuserl.scoring import score
from fuserl.shaping import shape
from fuserl.stages.opening import loading, open_policy, room_for_prompts, tell
from fuserl.stages.rl_metrics import Clock, describe, hydra_savings, summarize
from fuserl.stages.rl_models import RLModels, open_models, save_critic
from fuserl.stages.trainable import make_trainable, save_trained, training_dtype
from fuserl.streamed_reward import reward_of
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
        if (finished := prepare_folder("rl", config)) is not None:
            return finished
        policy = open_policy(config, self._given, dtype=training_dtype(config))
        make_trainable(policy.model, config)
        if config.exact:
            make_exact(policy.model, config.temperature)
        prompts = self._prompts(policy)
        models = open_models(config, self._reward, policy)
        modules: dict[str, nn.Module] = {"policy": policy.model}
        if models.critic is not None:
            modules["critic"] = models.critic
        optimizer = Optimizer(
            modules,
            config,
            total_steps=config.steps * config.passes * config.num_minibatches,
            learning_rates={"critic": config.critic_learning_rate or config.learning_rate},
        )
        facts = {
            "data": digest_ids((prompt.ids,) for prompt in prompts),
            "starting policy": digest(policy.model),
        }
        if isinstance(models.reward, ModelReward):
            facts["reward model"] = digest(models.reward.model)
        if models.critic is not None:
            facts["starting critic"] = digest(models.critic)
        with Run(
            "rl",
            config,
            total_steps=config.steps,
            modules=modules,
            optimizer=optimizer,
            facts=facts,
        ) as run:
            self._learn(run, policy, prompts, models, optimizer)
            policy.model = save_trained(
                run.out, policy.model, policy.tokenizer, policy.notes, base=policy.source
            )
            if models.critic is not None:
                save_critic(models.critic, policy, run.out)
            return run.finish({"steps": config.steps, **summarize(run.out / "metrics.jsonl")})

    def _learn(
        self,
        run: Run,
        policy: Policy,
        prompts: list[Prompt],
        models: RLModels,
        optimizer: Optimizer,
    ) -> None:
        """The loop."""
        config = self.config
        monitors = {
            name: FunctionReward(function, policy.tokenizer, at_tokens=False)
            for name, function in self._monitors.items()
        }
        memory = RolloutMemory()
        for step in run.steps():
            clock, facts = Clock(), RolloutFacts()
            chosen = choose_prompts(prompts, config, step)
            with reward_of(models.reward, chosen, config) as (reward, on_completion):
                with clock.lap("rollout"):
                    sampled = rollout(
                        policy.model,
                        chosen,
                        config,
                        eos_token_ids=policy.eos_token_ids,
                        step=step,
                        on_step=run.check,
                        on_completion=on_completion,
                        facts=facts,
                        memory=memory,
                    )
                with clock.lap("score"):
                    scoring = partial(
                        score,
                        sampled,
                        chosen,
                        reward=once(reward),
                        reference=models.reference,
                        critic=models.critic,
                        temperature=config.temperature,
                        microbatch_size=config.microbatch_size,
                    )
                    scored = with_room(memory, "scoring", scoring)
            if config.old_logprobs == "recomputed":
                with clock.lap("recompute"):
                    recomputing = partial(recompute, scored, policy.model, config)
                    scored = with_room(memory, "recomputing log-probabilities", recomputing)
            with clock.lap("shape"):
                shaped = shape(scored, config)
            watched = observe(monitors, shaped, chosen)  # before weights move: it may raise
            run.check()
            with clock.lap("update"):
                seed, undo = config.seed + step, partial(optimizer.undo_since, optimizer.steps)
                learning = partial(
                    update, policy.model, models.critic, optimizer, shaped, config, seed=seed
                )
                learned = with_room(memory, "the update", learning, begin_again=undo)
            recomputed = describe_recomputed(shaped, config)
            saved = hydra_savings(policy.model, models.reference, models.critic, shaped, config)
            shown = ("objective/scores", *(() if shaped.kl is None else ("objective/kl",)))
            run.log(
                step,
                {
                    **describe(shaped),
                    **facts.metrics(),
                    **recomputed,
                    **learned,
                    **watched,
                    **saved,
                    **clock.metrics(shaped),
                },
                show=shown,
            )

    def _prompts(self, policy: Policy) -> list[Prompt]:
        config = self.config
        room = room_for_prompts(policy.model.config, config.max_new_tokens)
        prompts, counts = load_prompts(
            self._data,
            policy.text_tokenizer,
            max_prompt_length=min(config.max_prompt_length, room),
            **loading(config, policy.notes),
        )
        tell("prompts", counts)
        return prompts

"""Reinforcement learning: rollout, score, shape, update, over one frozen batch record."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fuserl.checkpoint import digest, digest_ids
from fuserl.config import RLConfig
from fuserl.data.rows import Source, source_name
from fuserl.policy import Policy
from fuserl.recompute import describe_recomputed
from fuserl.rewards import FunctionReward, ModelReward, RewardFunction, observe
from fuserl.rollout.collect import choose_prompts
from fuserl.rollout.engine import RolloutFacts
from fuserl.run import Run, prepare_folder
from fuserl.stages.rl_metrics import Clock, describe, hydra_savings, summarize
from fuserl.stages.rl_models import save_critic
from fuserl.stages.rl_opening import OpenedRun, open_run
from fuserl.stages.rl_step import experience, learn
from fuserl.stages.trainable import save_trained


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
        opened = open_run(config, self._data, self._reward, self._given)
        policy, learner = opened.policy, opened.learner
        critic, reward = learner.models.critic, learner.models.reward
        facts = {
            "data": digest_ids((prompt.ids,) for prompt in opened.prompts),
            "starting policy": digest(policy.model),
        }
        if isinstance(reward, ModelReward):
            facts["reward model"] = digest(reward.model)
        if critic is not None:
            facts["starting critic"] = digest(critic)
        with Run(
            "rl",
            config,
            total_steps=config.steps,
            modules=opened.modules,
            optimizer=learner.optimizer,
            facts=facts,
        ) as run:
            self._learn(run, opened)
            learner.memory.release()  # merging adapters takes room
            policy.model = save_trained(
                run.out, policy.model, policy.tokenizer, policy.notes, base=policy.source
            )
            if critic is not None:
                save_critic(critic, policy, run.out)
            return run.finish({"steps": config.steps, **summarize(run.out / "metrics.jsonl")})

    def _learn(self, run: Run, opened: OpenedRun) -> None:
        """The loop."""
        config, learner = self.config, opened.learner
        monitors = {
            name: FunctionReward(function, opened.policy.tokenizer, at_tokens=False)
            for name, function in self._monitors.items()
        }
        for step in run.steps():
            clock, facts = Clock(), RolloutFacts()
            prompts = choose_prompts(opened.prompts, config, step)
            shaped = experience(
                learner, prompts, step=step, clock=clock, facts=facts, on_step=run.check
            )
            watched = observe(monitors, shaped, prompts)  # before weights move: it may raise
            run.check()
            learned = learn(learner, shaped, step=step, clock=clock)
            shown = ("objective/scores", *(() if shaped.kl is None else ("objective/kl",)))
            run.log(
                step,
                {
                    **describe(shaped),
                    **facts.metrics(),
                    **describe_recomputed(shaped, config),
                    **learned,
                    **watched,
                    **hydra_savings(learner.policy, learner.models, shaped, config),
                    **clock.metrics(shaped),
                },
                show=shown,
            )

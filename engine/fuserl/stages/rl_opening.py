"""What a run of reinforcement learning starts from: its policy, its prompts, and its learner."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fuserl.config import RLConfig
from fuserl.data.examples import Prompt, load_prompts
from fuserl.data.rows import Source
from fuserl.exactness import make_exact
from fuserl.optimizer import Optimizer
from fuserl.policy import Policy
from fuserl.rewards import RewardFunction
from fuserl.stages.opening import loading, open_policy, room_for_prompts, tell
from fuserl.stages.rl_models import open_models
from fuserl.stages.rl_step import Learner
from fuserl.stages.trainable import make_trainable, training_dtype


@dataclass(frozen=True, slots=True)
class OpenedRun:
    policy: Policy
    prompts: list[Prompt]
    learner: Learner
    modules: dict[str, nn.Module]
    """What trains, by the names that checkpoints and metrics use."""


def open_run(
    config: RLConfig,
    data: Source,
    reward: str | Path | RewardFunction,
    given: Policy | None = None,
    *,
    num_steps: int | None = None,
) -> OpenedRun:
    """reward: a reward model's folder, or a function. given: a policy, instead of config.model.
    num_steps: of the learning rate's schedule, default config.steps."""
    policy = open_policy(config, given, dtype=training_dtype(config))
    make_trainable(policy.model, config)
    if config.exact:
        make_exact(policy.model, config.temperature)
    prompts = open_prompts(config, data, policy)
    models = open_models(config, reward, policy)
    modules: dict[str, nn.Module] = {"policy": policy.model}
    if models.critic is not None:
        modules["critic"] = models.critic
    optimizer = Optimizer(
        modules,
        config,
        total_steps=(num_steps or config.steps) * config.passes * config.num_minibatches,
        learning_rates={"critic": config.critic_learning_rate or config.learning_rate},
    )
    learner = Learner(
        policy=policy.model,
        models=models,
        optimizer=optimizer,
        config=config,
        eos_token_ids=policy.eos_token_ids,
    )
    return OpenedRun(policy, prompts, learner, modules)


def open_prompts(config: RLConfig, data: Source, policy: Policy) -> list[Prompt]:
    room = room_for_prompts(policy.model.config, config.max_new_tokens)
    prompts, counts = load_prompts(
        data,
        policy.text_tokenizer,
        max_prompt_length=min(config.max_prompt_length, room),
        **loading(config, policy.notes),
    )
    tell("prompts", counts)
    return prompts

"""One step of reinforcement learning in its two halves: what is learned from, and the learning.

The trainer, `fuserl profile` and the benchmarks all run these, so that what is timed is what
trains.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fuserl.batch import ShapedBatch
from fuserl.config import RLConfig
from fuserl.data.examples import Prompt
from fuserl.model.heads import LanguageModel
from fuserl.optimizer import Optimizer
from fuserl.recompute import recompute
from fuserl.rollout.collect import rollout
from fuserl.rollout.engine import RolloutFacts
from fuserl.rollout.kept_runner import RolloutMemory
from fuserl.scoring import score
from fuserl.shaping import shape
from fuserl.stages.rl_metrics import Clock
from fuserl.stages.rl_models import RLModels
from fuserl.streamed_reward import reward_of
from fuserl.update import update


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """What goes from step to step."""

    policy: LanguageModel
    models: RLModels
    optimizer: Optimizer
    config: RLConfig
    eos_token_ids: Collection[int] = ()
    memory: RolloutMemory = field(default_factory=RolloutMemory)


def experience(
    learner: Learner,
    prompts: Sequence[Prompt],
    *,
    step: int,
    clock: Clock,
    facts: RolloutFacts | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> ShapedBatch:
    """Completions of `prompts` (the samples of one stand together), judged. No weight moves.

    step: of the run, which draws depend on. facts: of the rollout, filled in. on_step: called every
    few tokens; it may raise to give the rollout up."""
    config, models = learner.config, learner.models
    with reward_of(models.reward, prompts, config) as (reward, on_completion):
        with clock.lap("rollout"):
            sampled = rollout(
                learner.policy,
                prompts,
                config,
                eos_token_ids=learner.eos_token_ids,
                step=step,
                on_step=on_step,
                on_completion=on_completion,
                facts=facts,
                memory=learner.memory,
            )
        with clock.lap("score"):
            scored = score(
                sampled,
                prompts,
                reward=reward,
                reference=models.reference,
                critic=models.critic,
                temperature=config.temperature,
                microbatch_size=config.microbatch_size,
            )
    if config.old_logprobs == "recomputed":
        with clock.lap("recompute"):
            scored = recompute(scored, learner.policy, config)
    with clock.lap("shape"):
        return shape(scored, config)


def learn(learner: Learner, shaped: ShapedBatch, *, step: int, clock: Clock) -> dict[str, Tensor]:
    """Train on it. Returns the update's metrics."""
    config = learner.config
    with clock.lap("update"):
        return update(
            learner.policy,
            learner.models.critic,
            learner.optimizer,
            shaped,
            config,
            seed=config.seed + step,
        )

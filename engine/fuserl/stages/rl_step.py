"""One step of reinforcement learning in its two halves: what is learned from, and the learning.

The trainer, `fuserl profile` and the benchmarks all run these, so that what is timed is what
trains.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from fuserl.batch import ShapedBatch
from fuserl.config import RLConfig
from fuserl.data.examples import Prompt
from fuserl.model.heads import LanguageModel
from fuserl.optimizer import Optimizer
from fuserl.recompute import recompute
from fuserl.rewards import once
from fuserl.rollout.collect import rollout
from fuserl.rollout.engine import RolloutFacts
from fuserl.rollout.kept_runner import RolloutMemory
from fuserl.rollout.room import with_room
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
    """Completions of `prompts` (the samples of one stand together), judged. No weight moves. Where
    memory runs out after the rollout, what that keeps is released and the phase begins again.

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
            scoring = partial(
                score,
                sampled,
                prompts,
                reward=once(reward),
                reference=models.reference,
                critic=models.critic,
                temperature=config.temperature,
                microbatch_size=config.microbatch_size,
            )
            scored = with_room(learner.memory, "scoring", scoring)
    if config.old_logprobs == "recomputed":
        with clock.lap("recompute"):
            recomputing = partial(recompute, scored, learner.policy, config)
            scored = with_room(learner.memory, "recomputing log-probabilities", recomputing)
    with clock.lap("shape"):
        return shape(scored, config)


def learn(learner: Learner, shaped: ShapedBatch, *, step: int, clock: Clock) -> dict[str, Tensor]:
    """Train on it. Returns the update's metrics. Where memory runs out before a weight has moved,
    what the rollout keeps is released and the update begins again."""
    config, optimizer = learner.config, learner.optimizer
    with clock.lap("update"):
        learning = partial(
            update,
            learner.policy,
            learner.models.critic,
            optimizer,
            shaped,
            config,
            seed=config.seed + step,
        )
        undo = partial(optimizer.undo_since, optimizer.steps)
        return with_room(learner.memory, "the update", learning, begin_again=undo)

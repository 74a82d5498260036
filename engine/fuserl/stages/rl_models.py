"""The models beside the policy: the reference, the reward's and the critic."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fuserl.algorithms import ALGORITHMS
from fuserl.config import RLConfig
from fuserl.model.config import DecoderConfig
from fuserl.model.critic_head import save_critic_head, shared_critic
from fuserl.model.folder import load_scalar_model
from fuserl.model.freezing import num_frozen
from fuserl.model.heads import Critic, LanguageModel, ScalarModel, SharedCritic
from fuserl.model.hub import resolve_folder
from fuserl.model.hydra import copy_trained, critic_on, frozen_copy, share_trunk
from fuserl.policy import Policy, save_folder
from fuserl.rewards import FunctionReward, ModelReward, Reward, RewardFunction
from fuserl.stages.trainable import adapt, make_trainable
from fuserl.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class RLModels:
    reference: LanguageModel | None  # None without a KL penalty
    reward: Reward
    critic: Critic | None  # None for an algorithm without one


def open_models(config: RLConfig, source: str | Path | RewardFunction, policy: Policy) -> RLModels:
    """policy: made trainable; it gets its adapters here. source: a reward model's folder, or a
    function."""
    scorer: ScalarModel | None = None
    at_tokens = config.reward_at == "token"
    if callable(source):
        reward: Reward = FunctionReward(source, policy.tokenizer, at_tokens=at_tokens)
    else:
        dtype = policy.model.trunk.dtype
        scorer = load_reward_model(resolve_folder(source), policy, dtype)
        reward = ModelReward(scorer, microbatch_size=config.microbatch_size, at_tokens=at_tokens)
    critic: Critic | None = None
    if ALGORITHMS[config.algorithm].has_critic:
        critic = _open_critic(config, policy, scorer)
    if scorer is not None:
        scorer.requires_grad_(False)
    reference = frozen_copy(policy.model) if config.kl.coef else None
    tops = [reference.trunk] if reference is not None and config.reference == "hydra" else []
    if critic is not None and config.critic == "hydra":
        tops.append(critic.trunk)
    if tops:
        share_trunk(num_frozen(policy.model.trunk), policy.model.trunk, *tops)
    # After the copies: they hold the weights under the adapters in common, and none of these.
    adapt(policy.model, config, seed=config.seed)
    if isinstance(critic, ScalarModel):
        adapt(critic, config, seed=config.seed + 1)
    return RLModels(reference, reward, critic)


def _open_critic(config: RLConfig, policy: Policy, scorer: ScalarModel | None) -> Critic:
    """It starts from critic_model, else the reward model, else the policy; and from the policy
    where it stands on the policy's layers."""
    seed, kind = config.seed, config.critic_head
    if config.critic == "shared":
        return shared_critic(policy.model, Path(policy.source), kind, seed)
    if config.critic == "hydra" or (config.critic_model is None and scorer is None):
        return critic_on(policy.model, seed, kind or "linear")
    if config.critic_model is None:
        assert scorer is not None
        make_trainable(scorer, config)  # it says what is copied; the reward trains nothing
        return copy_trained(scorer).with_head(kind, seed)
    folder = resolve_folder(config.critic_model)
    critic, _ = load_scalar_model(
        folder,
        device=policy.model.device,
        dtype=policy.model.trunk.dtype,
        head=kind or "linear",
        head_seed=seed,
    )
    check_same_ids(critic.config, load_tokenizer(folder), policy, f"critic {folder}")
    make_trainable(critic, config)
    return critic.with_head(kind, seed)


def save_critic(critic: Critic, policy: Policy, out: Path) -> None:
    """In `critic/`; or the head alone, beside the policy it stands on."""
    if isinstance(critic, SharedCritic):
        save_critic_head(critic, out)
    else:
        save_folder(out / "critic", critic, policy.tokenizer, policy.notes)


def load_reward_model(folder: Path, policy: Policy, dtype: torch.dtype) -> ScalarModel:
    """A reward model that reads the policy's token ids as they are, on the policy's device."""
    model, head_is_new = load_scalar_model(folder, device=policy.model.device, dtype=dtype)
    if head_is_new:
        raise ValueError(f"{folder} is no reward model: it has no score.weight")
    check_same_ids(model.config, load_tokenizer(folder), policy, f"reward model {folder}")
    return model


def check_same_ids(
    config: DecoderConfig, tokenizer: Tokenizer | None, policy: Policy, name: str
) -> None:
    """Refuse a model that would read other tokens out of the policy's ids."""
    if tokenizer and policy.tokenizer and not tokenizer.same_ids(policy.tokenizer):
        raise ValueError(
            f"the {name} has another tokenizer than the policy {policy.source}: "
            "train it from the policy's folder"
        )
    if config.vocab_size < policy.model.config.vocab_size:
        raise ValueError(
            f"the {name} has vocab_size {config.vocab_size}, and the policy "
            f"{policy.source} {policy.model.config.vocab_size}: it may sample ids beyond it"
        )

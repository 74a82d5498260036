"""The models beside the policy: the reward's and the critic."""

import copy
from pathlib import Path

import torch

from fuserl.algorithms import ALGORITHMS
from fuserl.config import RLConfig
from fuserl.model.config import DecoderConfig
from fuserl.model.folder import load_scalar_model
from fuserl.model.heads import ScalarModel
from fuserl.model.hub import resolve_folder
from fuserl.policy import Policy
from fuserl.rewards import FunctionReward, ModelReward, Reward, RewardFunction
from fuserl.tokenizer import Tokenizer, load_tokenizer


def load_reward_and_critic(
    config: RLConfig, source: str | Path | RewardFunction, policy: Policy
) -> tuple[Reward, ScalarModel | None]:
    """source: a reward model's folder, or a function. The critic starts from critic_model,
    else the reward model, else the policy; None for an algorithm without one."""
    at_tokens = config.reward_at == "token"
    device, dtype = policy.model.device, policy.model.trunk.dtype
    scorer: ScalarModel | None = None
    if callable(source):
        reward: Reward = FunctionReward(source, policy.tokenizer, at_tokens=at_tokens)
    else:
        scorer = load_reward_model(resolve_folder(source), policy, dtype)
        reward = ModelReward(
            scorer.requires_grad_(False),
            microbatch_size=config.microbatch_size,
            at_tokens=at_tokens,
        )
    if not ALGORITHMS[config.algorithm].has_critic:
        return reward, None
    if config.critic_model is not None:
        folder = resolve_folder(config.critic_model)
        critic, _ = load_scalar_model(folder, device=device, dtype=dtype, head_seed=config.seed)
        check_same_ids(critic.config, load_tokenizer(folder), policy, f"critic {folder}")
        return reward, critic
    if scorer is not None:
        return reward, copy.deepcopy(scorer).requires_grad_(True)
    return reward, ScalarModel.on_trunk(policy.model, config.seed)


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

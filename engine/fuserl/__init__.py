"""fuserl: RLHF on purpose-built kernels, in one process, on one set of weights.

    policy = fuserl.load_policy("folder-or-hub-id")
    fuserl.RLTrainer(policy, data="prompts.jsonl", reward=fn, out="runs/a").train()

Importing this package imports nothing else until a name is used, so that the command line
answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuserl.generation import FinishedCompletion, Generation
    from fuserl.policy import Policy, load_policy
    from fuserl.stages.reward import RewardTrainer
    from fuserl.stages.rl import RLTrainer
    from fuserl.stages.sft import SFTTrainer

_HOME = {
    "FinishedCompletion": "fuserl.generation",
    "Generation": "fuserl.generation",
    "Policy": "fuserl.policy",
    "load_policy": "fuserl.policy",
    "SFTTrainer": "fuserl.stages.sft",
    "RewardTrainer": "fuserl.stages.reward",
    "RLTrainer": "fuserl.stages.rl",
}

__all__ = [
    "FinishedCompletion",
    "Generation",
    "Policy",
    "RLTrainer",
    "RewardTrainer",
    "SFTTrainer",
    "load_policy",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fuserl' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)

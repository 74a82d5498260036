"""Which algorithm, and whose conventions: the two tables the RL stage chooses from.

An algorithm is how advantages are made and whether the ratio is clipped. A preset is what one
project does where projects differ. Neither is a copy of the loop.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    advantage: Literal["gae", "return", "return_minus_mean"]
    clip: Literal["ppo", "none"]
    num_epochs: int
    """Passes over a rollout unless the configuration says otherwise."""

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae"


ALGORITHMS = {
    # Schulman et al., 2017
    "ppo": Algorithm(advantage="gae", clip="ppo", num_epochs=4),
    # Williams, 1992: the return itself, then with the batch's mean return as baseline
    "reinforce": Algorithm(advantage="return", clip="none", num_epochs=1),
    "reinforce_baseline": Algorithm(advantage="return_minus_mean", clip="none", num_epochs=1),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    score_slot: Literal["last", "after"]
    """The score's place: on the last token, or one slot after it."""
    missing_eos: Literal["replace", "subtract"]
    """What the penalty of a completion without EOS does to its score."""
    unbiased_variance: bool
    """Of the whitening of advantages."""


PRESETS = {
    # Huang et al., 2024 (The N+ Implementation Details of RLHF with PPO)
    "n+": Preset(score_slot="after", missing_eos="replace", unbiased_variance=False),
}

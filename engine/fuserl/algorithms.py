"""Which algorithm: how advantages are made and whether the ratio is clipped.

What one project does where projects differ is a preset, in conventions.py. Neither is a copy of
the loop.
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

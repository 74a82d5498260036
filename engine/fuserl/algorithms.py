"""Which algorithm: how advantages are made, whether the ratio is clipped, where the KL penalty is.

What one project does where projects differ is a preset, in conventions.py. Neither is a copy of
the loop.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class KLPenalty:
    """Against the reference. Its coefficient is that of the reward, of the loss, or 0."""

    coef: float
    place: Literal["reward", "loss"]
    estimator: Literal["k1", "k2", "k3", "abs"]

    @property
    def reward_coef(self) -> float:
        return self.coef if self.place == "reward" else 0.0

    @property
    def loss_coef(self) -> float:
        return self.coef if self.place == "loss" else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """The numbers and the place of the KL penalty hold unless the configuration says otherwise."""

    advantage: Literal["gae", "return", "return_minus_mean", "group"]
    clip: Literal["ppo", "none"]
    num_epochs: int
    """Passes over a rollout."""
    kl_in: Literal["reward", "loss"] = "reward"
    kl_coef: float = 0.05

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae"


ALGORITHMS = {
    # Schulman et al., 2017
    "ppo": Algorithm(advantage="gae", clip="ppo", num_epochs=4),
    # Williams, 1992: the return itself, then with the batch's mean return as baseline
    "reinforce": Algorithm(advantage="return", clip="none", num_epochs=1),
    "reinforce_baseline": Algorithm(advantage="return_minus_mean", clip="none", num_epochs=1),
    # Shao et al., 2024, with the token mean over the optimizer step and the defaults of TRL
    "grpo": Algorithm(advantage="group", clip="ppo", num_epochs=1, kl_in="loss", kl_coef=0.0),
}

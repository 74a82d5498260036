"""What five projects do where they differ, as options of the ops.

    preset = PRESETS["verl"]
    rewards_to_advantages(..., kl_coef=0.05, gamma=1.0, gae_lambda=0.95, **preset.advantages())
    ppo_loss(..., **preset.ppo())

A preset holds conventions: where the score stands, the missing-EOS rule, bounds, whitening, holes
of the mask. Learning rates, coefficients, discounts and lengths stay the caller's. To change one,
dataclasses.replace(preset, dual_clip=None).

Read from the code of each project (n+ of 2024-11, trlx of 2024-01, verl of 2026-01, trl of 2026-07,
openrlhf of 2026-08). What a preset does not reproduce:
    trlx      A row has its score one slot behind EOS only where pad is EOS, as with GPT-2; another
              pad puts it two slots behind. EOS itself gets no gradient there; here it is trained.
              In several processes the variance is biased.
    openrlhf  The variance is held above 1e-8; here 1e-8 is added to it.
"""

from dataclasses import dataclass
from typing import Any, Literal

from fuserl_kernels.reference.rewards import ESTIMATORS


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """The conventions of one project. None means that it has no such rule."""

    score_slot: Literal["last", "after"]
    """The score's place: on the last trained token, or one slot behind it."""
    missing_eos: Literal["replace", "subtract"] | None = None
    """What missing_eos_penalty does to the score of a completion without EOS."""
    missing_eos_penalty: float = 0.0
    score_clip: float | None = None
    """The score is held within +-score_clip."""
    kl_clip: float | None = None
    """Each estimate of the KL is held within +-kl_clip."""
    kl_clip_estimators: tuple[str, ...] = ESTIMATORS
    """The estimators that kl_clip holds."""
    masked: Literal["identity", "carry"] = "identity"
    """GAE at a hole of the mask: skip it, or walk through it, decaying (see gae)."""
    unbiased: bool
    """The variance of the whitening divides by n - 1."""
    whitening_scope: Literal["batch", "minibatch"] = "batch"
    """Advantages are whitened once, over the whole rollout, or anew in each minibatch."""
    whitening_mask: Literal["loss", "all"] = "loss"
    """What is whitened together: trained tokens, or every slot up to the last value of any row.
    With "all", a slot with a value has the advantage returns - values and padding has 0."""
    value_loss_mask: Literal["value", "loss"] = "value"
    """The critic learns at every slot with a value, or at trained tokens alone."""
    clip_range: float = 0.2
    dual_clip: float | None = None
    log_ratio_clip: float | None = None
    value_clip_range: float

    def __post_init__(self) -> None:
        if self.whitening_scope == "batch" and self.whitening_mask != "loss":
            raise ValueError("whitening_scope 'batch' goes with whitening_mask 'loss'")

    def shaping(self, estimator: str = "k1") -> dict[str, Any]:
        """Options of shape_rewards. With missing_eos it needs has_eos."""
        return {
            "estimator": estimator,
            "kl_clip": self._kl_clip(estimator),
            "score_slot": self.score_slot,
            "score_clip": self.score_clip,
            "missing_eos": self.missing_eos,
            "missing_eos_penalty": self.missing_eos_penalty,
        }

    def advantages(self, estimator: str = "k1") -> dict[str, Any]:
        """Options of rewards_to_advantages, which whitens only for whitening_scope "batch"."""
        return {
            **self.shaping(estimator),
            "masked": self.masked,
            "whiten": self.whitening_scope == "batch",
            "unbiased": self.unbiased,
        }

    def policy(self, kl_estimator: str = "k3") -> dict[str, Any]:
        """Options of policy_loss and linear_policy_loss; the KL is that in the loss."""
        return {
            "clip_range": self.clip_range,
            "dual_clip": self.dual_clip,
            "log_ratio_clip": self.log_ratio_clip,
            "kl_estimator": kl_estimator,
            "kl_clip": self._kl_clip(kl_estimator),
        }

    def value(self) -> dict[str, Any]:
        """Options of value_loss."""
        return {"clip_range": self.value_clip_range}

    def ppo(self, kl_estimator: str = "k3") -> dict[str, Any]:
        """Options of ppo_loss."""
        return {**self.policy(kl_estimator), "value_clip_range": self.value_clip_range}

    def _kl_clip(self, estimator: str) -> float | None:
        return self.kl_clip if estimator in self.kl_clip_estimators else None


PRESETS = {
    # vwxyzjn/summarize_from_feedback_details (Huang et al., 2024: The N+ Implementation Details of
    # RLHF with PPO)
    "n+": Preset(
        score_slot="after",
        missing_eos="replace",
        missing_eos_penalty=1.0,
        unbiased=False,
        value_clip_range=0.2,
    ),
    # huggingface/trl, trl/experimental/ppo: as n+, but for these two
    "trl": Preset(
        score_slot="after",
        missing_eos="subtract",
        unbiased=True,
        value_clip_range=0.2,
    ),
    # CarperAI/trlx, trlx/models/modeling_ppo.py
    "trlx": Preset(
        score_slot="after",
        score_clip=10.0,
        unbiased=True,
        whitening_scope="minibatch",
        whitening_mask="all",
        value_loss_mask="loss",
        value_clip_range=0.2,
    ),
    # OpenRLHF/OpenRLHF, openrlhf/trainer/ppo_utils/experience_maker.py and openrlhf/models
    "openrlhf": Preset(
        score_slot="last",
        score_clip=10.0,
        kl_clip=10.0,
        masked="carry",
        unbiased=False,
        log_ratio_clip=20.0,
        value_clip_range=0.5,
    ),
    # volcengine/verl, verl/trainer/ppo/core_algos.py
    "verl": Preset(
        score_slot="last",
        kl_clip=10.0,
        kl_clip_estimators=("k3",),
        unbiased=True,
        dual_clip=3.0,
        log_ratio_clip=20.0,
        value_clip_range=0.5,
    ),
}

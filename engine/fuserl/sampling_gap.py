"""How far apart the sampler and the trainer are: the rollout's log-probabilities of its tokens
against those of the trainer's own forward pass over the same weights.

Under the names that TRL logs it by: the difference is |trainer - rollout| in nats, the ratio
exp(trainer - rollout), both of each trained token.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from fuserl_kernels.reference.policy import MAX_LOG_RATIO, log_ratio_range


class LogRatioEnds:
    """The least and the greatest log-ratio over microbatches, without a sync."""

    def __init__(self) -> None:
        self._least: list[Tensor] = []
        self._most: list[Tensor] = []

    def add(self, metrics: Mapping[str, Tensor], loss_mask: Tensor) -> None:
        """metrics: of linear_policy_loss. A microbatch without a trained token has no say."""
        trains = loss_mask.any()
        self._least.append(torch.where(trains, metrics["log_ratio/min"], torch.inf))
        self._most.append(torch.where(trains, metrics["log_ratio/max"], -torch.inf))

    def found(self) -> dict[str, Tensor]:
        """Under the names they came in by; 0 where no token trains."""
        least, most = torch.stack(self._least).amin(), torch.stack(self._most).amax()
        none = least > most
        return {
            "log_ratio/min": least.masked_fill(none, 0),
            "log_ratio/max": most.masked_fill(none, 0),
        }


def gap_of_step(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """From the metrics of an optimizer step whose weights are still those that sampled."""
    return _named(
        found["log_ratio/abs"],
        found["log_ratio/min"],
        found["log_ratio/max"],
        found["val/ratio"],
    )


def gap_of_tokens(
    logprobs: Tensor, rollout_logprobs: Tensor, loss_mask: Tensor
) -> dict[str, Tensor]:
    """From the trainer's and the rollout's log-probabilities, [B, T]."""
    log_ratio = torch.where(loss_mask, logprobs - rollout_logprobs, 0).clamp(max=MAX_LOG_RATIO)
    mean_difference, least, most = log_ratio_range(logprobs, rollout_logprobs, loss_mask)
    return _named(mean_difference, least, most, masked_mean(log_ratio.exp(), loss_mask))


def masked_mean(per_token: Tensor, loss_mask: Tensor) -> Tensor:
    """Over the trained tokens, 0-d; 0 without one."""
    return torch.where(loss_mask, per_token, 0).sum() / loss_mask.sum().clamp(min=1)


def _named(
    mean_difference: Tensor, least: Tensor, most: Tensor, mean_ratio: Tensor
) -> dict[str, Tensor]:
    """least, most: of trainer - rollout."""
    return {
        "sampling/sampling_logp_difference/mean": mean_difference,
        "sampling/sampling_logp_difference/max": torch.maximum(least.abs(), most.abs()),
        "sampling/importance_sampling_ratio/min": least.clamp(max=MAX_LOG_RATIO).exp(),
        "sampling/importance_sampling_ratio/mean": mean_ratio,
        "sampling/importance_sampling_ratio/max": most.clamp(max=MAX_LOG_RATIO).exp(),
    }

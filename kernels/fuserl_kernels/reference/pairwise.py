"""Pairwise preference loss with its gradients.

mean(-log sigmoid(chosen - rejected - margin)) + center_coef * mean((chosen + rejected)^2)
"""

import torch

from fuserl_kernels.reference.sequences import compute_dtype

METRICS = ("reward/accuracy", "reward/margin", "reward/chosen", "reward/rejected", "num_pairs")


def pairwise_loss_fwd(
    chosen_scores: torch.Tensor,  # [N]
    rejected_scores: torch.Tensor,  # [N]
    margin: torch.Tensor | None,  # [N] or 0-d
    center_coef: float,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns loss, metrics in the order of METRICS, and both gradients."""
    dtype = compute_dtype(chosen_scores, rejected_scores)
    chosen, rejected = chosen_scores.to(dtype), rejected_scores.to(dtype)
    lead = chosen - rejected
    total = chosen + rejected
    excess = lead if margin is None else lead - margin.to(dtype)
    num_pairs = chosen.new_full((), chosen.shape[0])
    count = num_pairs.clamp(min=1)
    loss = -torch.nn.functional.logsigmoid(excess).sum() / count
    loss = loss + center_coef * total.square().sum() / count
    wins = (lead > 0).to(dtype) + 0.5 * (lead == 0).to(dtype)
    metrics = torch.stack(
        [
            wins.sum() / count,
            lead.sum() / count,
            chosen.sum() / count,
            rejected.sum() / count,
            num_pairs,
        ]
    )
    if not needs_grad:
        return loss, metrics, chosen_scores.new_empty(0), rejected_scores.new_empty(0)
    pull = torch.sigmoid(-excess) / count
    center = 2 * center_coef * total / count
    grad_chosen = (center - pull).to(chosen_scores.dtype)
    return loss, metrics, grad_chosen, (center + pull).to(rejected_scores.dtype)

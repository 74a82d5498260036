"""pairwise_loss in one launch: loss, gradients and metrics together.

One program walks the pairs: a reward model's batch has tens or hundreds.
"""

import torch

from fuserl_kernels.reference.pairwise import METRICS
from fuserl_kernels.triton_helpers import _cast
from fuserl_kernels.triton_partial_sums import NUM_WARPS, TILE, _four
from fuserl_kernels.triton_runtime import Configuration, tl, triton

CONFIGURATION = Configuration(NUM_WARPS, 1, {"BLOCK": TILE})


@triton.jit
def _softplus(x):  # type: ignore[no-untyped-def]
    """log(1 + exp(x)), to the last digits for small results too; NaN stays NaN."""
    e = tl.exp(-tl.abs(x))
    # log(1 + e): what 1 + e rounds off, the quotient puts back.
    one_more = 1.0 + e
    rounded = tl.where(one_more == 1.0, 1.0, one_more - 1.0)
    log1p = tl.where(one_more == 1.0, e, tl.log(one_more) * (e / rounded))
    return tl.where(x > 0, x, 0.0) + log1p


@triton.jit(do_not_specialize=["num_pairs", "chosen_stride", "rejected_stride", "margin_stride"])
def _pairwise_kernel(  # type: ignore[no-untyped-def]
    chosen_ptr,
    rejected_ptr,
    margin_ptr,  # or None
    grad_chosen_ptr,  # or None
    grad_rejected_ptr,
    loss_ptr,
    metrics_ptr,
    num_pairs,
    chosen_stride,
    rejected_stride,
    margin_stride,  # 0 for one margin
    center_coef,
    BLOCK: tl.constexpr,
):
    WRITES: tl.constexpr = grad_chosen_ptr is not None
    divisor = tl.where(num_pairs == 0, 1, num_pairs).to(tl.float64)
    share = (1.0 / divisor).to(tl.float32)
    scores = tl.zeros((BLOCK // 4, 4), tl.float64)
    costs = scores
    for start in range(0, num_pairs, BLOCK):
        pairs = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = pairs < num_pairs
        chosen = tl.load(chosen_ptr + pairs * chosen_stride, mask=inside, other=0.0)
        rejected = tl.load(rejected_ptr + pairs * rejected_stride, mask=inside, other=0.0)
        chosen, rejected = chosen.to(tl.float32), rejected.to(tl.float32)
        lead, total = chosen - rejected, chosen + rejected
        excess = lead
        if margin_ptr is not None:
            margin = tl.load(margin_ptr + pairs * margin_stride, mask=inside, other=0.0)
            excess = lead - margin.to(tl.float32)
        cost = _softplus(-excess) + center_coef * total * total
        wins = tl.where(lead > 0, 1.0, tl.where(lead == 0, 0.5, 0.0))
        if WRITES:
            pull = share / (1.0 + tl.exp(excess))
            center = 2.0 * share * center_coef * total
            chosen_type: tl.constexpr = grad_chosen_ptr.dtype.element_ty
            rejected_type: tl.constexpr = grad_rejected_ptr.dtype.element_ty
            tl.store(grad_chosen_ptr + pairs, _cast(center - pull, chosen_type), mask=inside)
            tl.store(grad_rejected_ptr + pairs, _cast(center + pull, rejected_type), mask=inside)
        none = tl.zeros((BLOCK,), tl.float64)
        scores += _four(
            lead.to(tl.float64), chosen.to(tl.float64), rejected.to(tl.float64), none, WRITES
        )
        won = tl.where(inside, wins, 0.0).to(tl.float64)
        costs += _four(won, tl.where(inside, cost, 0.0).to(tl.float64), none, none, WRITES)
    # In the order of METRICS: lead, chosen and rejected lie behind the wins.
    means = (tl.sum(scores, axis=0) / divisor).to(tl.float32)
    tl.store(metrics_ptr + 1 + tl.arange(0, 4), means, mask=tl.arange(0, 4) < 3)
    means = (tl.sum(costs, axis=0) / divisor).to(tl.float32)
    tl.store(metrics_ptr + tl.arange(0, 4), means, mask=tl.arange(0, 4) < 1)
    tl.store(loss_ptr + tl.arange(0, 4) - 1, means, mask=tl.arange(0, 4) == 1)
    tl.store(metrics_ptr + 4, num_pairs.to(tl.float32))


def pairwise_loss_triton(
    chosen_scores: torch.Tensor,
    rejected_scores: torch.Tensor,
    margin: torch.Tensor | None,
    center_coef: float,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """pairwise_loss_fwd of reference/pairwise.py for float32, bf16 and fp16, any strides.

    Raises ValueError for float64 rejected_scores, whose loss would have to be float64."""
    if rejected_scores.dtype == torch.float64:
        raise ValueError(
            f"rejected_scores is float64 but chosen_scores {chosen_scores.dtype}: convert one"
        )
    num_pairs = chosen_scores.shape[0]
    loss = chosen_scores.new_empty((), dtype=torch.float32)
    metrics = chosen_scores.new_empty(len(METRICS), dtype=torch.float32)
    size = num_pairs if needs_grad else 0
    grad_chosen, grad_rejected = chosen_scores.new_empty(size), rejected_scores.new_empty(size)
    _pairwise_kernel[(1,)](
        chosen_scores,
        rejected_scores,
        margin,
        grad_chosen if needs_grad else None,
        grad_rejected if needs_grad else None,
        loss,
        metrics,
        num_pairs,
        chosen_scores.stride(0),
        rejected_scores.stride(0),
        0 if margin is None or margin.dim() == 0 else margin.stride(0),
        center_coef,
        **CONFIGURATION.arguments(),
    )
    return loss, metrics, grad_chosen, grad_rejected

"""What trainers write between scores and gradients, from the published formulas.

No library can be imported for these: TRL, OpenRLHF and verl keep them inside their trainers. All
compute in float32 (float64 for float64); arguments and results are those of token_problems.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from fuserl.bench.case import Case
from fuserl.bench.problem import CLIP_RANGE
from fuserl.bench.rivals import Function, Make
from fuserl.bench.token_problems import (
    GAE_LAMBDA,
    GAMMA,
    REWARD_KL_COEF,
    VF_COEF,
    WHITEN_EPSILON,
)
from fuserl.bench.truth import Tensors


def compiled(make: Make) -> Make:
    """The same through torch.compile."""
    return lambda case: torch.compile(make(case), dynamic=False)


def _wide(*tensors: torch.Tensor) -> Tensors:
    return tuple(x if x.dtype == torch.float64 else x.float() for x in tensors)


# --- gae


def _loop_gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> Tensors:
    """Column by column backwards through T, as PPO trainers do."""
    last: float | torch.Tensor = 0.0
    num_slots = rewards.shape[1]
    reversed_columns = []
    for t in reversed(range(num_slots)):
        following: float | torch.Tensor = values[:, t + 1] if t < num_slots - 1 else 0.0
        delta = rewards[:, t] + GAMMA * following - values[:, t]
        last = delta + GAMMA * GAE_LAMBDA * last
        reversed_columns.append(last)
    advantages = torch.stack(reversed_columns[::-1], dim=1)
    returns = advantages + values
    return advantages.masked_fill(~mask, 0), returns.masked_fill(~mask, 0)


def _scan_gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> Tensors:
    """With padding on the right only, zeros there stand for the mask and one decay serves all
    slots."""
    deltas = rewards + GAMMA * F.pad(values[:, 1:], (0, 1)) - values
    states = _decayed_sums(deltas, GAMMA * GAE_LAMBDA)
    returns = states + values
    return states.masked_fill(~mask, 0), returns.masked_fill(~mask, 0)


def _decayed_sums(x: torch.Tensor, decay: float) -> torch.Tensor:
    """A doubling scan: after step k each slot holds the sum over the 2^k slots from it on."""
    distance, num_slots = 1, x.shape[1]
    while distance < num_slots:
        x = torch.add(x, F.pad(x[:, distance:], (0, distance)), alpha=decay**distance)
        distance *= 2
    return x


def _gae(walk: Function) -> Make:
    def run(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> Tensors:
        rewards, values = _wide(rewards, values)
        return walk(rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0), mask)

    return lambda case: run


gae_loop, gae_scan = _gae(_loop_gae), _gae(_scan_gae)


# --- rewards_to_advantages


def _advantages(walk: Function) -> Make:
    def run(
        scores: torch.Tensor,
        logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
    ) -> Tensors:
        rewards, kl = _shaped(scores, logprobs, ref_logprobs, mask)
        (values,) = _wide(values)
        advantages, returns = walk(rewards, values.masked_fill(~mask, 0), mask)
        return _white(advantages, mask), returns, rewards, kl

    return lambda case: run


def _shaped(
    scores: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor
) -> Tensors:
    """Rewards and the KL penalty."""
    scores, logprobs, ref_logprobs = _wide(scores, logprobs, ref_logprobs)
    kl = (logprobs - ref_logprobs).masked_fill(~mask, 0)
    rewards = -REWARD_KL_COEF * kl
    last = mask.sum(1) - 1
    rewards[torch.arange(len(scores), device=scores.device), last] += scores
    return rewards, kl


def shaping_eager(case: Case) -> Function:
    return _shaped


advantages_loop, advantages_scan = _advantages(_loop_gae), _advantages(_scan_gae)


def _masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The padding holds finite numbers, so that a product may stand for a choice."""
    return (x * mask).sum() / mask.sum()


def _white(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    centred = x - _masked_mean(x, mask)
    count = mask.sum()
    variance = _masked_mean(centred.square(), mask) * count / (count - 1)
    return (centred * torch.rsqrt(variance + WHITEN_EPSILON)).masked_fill(~mask, 0)


def whiten_eager(case: Case) -> Function:
    return lambda x, mask: (_white(_wide(x)[0], mask),)


def moments_eager(case: Case) -> Function:
    def run(x: torch.Tensor, mask: torch.Tensor) -> Tensors:
        (x,) = _wide(x)
        mean = _masked_mean(x, mask)
        return (torch.stack((mask.sum(), mean, _masked_mean((x - mean).square(), mask))),)

    return run


# --- discounted_returns


def _loop_returns(rewards: torch.Tensor) -> torch.Tensor:
    following: float | torch.Tensor = 0.0
    reversed_columns = []
    for column in reversed(rewards.unbind(1)):
        following = column + GAMMA * following
        reversed_columns.append(following)
    return torch.stack(reversed_columns[::-1], dim=1)


def _returns(walk: Callable[[torch.Tensor], torch.Tensor]) -> Make:
    def run(rewards: torch.Tensor, mask: torch.Tensor) -> Tensors:
        (rewards,) = _wide(rewards)
        return (walk(rewards.masked_fill(~mask, 0)).masked_fill(~mask, 0),)

    return lambda case: run


returns_loop = _returns(_loop_returns)
returns_scan = _returns(lambda rewards: _decayed_sums(rewards, GAMMA))


# --- kl_penalty and the losses


def kl_eager(case: Case) -> Function:
    def run(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> Tensors:
        logprobs, ref_logprobs = _wide(logprobs, ref_logprobs)
        d = ref_logprobs - logprobs
        return (d.exp() - d - 1,)

    return run


def _policy(
    new_logprobs: torch.Tensor,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    mask: torch.Tensor,
    with_metrics: bool,
) -> Tensors:
    log_ratio = new_logprobs - logprobs
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
    loss = _masked_mean(torch.max(unclipped, clipped), mask)
    if not with_metrics:
        return (loss,)
    with torch.no_grad():
        return (
            loss,
            0.5 * _masked_mean(log_ratio.square(), mask),
            _masked_mean((clipped > unclipped).to(clipped.dtype), mask),
            _masked_mean(ratio, mask),
        )


def policy_eager(case: Case) -> Function:
    def run(
        new_logprobs: torch.Tensor,
        logprobs: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
    ) -> Tensors:
        wide = _wide(new_logprobs, logprobs, advantages)
        return _policy(*wide, mask=mask, with_metrics=case.with_metrics)

    return run


def _value(
    new_values: torch.Tensor, values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor
) -> Tensors:
    """The loss, and the squared errors without and with the clip."""
    new_values, values, returns = _wide(new_values, values, returns)
    bounded = torch.clamp(new_values, values - CLIP_RANGE, values + CLIP_RANGE)
    unclipped, clipped = (new_values - returns).square(), (bounded - returns).square()
    return 0.5 * _masked_mean(torch.max(unclipped, clipped), mask), unclipped, clipped


def value_eager(case: Case) -> Function:
    return lambda *arguments: _value(*arguments)[:1]


def ppo_eager(case: Case) -> Function:
    def run(
        new_logprobs: torch.Tensor,
        new_values: torch.Tensor,
        logprobs: torch.Tensor,
        advantages: torch.Tensor,
        values: torch.Tensor,
        returns: torch.Tensor,
        mask: torch.Tensor,
    ) -> Tensors:
        value_loss, unclipped, clipped = _value(new_values, values, returns, mask)
        wide = _wide(new_logprobs, logprobs, advantages)
        policy, *metrics = _policy(*wide, mask=mask, with_metrics=case.with_metrics)
        if case.with_metrics:
            with torch.no_grad():
                metrics.append(_masked_mean((clipped > unclipped).to(clipped.dtype), mask))
        return (policy + VF_COEF * value_loss, *metrics)

    return run


def pairwise_eager(case: Case) -> Function:
    def run(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> Tensors:
        chosen_scores, rejected_scores = _wide(chosen_scores, rejected_scores)
        return (-F.logsigmoid(chosen_scores - rejected_scores).mean(),)

    return run

"""Problems of the ops between scores and gradients, on [B, T] (and on pairs of scores).

Sequences are padded on the right and half to all of T long (Case.lengths). The padding holds
ordinary numbers, so that an answer which uses them is wrong. Truths are closed forms in float64.

Each cost counts the bytes that must move: inputs at trained tokens, the mask (1 byte) and outputs
everywhere, each once. n is the number of trained tokens.
"""

import torch

from fuserl.bench.case import Case, Cost
from fuserl.bench.problem import CLIP_RANGE, Problem
from fuserl.bench.truth import Tensors, Truth

GAMMA, GAE_LAMBDA = 0.99, 0.95
REWARD_KL_COEF = 0.05
WHITEN_EPSILON = 1e-8
VF_COEF = 0.1
_OUT_BYTES = 4  # outputs are float32
_ROW_BLOCK = 256


class _Draw:
    """Random tensors of a case, in its dtype unless said."""

    def __init__(self, case: Case, seed: int) -> None:
        self._case = case
        self._generator = torch.Generator(case.device).manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        """float32"""
        return torch.randn(shape, generator=self._generator, device=self._case.device)

    def slots(self, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        """[B, T] of mean `shift`."""
        x = self.normal(self._case.num_sequences, self._case.num_slots)
        return (x * scale + shift).to(self._case.torch_dtype)

    def off_the_clip(self, around: torch.Tensor, clip_range: float) -> torch.Tensor:
        """[B, T] nearer to `around` than half the clip, or beyond twice of it: about a third.

        Rounding then clips no token and frees none."""
        near, far = self.normal(2, *around.shape)
        shift = torch.where(far.abs() > 1, far.sign() * 2.5, near.clamp(-1, 1) * 0.4)
        return (around.float() + clip_range * shift).to(around.dtype)

    def values(self) -> Tensors:
        """New values, old ones and returns, [B, T]: returns are so far from the values that
        clipping never moves a value across its return, where the gradient would jump."""
        old = self.slots()
        new = self.off_the_clip(old, CLIP_RANGE)
        distance = self.slots().float()
        returns = old.float() + distance.sign() * (1 + distance.abs())
        return new, old, returns.to(self._case.torch_dtype)

    def mask(self) -> torch.Tensor:
        """bool [B, T], the lengths in random order."""
        lengths = torch.tensor(self._case.lengths, device=self._case.device)
        order = torch.randperm(len(lengths), generator=self._generator, device=self._case.device)
        slots = torch.arange(self._case.num_slots, device=self._case.device)
        return slots < lengths[order, None]


def _token_bytes(case: Case, num_inputs: int, num_outputs: int, out_bytes: int) -> int:
    """Of the mask, inputs at trained tokens and outputs everywhere."""
    num_slots = case.num_sequences * case.num_slots
    inputs = num_inputs * sum(case.lengths) * case.torch_dtype.itemsize
    return num_slots + inputs + num_outputs * num_slots * out_bytes


# --- gae


def gae_problem(case: Case, seed: int = 0) -> Problem:
    """inputs: rewards, values, loss_mask; outputs: advantages, returns."""
    draw = _Draw(case, seed)
    inputs = (draw.slots(0.2), draw.slots(), draw.mask())
    rewards, values, mask = inputs
    outputs = _exact_gae(rewards.double(), values.double(), mask)
    return Problem(case, inputs, 0, (), Truth(outputs))


def gae_cost(case: Case) -> Cost:
    """rewards, values; advantages, returns."""
    return Cost(_token_bytes(case, 2, 2, _OUT_BYTES), 0)


def _exact_gae(rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> Tensors:
    """Float64: A_t = sum over s >= t of (gamma lambda)^(s - t) delta_s, and A_t + v_t."""
    rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    sums = _decayed_sums(rewards + GAMMA * following - values, GAMMA * GAE_LAMBDA)
    advantages = torch.where(mask, sums, 0)
    return advantages, torch.where(mask, advantages + values, 0)


def _decayed_sums(x: torch.Tensor, decay: float) -> torch.Tensor:
    """Float64 [B, T]: sum over s >= t of decay^(s - t) x_s, as one product by blocks of t."""
    slots = torch.arange(x.shape[1], device=x.device, dtype=torch.float64)
    blocks = []
    for block in slots.split(_ROW_BLOCK):
        ahead = slots[:, None] - block
        blocks.append(x @ torch.where(ahead >= 0, decay ** ahead.clamp(min=0), 0))
    return torch.cat(blocks, 1)


# --- rewards_to_advantages


def advantages_problem(case: Case, seed: int = 0) -> Problem:
    """inputs: scores [B], logprobs, ref_logprobs, values, loss_mask; outputs: whitened advantages,
    returns, rewards, kl (k1). The score is at the last token; the variance is unbiased."""
    draw = _Draw(case, seed)
    logprobs = draw.slots(1.0, -2.0)
    ref_logprobs = (logprobs.float() + 0.2 * draw.slots().float()).to(case.torch_dtype)
    scores = draw.normal(case.num_sequences).to(case.torch_dtype)
    values, mask = draw.slots(), draw.mask()
    kl = torch.where(mask, logprobs.double() - ref_logprobs.double(), 0)
    is_last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    rewards = torch.where(is_last, scores.double()[:, None], 0) - REWARD_KL_COEF * kl
    advantages, returns = _exact_gae(rewards, values.double(), mask)
    outputs = (_exact_white(advantages, mask), returns, rewards, kl)
    inputs = (scores, logprobs, ref_logprobs, values, mask)
    return Problem(case, inputs, 0, (), Truth(outputs))


def advantages_cost(case: Case) -> Cost:
    """logprobs, ref_logprobs, values, a score a sequence; four outputs. Whitening needs all
    advantages first, but they need not leave the chip."""
    scores = case.num_sequences * case.torch_dtype.itemsize
    return Cost(scores + _token_bytes(case, 3, 4, _OUT_BYTES), 0)


# --- discounted_returns


def returns_problem(case: Case, seed: int = 0) -> Problem:
    """inputs: rewards, loss_mask; output: the discounted reward to go."""
    draw = _Draw(case, seed)
    rewards, mask = draw.slots(0.2), draw.mask()
    returns = _decayed_sums(torch.where(mask, rewards.double(), 0), GAMMA)
    return Problem(case, (rewards, mask), 0, (), Truth((torch.where(mask, returns, 0),)))


def returns_cost(case: Case) -> Cost:
    """Rewards and returns."""
    return Cost(_token_bytes(case, 1, 1, _OUT_BYTES), 0)


# --- shape_rewards


def shaping_problem(case: Case, seed: int = 0) -> Problem:
    """inputs: scores [B], logprobs, ref_logprobs, loss_mask; outputs: rewards, kl (k1)."""
    problem = advantages_problem(case, seed)
    scores, logprobs, ref_logprobs, _, mask = problem.inputs
    assert isinstance(problem.truth, Truth)
    _, _, rewards, kl = problem.truth.outputs
    inputs = (scores, logprobs, ref_logprobs, mask)
    return Problem(case, inputs, 0, (), Truth((rewards, kl)))


def shaping_cost(case: Case) -> Cost:
    """logprobs, ref_logprobs, a score a sequence; rewards and kl."""
    scores = case.num_sequences * case.torch_dtype.itemsize
    return Cost(scores + _token_bytes(case, 2, 2, _OUT_BYTES), 0)


# --- masked_moments and masked_whiten


def moments_problem(case: Case, seed: int = 0) -> Problem:
    """inputs: x, mask; output [3]: under the mask the number, the mean, and the sum of squared
    deviations from it over that number (a sum of so many is no measure of an error)."""
    draw = _Draw(case, seed)
    x, mask = draw.slots(3.0, 1.0), draw.mask()
    kept = x.double()[mask]
    number = torch.tensor(float(len(kept)), dtype=torch.float64, device=x.device)
    moments = torch.stack((number, kept.mean(), kept.var(unbiased=False)))
    return Problem(case, (x, mask), 0, (), Truth((moments,)))


def moments_cost(case: Case) -> Cost:
    """x, at trained tokens."""
    return Cost(_token_bytes(case, 1, 0, _OUT_BYTES), 0)


def whiten_problem(case: Case, seed: int = 0) -> Problem:
    """inputs: x, mask; output: x of mean 0 and (unbiased) variance 1 over the mask."""
    draw = _Draw(case, seed)
    x, mask = draw.slots(3.0, 1.0), draw.mask()
    return Problem(case, (x, mask), 0, (), Truth((_exact_white(x.double(), mask),)))


def whiten_cost(case: Case) -> Cost:
    """x and the output."""
    return Cost(_token_bytes(case, 1, 1, _OUT_BYTES), 0)


def _exact_white(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    centred = x - x[mask].mean()
    variance = centred[mask].square().sum() / max(int(mask.sum()) - 1, 1)  # one entry has none
    white = centred / (variance + WHITEN_EPSILON).sqrt()
    return torch.where(mask, white, 0)


# --- kl_penalty


def kl_problem(case: Case, seed: int = 0) -> Problem:
    """inputs: logprobs, ref_logprobs; output: k3 of each token."""
    draw = _Draw(case, seed)
    logprobs = draw.slots(1.0, -2.0)
    ref_logprobs = (logprobs.float() + 0.3 * draw.slots().float()).to(case.torch_dtype)
    d = logprobs.double() - ref_logprobs.double()
    cotangent = draw.normal(*d.shape)
    slope = -torch.expm1(-d) * cotangent.double()
    return _with_gradients(
        case, (logprobs, ref_logprobs), (), cotangent, (torch.expm1(-d) + d,), (slope, -slope)
    )


def kl_cost(case: Case) -> Cost:
    """No mask. Both inputs and the output; backward reads the inputs and its gradient and writes
    both gradients."""
    num_slots, size = case.num_sequences * case.num_slots, case.torch_dtype.itemsize
    forward = num_slots * (2 * size + _OUT_BYTES)
    return Cost(forward + case.backward * num_slots * (4 * size + _OUT_BYTES), 0)


# --- policy_loss, value_loss and ppo_loss


def policy_loss_problem(case: Case, seed: int = 0) -> Problem:
    """inputs: new_logprobs, logprobs, advantages, loss_mask; outputs: the clipped loss, and with
    metrics mean half squared log-ratio, clipped fraction and mean ratio."""
    draw = _Draw(case, seed)
    logprobs, advantages, mask = draw.slots(1.0, -2.0), draw.slots(), draw.mask()
    new_logprobs = draw.off_the_clip(logprobs, CLIP_RANGE)
    outputs, slope = _exact_policy(new_logprobs, logprobs, advantages, mask)
    outputs = outputs if case.with_metrics else outputs[:1]
    one = torch.ones((), device=case.device)
    return _with_gradients(
        case, (new_logprobs,), (logprobs, advantages, mask), one, outputs, (slope,)
    )


def policy_loss_cost(case: Case) -> Cost:
    """Three inputs, and the gradient of new_logprobs in their dtype."""
    return Cost(_token_bytes(case, 3, int(case.backward), case.torch_dtype.itemsize), 0)


def value_loss_problem(case: Case, seed: int = 0) -> Problem:
    """inputs: new_values, values, returns, loss_mask; output: the clipped loss."""
    draw = _Draw(case, seed)
    (new_values, values, returns), mask = draw.values(), draw.mask()
    loss, slope, _ = _exact_value(new_values, values, returns, mask)
    one = torch.ones((), device=case.device)
    return _with_gradients(case, (new_values,), (values, returns, mask), one, (loss,), (slope,))


def value_loss_cost(case: Case) -> Cost:
    """Three inputs, and the gradient of new_values in their dtype."""
    return policy_loss_cost(case)


def ppo_problem(case: Case, seed: int = 0) -> Problem:
    """inputs: new_logprobs, new_values, logprobs, advantages, values, returns, loss_mask; outputs:
    policy + VF_COEF * value loss, and with metrics those of policy_loss_problem and the fraction
    of clipped values."""
    draw = _Draw(case, seed)
    logprobs, advantages, mask = draw.slots(1.0, -2.0), draw.slots(), draw.mask()
    new_logprobs = draw.off_the_clip(logprobs, CLIP_RANGE)
    new_values, values, returns = draw.values()
    (policy, *metrics), slope = _exact_policy(new_logprobs, logprobs, advantages, mask)
    value_loss, value_slope, clipped = _exact_value(new_values, values, returns, mask)
    metrics.append(clipped)
    outputs = (policy + VF_COEF * value_loss, *(metrics if case.with_metrics else ()))
    one = torch.ones((), device=case.device)
    rest = (logprobs, advantages, values, returns, mask)
    return _with_gradients(
        case, (new_logprobs, new_values), rest, one, outputs, (slope, VF_COEF * value_slope)
    )


def ppo_cost(case: Case) -> Cost:
    """Six inputs, and the gradients of new_logprobs and new_values in their dtype."""
    return Cost(_token_bytes(case, 6, 2 * case.backward, case.torch_dtype.itemsize), 0)


def _exact_policy(
    new_logprobs: torch.Tensor, logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor
) -> tuple[Tensors, torch.Tensor]:
    """(loss, approximate KL, clipped fraction, mean ratio), and the gradient of new_logprobs."""
    log_ratio = new_logprobs.double() - logprobs.double()
    ratio, advantages = log_ratio.exp(), advantages.double()
    up, down = (
        (advantages > 0) & (ratio > 1 + CLIP_RANGE),
        (advantages < 0) & (ratio < 1 - CLIP_RANGE),
    )
    bound = torch.where(up, 1 + CLIP_RANGE, torch.where(down, 1 - CLIP_RANGE, ratio))
    clipped = up | down
    outputs = (
        -(bound * advantages)[mask].mean(),
        log_ratio.square()[mask].mean() / 2,
        clipped[mask].double().mean(),
        ratio[mask].mean(),
    )
    return outputs, torch.where(mask & ~clipped, -ratio * advantages, 0) / mask.sum()


def _exact_value(
    new_values: torch.Tensor, values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss, the gradient of new_values, and the clipped fraction."""
    new, old, target = new_values.double(), values.double(), returns.double()
    error = new - target
    clipped_error = torch.maximum(torch.minimum(new, old + CLIP_RANGE), old - CLIP_RANGE) - target
    clipped = mask & (clipped_error.square() > error.square())
    squares = torch.maximum(error.square(), clipped_error.square())
    slope = torch.where(mask & ~clipped, error, 0) / mask.sum()
    return squares[mask].mean() / 2, slope, clipped[mask].double().mean()


# --- pairwise_loss


def pairwise_problem(case: Case, seed: int = 0) -> Problem:
    """inputs: chosen_scores, rejected_scores [N]; output: mean(-log sigmoid(chosen - rejected))."""
    draw = _Draw(case, seed)
    chosen, rejected = (x.to(case.torch_dtype) for x in draw.normal(2, case.num_rows))
    lead = chosen.double() - rejected.double()
    slope = -torch.sigmoid(-lead) / case.num_rows
    loss = torch.log1p(torch.exp(-lead)).mean()
    one = torch.ones((), device=case.device)
    return _with_gradients(case, (chosen, rejected), (), one, (loss,), (slope, -slope))


def pairwise_cost(case: Case) -> Cost:
    """Both scores, and both gradients."""
    passes = 2 if case.backward else 1
    return Cost(passes * 2 * case.num_rows * case.torch_dtype.itemsize, 0)


def _with_gradients(
    case: Case,
    wanted: Tensors,
    rest: Tensors,
    cotangent: torch.Tensor,
    outputs: Tensors,
    slopes: Tensors,
) -> Problem:
    """A problem whose first inputs get gradients, known at all of their rows."""
    gradients: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    if case.backward:
        wanted = tuple(x.requires_grad_() for x in wanted)
        gradients = tuple(
            (torch.arange(len(slope), device=slope.device), slope.detach()) for slope in slopes
        )
    truth = Truth(tuple(x.detach() for x in outputs), gradients)
    return Problem(case, (*wanted, *rest), len(wanted), (cotangent,), truth)

"""Inputs of a case on logits or hidden states, and the right answer in float64, by formulas of
their own.

The gradients are known at some rows of each tensor only: of the logits or hidden rows, and of the
vocabulary rows of the weight. That is cheap, exact, and needs no float64 gradient of full size.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fuserl.bench.case import Case
from fuserl.bench.truth import SamplerTruth, Tensors, Truth

CHUNK_BYTES = 256 << 20
NUM_CHECKED_ROWS = 32
LOGIT_STD = 2.0
CLIP_RANGE, KL_COEF, ENTROPY_COEF = 0.2, 0.04, 0.01


@dataclass(frozen=True, slots=True)
class PolicyBatch:
    """What a policy loss takes beside the projection: [B, T] with B * T = N rows; advantages [B],
    as in GRPO, since not every rival takes one a token."""

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    advantages: torch.Tensor
    loss_mask: torch.Tensor
    entropy_coef: float

    def loss(self, new_logprobs: torch.Tensor, entropy: torch.Tensor | None) -> torch.Tensor:
        """The clipped loss, with the k3 KL and the entropy bonus, averaged over all tokens."""
        shape, dtype = self.logprobs.shape, new_logprobs.dtype
        if dtype != torch.float64:
            dtype = torch.float32
        new_logprobs = new_logprobs.view(shape).to(dtype)
        ratio = (new_logprobs - self.logprobs).exp()
        clipped = ratio.clamp(1 - CLIP_RANGE, 1 + CLIP_RANGE)
        advantages = self.advantages.unsqueeze(-1)
        term = -torch.minimum(ratio * advantages, clipped * advantages)
        difference = self.ref_logprobs - new_logprobs
        term = term + KL_COEF * (difference.exp() - difference - 1)
        if entropy is not None and self.entropy_coef:
            term = term - self.entropy_coef * entropy.view(shape).to(dtype)
        return torch.where(self.loss_mask, term, 0).sum() / self.loss_mask.sum()


@dataclass(frozen=True, slots=True)
class Problem:
    """inputs: a provider's arguments; the first num_grads of them get gradients.
    cotangents: float32, one for each output that has a gradient; others come after those."""

    case: Case
    inputs: tuple
    num_grads: int
    cotangents: Tensors
    truth: Truth | SamplerTruth

    @property
    def required_bytes(self) -> int:
        """Of the gradients that a call must return in memory that is not an input's."""
        if not self.case.backward or self.case.inplace_grad:
            return 0
        return sum(x.nbytes for x in self.inputs[: self.num_grads])


class _Rows:
    """The float64 logits of a case by row chunks, and the statistics of each row [N]."""

    def __init__(self, case: Case, tensors: Tensors, token_ids: torch.Tensor) -> None:
        self._tensors = tuple(x.double() for x in tensors[1:])
        self._first, self._vocab_size = tensors[0], case.vocab_size
        self.token_ids = token_ids
        chosen, entropy, lse = [], [], []
        for rows in self._chunks():
            logits = self.logits(rows)
            lse.append(logits.logsumexp(-1))
            chosen.append(logits.gather(-1, token_ids[rows, None]).squeeze(-1) - lse[-1])
            p = (logits - lse[-1][:, None]).exp_()
            entropy.append(lse[-1] - p.mul_(logits).sum(-1))
        self.lse, self.logprobs, self.entropy = map(torch.cat, (lse, chosen, entropy))

    def _chunks(self) -> Iterator[slice]:
        size = max(1, CHUNK_BYTES // (8 * self._vocab_size))
        num_rows = self._first.shape[0]
        for start in range(0, num_rows, size):
            yield slice(start, min(start + size, num_rows))

    def logits(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """[rows, V]"""
        x = self._first[rows].double()
        return x @ self._tensors[0].t() if self._tensors else x

    def gradients(self, g: torch.Tensor, h: torch.Tensor) -> tuple:
        """Truth.gradients, for gradients g [N] to the log-probability and h [N] to the entropy."""
        picked = _spread(self.lse.shape[0], self.lse.device)
        slope = self._slope(self.logits(picked), picked, g, h)
        slope.scatter_add_(1, self.token_ids[picked, None], g[picked, None])
        if not self._tensors:
            return ((picked, slope),)
        (weight,) = self._tensors
        words = torch.cat([self.token_ids[picked], _spread(self._vocab_size, picked.device)])
        words = words.unique()
        hidden = self._first.double()
        columns = self._slope(hidden @ weight[words].t(), slice(None), g, h)
        columns += torch.where(self.token_ids[:, None] == words, g[:, None], 0)
        return ((picked, slope @ weight), (words, columns.t() @ hidden))

    def _slope(
        self, logits: torch.Tensor, rows: slice | torch.Tensor, g: torch.Tensor, h: torch.Tensor
    ) -> torch.Tensor:
        """-g p - h p (log p + entropy): the gradient of the logits without its one-hot term."""
        logp = logits - self.lse[rows, None]
        return -logp.exp() * (g[rows, None] + h[rows, None] * (logp + self.entropy[rows, None]))


def _spread(count: int, device: torch.device) -> torch.Tensor:
    """Up to NUM_CHECKED_ROWS indices from the first to the last of `count`."""
    picks = torch.linspace(0, count - 1, min(count, NUM_CHECKED_ROWS), device=device)
    return picks.round().long().unique()


def _inputs(case: Case, generator: torch.Generator) -> tuple[Tensors, torch.Tensor]:
    """Logits, or hidden and weight with logits of the same spread; and token ids [N]."""
    device, dtype = case.device, case.torch_dtype

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    if case.hidden_size:
        scale = LOGIT_STD / math.sqrt(case.hidden_size)
        hidden, weight = (
            normal(case.num_rows, case.hidden_size),
            normal(case.vocab_size, case.hidden_size),
        )
        tensors: Tensors = (hidden.to(dtype), weight.mul_(scale).to(dtype))
    else:
        tensors = (normal(case.num_rows, case.vocab_size).mul_(LOGIT_STD).to(dtype),)
    token_ids = torch.randint(case.vocab_size, (case.num_rows,), generator=generator, device=device)
    return tensors, token_ids


def logprobs_problem(case: Case, seed: int = 0) -> Problem:
    """inputs: (logits, token_ids), or (hidden, weight, token_ids); outputs: log-probabilities [N]
    and with_entropy the entropies [N]."""
    generator = torch.Generator(case.device).manual_seed(seed)
    tensors, token_ids = _inputs(case, generator)
    rows = _Rows(case, tensors, token_ids)
    g, h = torch.randn(2, case.num_rows, generator=generator, device=case.device)
    outputs: Tensors = (rows.logprobs,)
    cotangents: Tensors = (g,)
    if case.with_entropy:
        outputs, cotangents = (*outputs, rows.entropy), (g, h)
    else:
        h = torch.zeros_like(h)
    gradients = rows.gradients(g.double(), h.double()) if case.backward else ()
    return _problem(case, tensors, (token_ids,), cotangents, Truth(outputs, gradients))


def policy_problem(case: Case, seed: int = 0) -> Problem:
    """inputs: (hidden, weight, PolicyBatch); output: the loss. with_entropy adds its bonus.

    The ratios stay clear of the clip's edges, so that rounding clips no token or frees one.
    """
    generator = torch.Generator(case.device).manual_seed(seed)
    tensors, token_ids = _inputs(case, generator)
    rows = _Rows(case, tensors, token_ids)
    sequence = math.gcd(case.num_rows, 256)
    shape = (case.num_rows // sequence, sequence)
    noise = torch.randn(3, *shape, generator=generator, device=case.device)
    near, far = noise[0].clamp(-1, 1) * 0.08, noise[1].sign() * 0.5
    logprobs = rows.logprobs.view(shape) + torch.where(noise[1].abs() > 1, far, near)
    batch = PolicyBatch(
        token_ids=token_ids.view(shape),
        logprobs=logprobs.float(),
        ref_logprobs=(logprobs + 0.2 * noise[2]).float(),
        advantages=torch.randn(shape[0], generator=generator, device=case.device),
        loss_mask=torch.ones(shape, dtype=torch.bool, device=case.device),
        entropy_coef=ENTROPY_COEF if case.with_entropy else 0.0,
    )
    new_logprobs, entropy = rows.logprobs.requires_grad_(), rows.entropy.requires_grad_()
    loss = batch.loss(new_logprobs, entropy)
    g, h = torch.autograd.grad(loss, (new_logprobs, entropy), materialize_grads=True)
    rows.entropy = entropy.detach()
    gradients = rows.gradients(g, h) if case.backward else ()
    one = torch.ones((), device=case.device)
    return _problem(case, tensors, (batch,), (one,), Truth((loss.detach(),), gradients))


def _problem(
    case: Case, tensors: Tensors, rest: tuple, cotangents: Tensors, truth: Truth
) -> Problem:
    if case.backward:
        for tensor in tensors:
            tensor.requires_grad_()
    return Problem(case, (*tensors, *rest), len(tensors), cotangents, truth)


def eager_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, with_entropy: bool) -> Tensors:
    """What most trainers write, in the dtype of the logits."""
    logp = logits.log_softmax(-1)
    chosen = logp.gather(-1, token_ids[:, None]).squeeze(-1)
    return (chosen, -(logp.exp() * logp).sum(-1)) if with_entropy else (chosen,)


def eager_linear_logprobs(
    hidden: torch.Tensor, weight: torch.Tensor, token_ids: torch.Tensor, with_entropy: bool
) -> Tensors:
    return eager_logprobs(F.linear(hidden, weight), token_ids, with_entropy)

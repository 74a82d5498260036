"""Sampling of tokens: its problem, and the other samplers.

A provider takes (logits, drawn) and returns token_ids, logprobs (of the tokens, before truncation)
and perhaps truncated logprobs, [N] each. `drawn` are tokens for the yardstick, which draws none.
"""

import torch

import fuserl_kernels as fk
from fuserl.bench.case import Case
from fuserl.bench.problem import CHUNK_BYTES, LOGIT_STD, Problem
from fuserl.bench.rivals import Function, Unavailable, load
from fuserl.bench.truth import SamplerTruth, Tensors
from fuserl_kernels import backend
from fuserl_kernels.registration import tables

BANNED_EVERY = 1000  # every so many columns one is -inf, and must not be drawn


def sampling_problem(case: Case, seed: int = 0) -> Problem:
    generator = torch.Generator(case.device).manual_seed(seed)
    shape = (case.num_rows, case.vocab_size)
    logits = torch.randn(shape, generator=generator, device=case.device).mul_(LOGIT_STD)
    logits[:, BANNED_EVERY // 2 :: BANNED_EVERY] = -torch.inf
    logits = logits.to(case.torch_dtype)
    scaled = logits.double() / case.temperature
    lse = scaled.logsumexp(-1)
    u = torch.rand(case.num_rows, 1, generator=generator, device=case.device).double()
    kept, edge, drawn = [], [], []
    size = max(1, CHUNK_BYTES // (8 * case.vocab_size))
    for x, total, v in zip(scaled.split(size), lse.split(size), u.split(size), strict=True):
        ordered, order = x.sort(dim=-1, descending=True, stable=True)
        p = (ordered - total[:, None]).exp()
        reached = p.cumsum(-1)
        last = (reached - p < case.top_p).sum(-1, keepdim=True) - 1  # of the kept set
        kept.append(reached.gather(-1, last))
        edge.append(p.gather(-1, last))
        place = torch.searchsorted(reached, v * kept[-1], right=True)
        drawn.append(order.gather(-1, torch.minimum(place, last)))
    kept_mass, at_edge, token_ids = (torch.cat(x).squeeze(-1) for x in (kept, edge, drawn))
    truth = SamplerTruth(scaled, lse, kept_mass, at_edge, case.top_p)
    return Problem(case, (logits, token_ids), 0, (), truth)


def torch_sampler(case: Case) -> Function:
    """Softmax and multinomial; under top-p on the sorted probabilities."""

    def run(logits: torch.Tensor, drawn: torch.Tensor) -> Tensors:
        x = _scaled(logits, case)
        p = x.softmax(-1)
        if case.top_p == 1:
            token_ids = torch.multinomial(p, 1)
        else:
            p, order = p.sort(-1, descending=True)
            p = p.masked_fill(p.cumsum(-1) - p >= case.top_p, 0)
            token_ids = order.gather(-1, torch.multinomial(p, 1))
        return _with_logprobs(token_ids, x)

    return run


def transformers_sampler(case: Case) -> Function:
    """The warpers and the multinomial of `generate`, and what a trainer adds for the logprob."""
    temperature = load("transformers", "TemperatureLogitsWarper")
    top_p = load("transformers", "TopPLogitsWarper")
    warpers = [temperature(case.temperature)] if case.temperature != 1 else []
    warpers += [top_p(case.top_p)] if case.top_p < 1 else []

    def run(logits: torch.Tensor, drawn: torch.Tensor) -> Tensors:
        scores = logits.float()
        for warper in warpers:
            scores = warper(None, scores)
        token_ids = torch.multinomial(scores.softmax(-1), 1)
        return _with_logprobs(token_ids, _scaled(logits, case))

    return run


def exp_sum(case: Case) -> Function:
    """No sampler but the least any must do: one read with an exponential of each logit and their
    sum, which our token_logprobs does fastest; here at tokens drawn before."""
    table = tables()["token_logprobs"]
    sample = torch.empty(0, dtype=case.torch_dtype, device=case.device)
    with fk.use_backend("auto"):
        if backend.select("token_logprobs", table, sample) is table["reference"]:
            raise Unavailable("token_logprobs has only the reference here")

    def run(logits: torch.Tensor, drawn: torch.Tensor) -> Tensors:
        return drawn, fk.token_logprobs(logits, drawn, temperature=case.temperature)

    return run


def _scaled(logits: torch.Tensor, case: Case) -> torch.Tensor:
    """In float32 (float64 for float64), as `generate` converts them."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    return x / case.temperature


def _with_logprobs(token_ids: torch.Tensor, x: torch.Tensor) -> Tensors:
    """token_ids: [N, 1]."""
    return token_ids.squeeze(-1), x.log_softmax(-1).gather(-1, token_ids).squeeze(-1)

"""Log-probability of one token per row: log_softmax(softcap(logits) / temperature)[token_id].

With x = softcap * tanh(logits / softcap), or the logits themselves without a softcap, and
p = softmax(x / temperature), logp = log p, a row has the statistics
    max      the largest x
    log_sum  log of sum_v exp((x_v - max) / temperature)
    entropy  -sum_v p_v * logp_v, where 0 * -inf counts as 0
and, for a loss with gradients g to the log-probability and h to the entropy,
    dlogits = (a * p - b * onehot(token) - c * p * (logp + entropy)) / temperature * dx/dlogits
with a = b = -g, c = h and dx/dlogits = 1 - (x / softcap)^2. max and log_sum are kept apart because
their sum, the log-sum-exp, loses the small digits when logits are large (logits near 1e4 in
float32: 5e-4).
"""

import torch

from fuserl_kernels.reference.sequences import compute_dtype


def _capped(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """x [N, V] in the compute dtype."""
    x = logits.to(compute_dtype(logits))
    return torch.tanh(x / softcap) * softcap if softcap else x


def _shifted(
    x: torch.Tensor,
    row_max: torch.Tensor,
    temperatures: torch.Tensor | None,
    temperature: float,
) -> torch.Tensor:
    """(x - max) / temperature [N, V]; subtracting first keeps large logits exact."""
    shifted = x - row_max.unsqueeze(-1)
    if temperatures is not None:
        return shifted.div_(temperatures.to(x.dtype).unsqueeze(-1))
    return shifted if temperature == 1.0 else shifted.div_(temperature)


def token_logprobs_fwd(
    logits: torch.Tensor,  # [N, V]
    token_ids: torch.Tensor,  # [N] int64
    temperatures: torch.Tensor | None,  # [N], or None for the number
    temperature: float,
    softcap: float,  # 0 for none
    loss_mask: torch.Tensor | None,  # [N] bool
    return_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns logprobs [N], entropy [N] (or [0]) and stats [2, N] = (max, log_sum).

    A trained row with a token id outside [0, V) gives NaN."""
    x = _capped(logits, softcap)
    row_max = x.amax(-1)
    shifted = _shifted(x, row_max, temperatures, temperature)
    e = shifted.exp()
    total = e.sum(-1)  # torch.log_softmax sums less exactly: 1e-5 off at V = 128256 in float32
    log_sum = total.log()
    inside = (token_ids >= 0) & (token_ids < x.shape[-1])
    chosen = shifted.gather(-1, torch.where(inside, token_ids, 0).unsqueeze(-1)).squeeze(-1)
    chosen = torch.where(inside, chosen - log_sum, torch.nan)
    entropy = x.new_empty(0)
    if return_entropy:
        # -sum p logp without the rounding of logp; e itself carries NaN, else is 0
        entropy = log_sum - torch.where(e > 0, e * shifted, e).sum(-1) / total
    stats = torch.stack([row_max, log_sum])
    if loss_mask is not None:
        chosen = torch.where(loss_mask, chosen, 0)
        stats = torch.where(loss_mask, stats, 0)
        entropy = torch.where(loss_mask, entropy, 0) if return_entropy else entropy
    return chosen, entropy, stats


def token_logprobs_bwd(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    temperatures: torch.Tensor | None,
    temperature: float,
    softcap: float,
    loss_mask: torch.Tensor | None,
    stats: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprobs: torch.Tensor,  # [N]
    grad_entropy: torch.Tensor | None,  # [N]
    out: torch.Tensor | None = None,  # [N, V]
) -> torch.Tensor:
    """dlogits [N, V] in the dtype of logits, or written to `out`, which may have a smaller dtype
    and may lie over the storage of the logits."""
    dtype = compute_dtype(logits)
    inside = (token_ids >= 0) & (token_ids < logits.shape[-1])
    g = torch.where(inside, grad_logprobs.to(dtype), torch.nan)
    row_max, log_sum = stats.to(dtype)
    x = _capped(logits, softcap)
    logp = _shifted(x, row_max, temperatures, temperature)
    logp = logp - log_sum.unsqueeze(-1)
    p = logp.exp()
    gradient = p * -g.unsqueeze(-1)
    index = torch.where(inside, token_ids, 0).unsqueeze(-1)
    gradient.scatter_add_(-1, index, g.unsqueeze(-1))
    if grad_entropy is not None:
        slope = torch.where(p > 0, p * (logp + entropy.to(dtype).unsqueeze(-1)), p)
        gradient -= grad_entropy.to(dtype).unsqueeze(-1) * slope
    if temperatures is not None:
        gradient /= temperatures.to(dtype).unsqueeze(-1)
    else:
        gradient /= temperature
    if softcap:
        gradient *= 1 - (x / softcap).square()
    if loss_mask is not None:
        gradient = torch.where(loss_mask.unsqueeze(-1), gradient, 0)
    return gradient.to(logits.dtype) if out is None else out.copy_(gradient)

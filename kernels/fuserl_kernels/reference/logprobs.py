"""Log-probability of one token per row: log_softmax(logits / temperature)[token_id].

With x = logits / temperature, p = softmax(x) and logp = log p, a row has the statistics
    max      the largest logit
    log_sum  log of sum_v exp((logits_v - max) / temperature)
    entropy  -sum_v p_v * logp_v, where 0 * -inf counts as 0
and, for a loss with gradients g to the log-probability and h to the entropy,
    dlogits = (a * p - b * onehot(token) - c * p * (logp + entropy)) / temperature
with a = b = -g and c = h. max and log_sum are kept apart because their sum, the log-sum-exp,
loses the small digits when logits are large (logits near 1e4 in float32: 5e-4).
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from fuserl_kernels.reference.sequences import compute_dtype

CHUNK_BYTES = 64 << 20  # bound on the logits of one row chunk


class RowKernels(NamedTuple):
    """The two row functions that the ops with a projection run on each chunk of logits."""

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    backward: Callable[..., torch.Tensor]


def _shifted(
    logits: torch.Tensor,
    row_max: torch.Tensor,
    temperatures: torch.Tensor | None,
    temperature: float,
) -> torch.Tensor:
    """(logits - max) / temperature [N, V]; subtracting first keeps large logits exact."""
    shifted = logits - row_max.unsqueeze(-1)
    if temperatures is not None:
        return shifted.div_(temperatures.to(logits.dtype).unsqueeze(-1))
    return shifted if temperature == 1.0 else shifted.div_(temperature)


def token_logprobs_fwd(
    logits: torch.Tensor,  # [N, V]
    token_ids: torch.Tensor,  # [N] int64
    temperatures: torch.Tensor | None,  # [N], or None for the number
    temperature: float,
    loss_mask: torch.Tensor | None,  # [N] bool
    return_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns logprobs [N], entropy [N] (or [0]) and stats [2, N] = (max, log_sum).

    A trained row with a token id outside [0, V) gives NaN."""
    x = logits.to(compute_dtype(logits))
    row_max = x.amax(-1)
    logp = torch.log_softmax(_shifted(x, row_max, temperatures, temperature), -1)
    inside = (token_ids >= 0) & (token_ids < x.shape[-1])
    chosen = logp.gather(-1, torch.where(inside, token_ids, 0).unsqueeze(-1)).squeeze(-1)
    chosen = torch.where(inside, chosen, torch.nan)
    entropy = x.new_empty(0)
    if return_entropy:
        p = logp.exp()
        entropy = -torch.where(p > 0, p * logp, p).sum(-1)  # p itself carries NaN, else is 0
    stats = torch.stack([row_max, -logp.amax(-1)])
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
    loss_mask: torch.Tensor | None,
    stats: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprobs: torch.Tensor,  # [N]
    grad_entropy: torch.Tensor | None,  # [N]
    out: torch.Tensor | None = None,  # [N, V], may be logits itself
) -> torch.Tensor:
    """dlogits [N, V] in the dtype of logits, written to `out` if given."""
    dtype = compute_dtype(logits)
    g = grad_logprobs.to(dtype)
    row_max, log_sum = stats.to(dtype)
    logp = _shifted(logits.to(dtype), row_max, temperatures, temperature)
    logp = logp - log_sum.unsqueeze(-1)
    p = logp.exp()
    gradient = p * -g.unsqueeze(-1)
    inside = (token_ids >= 0) & (token_ids < logits.shape[-1])
    index = torch.where(inside, token_ids, 0).unsqueeze(-1)
    gradient.scatter_add_(-1, index, torch.where(inside, g, torch.nan).unsqueeze(-1))
    if grad_entropy is not None:
        slope = torch.where(p > 0, p * (logp + entropy.to(dtype).unsqueeze(-1)), p)
        gradient -= grad_entropy.to(dtype).unsqueeze(-1) * slope
    if temperatures is not None:
        gradient /= temperatures.to(dtype).unsqueeze(-1)
    else:
        gradient /= temperature
    if loss_mask is not None:
        gradient = torch.where(loss_mask.unsqueeze(-1), gradient, 0)
    return gradient.to(logits.dtype) if out is None else out.copy_(gradient)


ROWS = RowKernels(token_logprobs_fwd, token_logprobs_bwd)


class ProjectionChunks:
    """softcap(hidden @ weight.T + bias) in chunks of rows that share one buffer, and the gradients.

    hidden [N, D] and weight [V, D] are computed in max(float32, input dtype): the statistics come
    from unrounded logits even when the inputs are bf16."""

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float,
    ) -> None:
        dtype = compute_dtype(hidden, weight)
        self.hidden = hidden.to(dtype)
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)
        self.softcap = softcap
        self.grad_hidden: torch.Tensor | None = None
        self.grad_weight: torch.Tensor | None = None
        self.grad_bias: torch.Tensor | None = None
        self._rows = max(1, CHUNK_BYTES // (weight.shape[0] * self.hidden.element_size()))
        self._buffer = self.hidden.new_empty(min(self._rows, hidden.shape[0]), weight.shape[0])

    def __iter__(self) -> Iterator[slice]:
        num_rows = self.hidden.shape[0]
        for start in range(0, num_rows, self._rows):
            yield slice(start, min(start + self._rows, num_rows))

    def logits(self, rows: slice) -> torch.Tensor:
        """[rows, V], valid until the next call."""
        logits = self._buffer[: rows.stop - rows.start]
        if self.bias is None:
            torch.mm(self.hidden[rows], self.weight.t(), out=logits)
        else:
            torch.addmm(self.bias, self.hidden[rows], self.weight.t(), out=logits)
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def want_gradients(self, hidden: bool, weight: bool, bias: bool) -> None:
        self.grad_hidden = torch.zeros_like(self.hidden) if hidden else None
        self.grad_weight = torch.zeros_like(self.weight) if weight else None
        if bias and self.bias is not None:
            self.grad_bias = torch.zeros_like(self.bias)

    def backward(
        self, rows: slice, logits: torch.Tensor, row_backward: Callable[..., torch.Tensor]
    ) -> None:
        """Add the chunk's gradients; `row_backward(out)` writes dlogits, perhaps over logits."""
        if self.softcap:
            slope = 1 - (logits / self.softcap).square_()
            gradient = row_backward(logits).mul_(slope)
        else:
            gradient = row_backward(logits)
        if self.grad_hidden is not None:
            torch.mm(gradient, self.weight, out=self.grad_hidden[rows])
        if self.grad_weight is not None:
            self.grad_weight.addmm_(gradient.t(), self.hidden[rows])
        if self.grad_bias is not None:
            self.grad_bias += gradient.sum(0)


def _take(tensor: torch.Tensor | None, rows: torch.Tensor | slice | None) -> torch.Tensor | None:
    return tensor if tensor is None or rows is None else tensor[rows]


def linear_token_logprobs_fwd(
    kernels: RowKernels,
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    bias: torch.Tensor | None,  # [V]
    token_ids: torch.Tensor,  # [N]
    temperatures: torch.Tensor | None,
    temperature: float,
    softcap: float,  # 0 for none
    loss_mask: torch.Tensor | None,
    return_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """token_logprobs_fwd of softcap(hidden @ weight.T + bias); masked rows cost no product."""
    num_rows = hidden.shape[0]
    kept = None if loss_mask is None else loss_mask.nonzero().squeeze(-1)
    if kept is not None:
        hidden, token_ids = hidden[kept], token_ids[kept]
    temperatures = _take(temperatures, kept)
    chunks = ProjectionChunks(hidden, weight, bias, softcap)
    dtype = chunks.hidden.dtype
    logprobs = hidden.new_empty(hidden.shape[0], dtype=dtype)
    entropy = hidden.new_empty(hidden.shape[0] if return_entropy else 0, dtype=dtype)
    stats = hidden.new_empty(2, hidden.shape[0], dtype=dtype)
    for rows in chunks:
        logprobs[rows], part, stats[:, rows] = kernels.forward(
            chunks.logits(rows),
            token_ids[rows],
            _take(temperatures, rows),
            temperature,
            None,
            return_entropy,
        )
        if return_entropy:
            entropy[rows] = part
    if kept is None:
        return logprobs, entropy, stats
    full = logprobs.new_zeros(num_rows).index_copy_(0, kept, logprobs)
    full_stats = logprobs.new_zeros(2, num_rows).index_copy_(1, kept, stats)
    if return_entropy:
        entropy = logprobs.new_zeros(num_rows).index_copy_(0, kept, entropy)
    return full, entropy, full_stats


def linear_token_logprobs_bwd(
    kernels: RowKernels,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    temperatures: torch.Tensor | None,
    temperature: float,
    softcap: float,
    loss_mask: torch.Tensor | None,
    stats: torch.Tensor,
    entropy: torch.Tensor,
    grad_logprobs: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of hidden, weight and bias in their dtypes ([0] where not needed).

    The logits are computed again by chunk. Rows whose incoming gradients are exactly zero are left
    out of the products, which changes nothing."""
    live = grad_logprobs != 0
    if grad_entropy is not None:
        live = live | (grad_entropy != 0)
    if loss_mask is not None:
        live = live & loss_mask
    kept = live.nonzero().squeeze(-1)
    chunks = ProjectionChunks(hidden[kept], weight, bias, softcap)
    chunks.want_gradients(needs_hidden, needs_weight, needs_bias)
    for rows in chunks:
        index = kept[rows]
        logits = chunks.logits(rows)

        row_backward = functools.partial(
            kernels.backward,
            logits,
            token_ids[index],
            _take(temperatures, index),
            temperature,
            None,
            stats[:, index],
            entropy[index] if grad_entropy is not None else entropy,
            grad_logprobs[index],
            _take(grad_entropy, index),
        )
        chunks.backward(rows, logits, row_backward)
    return projection_gradients(chunks, hidden, weight, bias, kept)


def projection_gradients(
    chunks: ProjectionChunks,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kept: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The accumulated gradients in the dtypes of their inputs; rows outside `kept` get zero."""
    grad_hidden, grad_weight = hidden.new_empty(0), weight.new_empty(0)
    grad_bias = weight.new_empty(0) if bias is None else bias.new_empty(0)
    if chunks.grad_hidden is not None:
        grad_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        grad_hidden.index_copy_(0, kept, chunks.grad_hidden.to(hidden.dtype))
    if chunks.grad_weight is not None:
        grad_weight = chunks.grad_weight.to(weight.dtype)
    if chunks.grad_bias is not None and bias is not None:
        grad_bias = chunks.grad_bias.to(bias.dtype)
    return grad_hidden, grad_weight, grad_bias

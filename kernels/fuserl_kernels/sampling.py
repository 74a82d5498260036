"""One sampled token per row of logits, with its log-probability before and after truncation.

Random bits are keyed by (seed, request id, position), so a request gets the same tokens in any
batch. Definition: reference/sampling.py.
"""

import functools
from typing import Any

import torch

from fuserl_kernels import backend, checks
from fuserl_kernels.native_sampling import sample_cuda, sample_native
from fuserl_kernels.reference.sampling import sample_tokens_fwd
from fuserl_kernels.reference.sequences import compute_dtype
from fuserl_kernels.registration import register
from fuserl_kernels.token_logprobs import FORWARD as ROW_FORWARD
from fuserl_kernels.triton_sampling import sample_triton

FORWARD: backend.Table = {
    "reference": functools.partial(sample_tokens_fwd, ROW_FORWARD["reference"]),
    "triton": sample_triton,
    "native": backend.PerDevice(cpu=sample_native, cuda=sample_cuda),
}


def _fake(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_rows, dtype = logits.shape[0], compute_dtype(logits)
    return (
        logits.new_empty(num_rows, dtype=torch.int64),
        logits.new_empty(num_rows, dtype=dtype),
        logits.new_empty(num_rows, dtype=dtype),
    )


_op = register(
    "sample_tokens(Tensor logits, float temperature, int top_k, float top_p, float min_p, "
    "int seed, Tensor request_ids, Tensor positions) -> (Tensor, Tensor, Tensor)",
    FORWARD,
    _fake,
)


def _row_numbers(name: str, numbers: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    checks.integer(name, numbers)
    checks.shape(name, numbers, logits.shape[:1], "one for each row of logits")
    checks.device(name, numbers, "logits", logits)
    return numbers.long()


def sample_tokens(
    logits: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int,
    request_ids: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sample a token for each row of logits [B, V] / temperature.

    temperature: 0 takes the largest logit (the lowest index among equals).
    top_k: keep the k largest (0: all), ties by lowest index. top_p: of those, renormalised, keep
        the smallest likeliest set whose mass reaches top_p. min_p: of those, drop what is less
        likely than min_p times the likeliest.
    seed: in [0, 2^63). request_ids: [B] integer, default the row number. positions: [B] integer
        below 2^32, default 0. The random bits depend on these three only, the token on them and the
        row's own logits: not on other rows, nor on B.

    Returns token_ids int64 [B], logprobs [B] and truncated_logprobs [B], float32 (float64 for
    float64). logprobs: token_logprobs(logits, token_ids, temperature=temperature), unscaled for
    temperature 0; truncated_logprobs: of the kept set, 0 for temperature 0. A row holding a NaN, a
    +inf, or nothing but -inf gives -1, NaN and NaN: the caller checks, here that would wait for the
    device. No gradient. Raises ValueError for arguments out of range.
    """
    checks.floating("logits", logits)
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must have shape [B, V] with V > 0, not {list(logits.shape)}")
    checks.at_least("temperature", temperature, 0.0)
    checks.whole("top_k", top_k, 0)
    checks.above("top_p", top_p, 0.0)
    checks.between("top_p", top_p, 0.0, 1.0)
    checks.between("min_p", min_p, 0.0, 1.0)
    checks.between("seed", seed, 0, 2**63 - 1)
    if request_ids is None:
        request_ids = torch.arange(logits.shape[0], device=logits.device)
    if positions is None:
        positions = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    token_ids, logprobs, truncated_logprobs = _op(
        checks.detached(logits),
        float(temperature),
        int(top_k),
        float(top_p),
        float(min_p),
        int(seed),
        _row_numbers("request_ids", request_ids, logits),
        _row_numbers("positions", positions, logits),
    )
    return token_ids, logprobs, truncated_logprobs

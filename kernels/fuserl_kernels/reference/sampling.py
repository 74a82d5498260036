"""Sampling one token per row, with bits that depend on (seed, request id, position) only.

Bits: Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"),
key = (seed low, seed high), counter = (position, request low, request high, 0). The first two
words make a float64 uniform in [0, 1) of 53 bits. The token is the inverse CDF of the kept set, so
a row's token depends on nothing but its own logits and bits. The CDF runs lane by lane: over the
columns 0, LANES, 2 LANES, ..., then 1, LANES + 1, ... A kernel that keeps a sum for each lane has
read the row once when it knows the lane, and then looks at the few columns of that lane again.
"""

import functools
import math
from collections.abc import Callable

import torch

from fuserl_kernels.reference.sequences import compute_dtype

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10
LANES = 2048


@functools.lru_cache(maxsize=16)
def _round_constants(
    key_low: int, key_high: int, device: torch.device
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Multipliers [2, 1] for the counter lanes (0, 2), and a key [2, 1] for each round."""
    keys = [
        [[(key_high + r * _KEY_STEPS[1]) & _WORD], [(key_low + r * _KEY_STEPS[0]) & _WORD]]
        for r in range(_ROUNDS)
    ]
    multipliers = torch.tensor(_MULTIPLIERS, device=device).unsqueeze(-1)
    return multipliers, torch.tensor(keys, device=device).unbind(0)


def philox(counter: torch.Tensor, key_low: int, key_high: int) -> torch.Tensor:
    """Four random 32-bit words for each column of four 32-bit counter words: int64 [4, N] both.

    The two lanes of a round run stacked: even = words (0, 2), odd = words (3, 1), crossed so that
    the high halves of the products meet their partners without a flip. int64 products wrap, which
    keeps every bit of the 64-bit product."""
    multipliers, keys = _round_constants(key_low, key_high, counter.device)
    even, odd = counter[0::2], counter[1::2].flip(0)
    for key in keys:
        product = even * multipliers
        crossed = (product >> 32).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(_WORD)
        even = crossed.flip(0)  # crossed holds words (2, 0)
        odd = product.bitwise_and_(_WORD)  # low halves: words (3, 1)
    return torch.stack([even[0], odd[1], even[1], odd[0]])


def uniform(seed: int, request_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """float64 [B] in [0, 1), 53 bits."""
    counter = torch.stack(
        [positions, request_ids, request_ids >> 32, torch.zeros_like(positions)]
    ).bitwise_and_(_WORD)
    words = philox(counter, seed & _WORD, (seed >> 32) & _WORD)
    return ((words[0] >> 5) * 67108864 + (words[1] >> 6)).double() * 2.0**-53


def _top_k(x: torch.Tensor, k: int) -> torch.Tensor:
    """Mask of the k largest entries, ties by lowest index."""
    threshold = x.topk(k, -1, sorted=True).values[:, -1:]
    above = x > threshold
    tied = x == threshold
    room = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= room))


def _top_p(x: torch.Tensor, top_p: float) -> torch.Tensor:
    """Mask of the smallest set of likeliest entries whose mass reaches top_p (at least one), ties
    by lowest index."""
    ordered, order = x.sort(dim=-1, descending=True, stable=True)
    mass = torch.softmax(ordered, -1).double()
    kept = mass.cumsum(-1) - mass < top_p
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def _draw(probabilities: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Column [B] of the first entry, lane by lane, whose cumulative mass exceeds u * total; never
    one of mass 0.

    There always is one: for u <= 1 - 2^-53 the float64 product u * total rounds below total."""
    num_rows, vocab_size = probabilities.shape
    turns = -(-vocab_size // LANES)
    padded = torch.nn.functional.pad(probabilities, (0, turns * LANES - vocab_size))
    by_lane = padded.view(num_rows, turns, LANES).transpose(1, 2).reshape(num_rows, turns * LANES)
    cumulative = by_lane.cumsum(-1, dtype=torch.float64)
    target = u.unsqueeze(-1) * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    return place % turns * LANES + place // turns


def sample_tokens_fwd(
    row_forward: Callable[..., tuple[torch.Tensor, ...]],  # token_logprobs_fwd or its equal
    logits: torch.Tensor,  # [B, V]
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    request_ids: torch.Tensor,  # [B] int64
    positions: torch.Tensor,  # [B] int64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns token_ids, logprobs, truncated_logprobs [B].

    Truncation applies top_k, then top_p to what is left renormalised, then min_p relative to the
    maximum. A row with a NaN, a +inf or nothing but -inf returns -1, NaN, NaN."""
    vocab_size = logits.shape[1]
    truncates = 0 < top_k < vocab_size or top_p < 1 or min_p > 0
    x = logits.to(compute_dtype(logits))
    truncated = None
    if temperature == 0:
        temperature = 1.0
        token_ids = x.argmax(-1)
        truncated = torch.zeros_like(token_ids, dtype=x.dtype)
    else:
        u = uniform(seed, request_ids, positions)
        x = x - x.amax(-1, keepdim=True)
        if temperature != 1.0:
            x /= temperature
        # A row that is no distribution is reported below; any token will do for it.
        x = torch.where(x.isnan().any(-1, keepdim=True), 0, x)
        if 0 < top_k < vocab_size:
            x = torch.where(_top_k(x, top_k), x, -torch.inf)
        if top_p < 1:
            x = torch.where(_top_p(x, top_p), x, -torch.inf)
        if min_p > 0:
            x = torch.where(x >= math.log(min_p), x, -torch.inf)
        token_ids = _draw(torch.softmax(x, -1), u)
        if truncates:
            truncated = torch.log_softmax(x, -1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    logprobs, _, _ = row_forward(logits, token_ids, None, temperature, 0.0, None, False)
    broken = logprobs.isnan()
    token_ids = torch.where(broken, -1, token_ids)
    if truncated is None:
        return token_ids, logprobs, logprobs.clone()
    return token_ids, logprobs, torch.where(broken, torch.nan, truncated)

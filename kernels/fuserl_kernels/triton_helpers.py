"""Device functions that the Triton kernels share: statistics of a row of logits, and its gradient.

Everything here is float32. Exponents are in base 2 (the GPU's own instruction), with
scale = log2(e) / temperature. The last bits of a row's statistics depend on the row alone, never on
the number of warps, so a kernel may be tuned by time: a row is cut into LANES interleaved columns,
each lane is added up in one fixed order, and the lanes are added in pairs, then pairs of pairs.
No step of the walk looks across lanes, so threads meet once a row.
Rows are walked downwards, so that a second walk upwards starts with what the cache still holds.
"""

import torch

from fuserl_kernels.triton_runtime import INTERPRETING, tl, triton

LANES = tl.constexpr(2048)
LANE_DOUBLINGS = tl.constexpr(11)  # 2 ** 11 = LANES
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Below this exponent 2^d is 0 in float32; keeping d above it makes 0 * d a zero, not a NaN.
MIN_EXPONENT = tl.constexpr(-1000.0)


def overlays(out: torch.Tensor, logits: torch.Tensor) -> bool:
    """Whether narrower results lie over the logits that they are made from."""
    return out.dtype != logits.dtype and out.data_ptr() == logits.data_ptr()


_TRUNCATES = tl.constexpr(INTERPRETING)  # the interpreter cuts fp32 to bf16 where GPUs round


@triton.jit
def _cast(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Float32 to dtype, rounded to nearest even."""
    if _TRUNCATES and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000  # a zero stays one
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _expm1(x):  # type: ignore[no-untyped-def]
    """exp(x) - 1 without cancellation near 0: a Taylor series there, remainder below 2e-8."""
    series = 1.0 + x * (1.0 / 8.0)
    series = 1.0 + x * (1.0 / 7.0) * series
    series = 1.0 + x * (1.0 / 6.0) * series
    series = 1.0 + x * (1.0 / 5.0) * series
    series = 1.0 + x * (1.0 / 4.0) * series
    series = 1.0 + x * (1.0 / 3.0) * series
    series = 1.0 + x * (1.0 / 2.0) * series
    return tl.where(tl.abs(x) < 0.4, x * series, tl.exp(x) - 1.0)


@triton.jit
def _cap(logits, softcap, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """softcap * tanh(logits / softcap) in float32, or the logits."""
    x = logits.to(tl.float32)
    if SOFTCAP:
        falling = _expm1(-2.0 * tl.abs(x / softcap))
        bounded = -softcap * falling / (2.0 + falling)
        x = tl.where(x < 0, -bounded, bounded)
    return x


@triton.jit
def _merge(old_max, old_sum, old_dot, new_max, scale, ENTROPY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Statistics relative to old_max, made relative to new_max >= old_max.

    sum = sum 2^d and dot = sum d 2^d with d = (x - max) * scale. An empty part (-inf, 0, 0) stays
    empty."""
    floor = tl.where(new_max == -float("inf"), 0.0, new_max)
    shift = (tl.where(old_max == -float("inf"), floor, old_max) - floor) * scale
    shift = tl.maximum(shift, MIN_EXPONENT)
    keep = tl.exp2(shift)
    if ENTROPY:
        old_dot = keep * tl.fma(shift, old_sum, old_dot)
    return keep * old_sum, old_dot


@triton.jit
def _terms(x, lane_max, scale):  # type: ignore[no-untyped-def]
    """d = (x - max) * scale, and 2^d."""
    d = (x - tl.where(lane_max == -float("inf"), 0.0, lane_max)) * scale
    return tl.maximum(d, MIN_EXPONENT), tl.exp2(d)


@triton.jit
def _absorb(lane_max, lane_sum, lane_dot, x, scale, ENTROPY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds x [LANES] to the lanes."""
    new_max = tl.maximum(lane_max, x)
    lane_sum, lane_dot = _merge(lane_max, lane_sum, lane_dot, new_max, scale, ENTROPY)
    d, e = _terms(x, new_max, scale)
    if ENTROPY:
        lane_dot = tl.fma(e, d, lane_dot)
    return new_max, lane_sum + e, lane_dot


@triton.jit
def _absorb_four(  # type: ignore[no-untyped-def]
    lane_max, lane_sum, lane_dot, x0, x1, x2, x3, scale, ENTROPY: tl.constexpr
):
    """Adds four x [LANES] with one rescaling: five exp2 for four elements."""
    new_max = tl.maximum(tl.maximum(x0, x1), tl.maximum(tl.maximum(x2, x3), lane_max))
    lane_sum, lane_dot = _merge(lane_max, lane_sum, lane_dot, new_max, scale, ENTROPY)
    d0, e0 = _terms(x0, new_max, scale)
    d1, e1 = _terms(x1, new_max, scale)
    d2, e2 = _terms(x2, new_max, scale)
    d3, e3 = _terms(x3, new_max, scale)
    if ENTROPY:
        lane_dot = tl.fma(e0, d0, tl.fma(e1, d1, tl.fma(e2, d2, tl.fma(e3, d3, lane_dot))))
    return new_max, lane_sum + ((e0 + e1) + (e2 + e3)), lane_dot


@triton.jit
def _sum_pairs(x, DOUBLINGS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum of 2 ** DOUBLINGS parts, x [parts, rows] over the first axis, in pairs, and pairs of
    pairs: one order, whatever the layout."""
    for _ in tl.static_range(DOUBLINGS):
        x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2, x.shape[1])), axis=1)
    return tl.sum(x, axis=0)


@triton.jit
def _merge_all(part_max, part_sum, part_dot, scale, ENTROPY: tl.constexpr, DOUBLINGS: tl.constexpr):  # type: ignore[no-untyped-def]
    """(max, log_sum, entropy) [rows] of 2 ** DOUBLINGS parts [parts, rows]; the entropy is 0 where
    not asked for."""
    row_max = tl.max(part_max, axis=0)
    part_sum, part_dot = _merge(part_max, part_sum, part_dot, row_max, scale, ENTROPY)
    row_sum = _sum_pairs(part_sum, DOUBLINGS)
    log_sum = tl.log(row_sum)
    entropy = log_sum * 0.0
    if ENTROPY:
        entropy = log_sum - LN2 * (_sum_pairs(part_dot, DOUBLINGS) / row_sum)
    return row_max, log_sum, entropy


@triton.jit
def _load(row_ptr, cols, col_stride, softcap, SOFTCAP: tl.constexpr):  # type: ignore[no-untyped-def]
    return _cap(tl.load(row_ptr + cols.to(tl.int64) * col_stride), softcap, SOFTCAP)


@triton.jit
def _lane_statistics(  # type: ignore[no-untyped-def]
    row_ptr,
    col_stride,
    vocab_size,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One read of a row, from its end: max, sum and dot of each lane [LANES]."""
    lanes = tl.arange(0, LANES)
    lane_max = tl.full((LANES,), -float("inf"), tl.float32)
    lane_sum = tl.zeros((LANES,), tl.float32)
    lane_dot = tl.zeros((LANES,), tl.float32)
    num_fours = vocab_size // (4 * LANES)
    num_left = tl.cdiv(vocab_size, LANES) - 4 * num_fours
    for i in range(num_left):
        cols = (4 * num_fours + num_left - 1 - i) * LANES + lanes
        inside = cols < vocab_size
        logits = tl.load(row_ptr + cols.to(tl.int64) * col_stride, mask=inside, other=0.0)
        x = tl.where(inside, _cap(logits, softcap, SOFTCAP), -float("inf"))
        lane_max, lane_sum, lane_dot = _absorb(lane_max, lane_sum, lane_dot, x, scale, ENTROPY)
    for i in tl.range(0, num_fours, num_stages=STAGES):
        cols = (num_fours - 1 - i) * (4 * LANES) + lanes
        x0 = _load(row_ptr, cols, col_stride, softcap, SOFTCAP)
        x1 = _load(row_ptr, cols + LANES, col_stride, softcap, SOFTCAP)
        x2 = _load(row_ptr, cols + 2 * LANES, col_stride, softcap, SOFTCAP)
        x3 = _load(row_ptr, cols + 3 * LANES, col_stride, softcap, SOFTCAP)
        lane_max, lane_sum, lane_dot = _absorb_four(
            lane_max, lane_sum, lane_dot, x0, x1, x2, x3, scale, ENTROPY
        )
    return lane_max, lane_sum, lane_dot


@triton.jit
def _merge_lanes(lane_max, lane_sum, lane_dot, scale, ENTROPY: tl.constexpr):  # type: ignore[no-untyped-def]
    """(max, log_sum, entropy) of a row from its lanes."""
    row_max, log_sum, entropy = _merge_all(
        lane_max[:, None], lane_sum[:, None], lane_dot[:, None], scale, ENTROPY, LANE_DOUBLINGS
    )
    return tl.sum(row_max, axis=0), tl.sum(log_sum, axis=0), tl.sum(entropy, axis=0)


@triton.jit
def _row_statistics(  # type: ignore[no-untyped-def]
    row_ptr,
    col_stride,
    vocab_size,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One read of a row, from its end: (max, log_sum, entropy)."""
    lane_max, lane_sum, lane_dot = _lane_statistics(
        row_ptr, col_stride, vocab_size, scale, softcap, SOFTCAP, ENTROPY, STAGES
    )
    return _merge_lanes(lane_max, lane_sum, lane_dot, scale, ENTROPY)


@triton.jit
def _token_logprob(  # type: ignore[no-untyped-def]
    row_ptr,
    col_stride,
    vocab_size,
    token_id,
    row_max,
    log_sum,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
):
    """Log-probability of one token; NaN for a token outside the vocabulary."""
    inside = (token_id >= 0) & (token_id < vocab_size)
    logit = tl.load(row_ptr + token_id * col_stride, mask=inside, other=0.0)
    logprob = (_cap(logit, softcap, SOFTCAP) - row_max) / temperature - log_sum
    return tl.where(inside, logprob, float("nan"))


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    logits,
    is_token,
    row_max,
    scale,
    log2_sum,
    constant,
    slope,
    token_term,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """p (constant + slope log2 p) - onehot token_term, times the slope of the cap: the one gradient
    form of every loss, with the coefficients that _store_gradient makes of a, b and c."""
    x = _cap(logits, softcap, SOFTCAP)
    log2_p = tl.fma(x - row_max, scale, -log2_sum)
    p = tl.exp2(log2_p)
    factor = constant
    if ENTROPY:
        factor = tl.fma(slope, tl.maximum(log2_p, MIN_EXPONENT), constant)
    gradient = tl.fma(p, factor, tl.where(is_token, -token_term, 0.0))
    if SOFTCAP:
        capped = x / softcap
        gradient *= 1.0 - capped * capped
    return gradient


@triton.jit
def _store_gradient(  # type: ignore[no-untyped-def]
    row_ptr,
    col_stride,
    out_ptr,
    out_col_stride,
    vocab_size,
    token_id,
    row_max,
    log_sum,
    entropy,
    a,
    b,
    c,
    temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    OVERLAY: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(a p - b onehot - c p (logp + entropy)) / temperature of one row, upwards: out may be the
    logits themselves. ENTROPY says whether c may be other than 0. NaN for a token outside.

    OVERLAY: out has half their element size and lies over the start of the row, so a block's
    results cover what other threads read in this block and in earlier ones: all threads must have
    loaded before any stores."""
    scale = LOG2E / temperature
    log2_sum = log_sum * LOG2E
    constant, slope = a / temperature, 0.0
    if ENTROPY:
        constant, slope = (a - c * entropy) / temperature, -c * LN2 / temperature
    token_term = b / temperature
    inside = (token_id >= 0) & (token_id < vocab_size)
    constant = tl.where(inside, constant, float("nan"))
    token_col = tl.where(inside, token_id, 0).to(tl.int32)
    num_full = vocab_size // BLOCK_V
    lanes = tl.arange(0, BLOCK_V)
    for i in tl.range(0, num_full, num_stages=STAGES):
        cols = i * BLOCK_V + lanes
        logits = tl.load(row_ptr + cols.to(tl.int64) * col_stride)
        gradient = _gradient(
            logits, cols == token_col, row_max, scale, log2_sum, constant, slope, token_term,
            softcap, SOFTCAP, ENTROPY,
        )  # fmt: skip
        if OVERLAY:
            tl.debug_barrier()
        tl.store(
            out_ptr + cols.to(tl.int64) * out_col_stride, _cast(gradient, out_ptr.dtype.element_ty)
        )
    if num_full * BLOCK_V < vocab_size:
        cols = num_full * BLOCK_V + lanes
        mask = cols < vocab_size
        logits = tl.load(row_ptr + cols.to(tl.int64) * col_stride, mask=mask, other=0.0)
        gradient = _gradient(
            logits, cols == token_col, row_max, scale, log2_sum, constant, slope, token_term,
            softcap, SOFTCAP, ENTROPY,
        )  # fmt: skip
        if OVERLAY:
            tl.debug_barrier()
        tl.store(
            out_ptr + cols.to(tl.int64) * out_col_stride,
            _cast(gradient, out_ptr.dtype.element_ty),
            mask=mask,
        )

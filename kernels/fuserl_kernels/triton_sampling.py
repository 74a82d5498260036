"""sample_tokens in one launch: one program a row, one read of the row unless the set is truncated.

Definition: reference/sampling.py. Truncation walks the row again, where L2 holds what it can:
    1. statistics: a maximum and a sum a lane (token_logprobs' device code, so its bits)
    2. the boundary of the kept set: the smallest value t with less than a goal above it, the goal
       being k entries or top_p of the mass. Two walks do for most bf16 rows, each weighing four
       candidates around a guess.
    3. how many of the entries equal to t are kept, and the column of the last one (stops there)
    4. the kept sum of each lane
and then the drawn lane's V / 2048 columns.

Sums over a lane are float32 in the order of the columns. Sums over lanes are fixed-point integers,
which are exact, so no order, warp count or layout changes a bit of a result. Rounding and adding
terms that are not negative preserve <=, so the sum above a value never grows with the value: the
boundary exists, is unique, and does not depend on the guesses that found it.
"""

import math
import struct

import torch

from fuserl_kernels.triton_helpers import (
    LANES,
    LOG2E,
    _lane_statistics,
    _load,
    _merge,
    _merge_lanes,
    _token_logprob,
)
from fuserl_kernels.triton_runtime import TUNING_ROWS, Configuration, fastest, tl, triton

# 40 fractional bits: the heaviest kept entry weighs 2^40, and 2^22 such entries fit int64.
FIXED_ONE = tl.constexpr(2.0**40)
MAX_VOCAB_SIZE = 2**22
BLOCK = tl.constexpr(8192)  # columns of one step of the walk over ties: four of each lane


@triton.jit
def _fixed(mass):  # type: ignore[no-untyped-def]
    """Float32 in units of 2^-40, as int64."""
    return (mass * FIXED_ONE).to(tl.int64)


@triton.jit
def _key(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """int64 that orders like x, a float32 scalar that holds a dtype value; neighbours differ by 1.

    The two zeros get two keys, but every comparison of entries is one of values."""
    if dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True).to(tl.int64)
        key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    else:
        bits = x.to(dtype).to(tl.int16, bitcast=True).to(tl.int64)
        key = bits ^ ((bits >> 15) & 0x7FFF)
    return key


@triton.jit
def _value(key, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The float32 whose _key it is."""
    if dtype == tl.float32:
        x = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.int32).to(dtype, bitcast=True)
    else:
        x = (key ^ ((key >> 15) & 0x7FFF)).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return x


@triton.jit
def _uniform_bits(seed_low, seed_high, request_id, position):  # type: ignore[no-untyped-def]
    """The 53 bits of the reference's `uniform`, as uint64."""
    seed = (seed_high.to(tl.uint32).to(tl.uint64) << 32) | seed_low.to(tl.uint32).to(tl.uint64)
    low, high = request_id.to(tl.int32), (request_id >> 32).to(tl.int32)
    a, b, _, _ = tl.philox(seed, position.to(tl.int32), low, high, low * 0)
    return ((a >> 5).to(tl.uint64) << 26) | (b >> 6).to(tl.uint64)


@triton.jit
def _load_columns(row_ptr, cols, col_stride, vocab_size):  # type: ignore[no-untyped-def]
    """Float32 logits; -inf, which weighs nothing, outside the row."""
    inside = cols < vocab_size
    x = tl.load(row_ptr + cols.to(tl.int64) * col_stride, mask=inside, other=-float("inf"))
    return x.to(tl.float32)


@triton.jit
def _weigh(x, row_max, scale, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """What an entry adds to a sum: one, or its mass relative to the maximum's."""
    if COUNT:
        weight = tl.full(x.shape, 1.0, tl.float32)
    else:
        weight = tl.exp2((x - row_max) * scale)
    return weight


# --- walks over a row


@triton.jit
def _add_above(  # type: ignore[no-untyped-def]
    sum0, sum1, sum2, sum3, x, t0, t1, t2, t3, row_max, scale, COUNT: tl.constexpr
):
    """Adds the weights of x above each threshold to the lanes."""
    w = _weigh(x, row_max, scale, COUNT)
    sum0 = tl.where(x > t0, sum0 + w, sum0)
    sum1 = tl.where(x > t1, sum1 + w, sum1)
    sum2 = tl.where(x > t2, sum2 + w, sum2)
    sum3 = tl.where(x > t3, sum3 + w, sum3)
    return sum0, sum1, sum2, sum3


@triton.jit
def _sums_above(  # type: ignore[no-untyped-def]
    row_ptr, col_stride, vocab_size, row_max, scale, t0, t1, t2, t3,
    COUNT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Weight of the entries above each of four thresholds, in fixed point."""
    lanes = tl.arange(0, LANES)
    sum0 = tl.zeros((LANES,), tl.float32)
    sum1, sum2, sum3 = sum0, sum0, sum0
    num_fours = vocab_size // (4 * LANES)
    for i in tl.range(0, num_fours, num_stages=STAGES):
        cols = i * (4 * LANES) + lanes
        x0 = _load(row_ptr, cols, col_stride, 0.0, False)
        x1 = _load(row_ptr, cols + LANES, col_stride, 0.0, False)
        x2 = _load(row_ptr, cols + 2 * LANES, col_stride, 0.0, False)
        x3 = _load(row_ptr, cols + 3 * LANES, col_stride, 0.0, False)
        sum0, sum1, sum2, sum3 = _add_above(
            sum0, sum1, sum2, sum3, x0, t0, t1, t2, t3, row_max, scale, COUNT
        )
        sum0, sum1, sum2, sum3 = _add_above(
            sum0, sum1, sum2, sum3, x1, t0, t1, t2, t3, row_max, scale, COUNT
        )
        sum0, sum1, sum2, sum3 = _add_above(
            sum0, sum1, sum2, sum3, x2, t0, t1, t2, t3, row_max, scale, COUNT
        )
        sum0, sum1, sum2, sum3 = _add_above(
            sum0, sum1, sum2, sum3, x3, t0, t1, t2, t3, row_max, scale, COUNT
        )
    for start in range(num_fours * 4 * LANES, vocab_size, LANES):
        x = _load_columns(row_ptr, start + lanes, col_stride, vocab_size)
        sum0, sum1, sum2, sum3 = _add_above(
            sum0, sum1, sum2, sum3, x, t0, t1, t2, t3, row_max, scale, COUNT
        )
    return (
        tl.sum(_fixed(sum0), axis=0),
        tl.sum(_fixed(sum1), axis=0),
        tl.sum(_fixed(sum2), axis=0),
        tl.sum(_fixed(sum3), axis=0),
    )


@triton.jit
def _is_kept(x, may_equal, boundary, row_max, floor, MIN_P: tl.constexpr):  # type: ignore[no-untyped-def]
    """Above the boundary, or equal to it where columns may be."""
    kept = (x > boundary) | ((x == boundary) & may_equal)
    if MIN_P:
        kept = kept & (x - row_max >= floor)
    return kept


@triton.jit
def _add_kept(  # type: ignore[no-untyped-def]
    mass, x, may_equal, boundary, row_max, scale, floor, MIN_P: tl.constexpr
):
    """Adds the weights of the kept x to the lanes."""
    kept = _is_kept(x, may_equal, boundary, row_max, floor, MIN_P)
    return tl.where(kept, mass + _weigh(x, row_max, scale, False), mass)


@triton.jit
def _kept_lanes(  # type: ignore[no-untyped-def]
    row_ptr, col_stride, vocab_size, row_max, scale, boundary, last, floor,
    MIN_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mass of the kept entries of each lane [LANES], relative to the maximum's."""
    lanes = tl.arange(0, LANES)
    mass = tl.zeros((LANES,), tl.float32)
    num_fours = vocab_size // (4 * LANES)
    for i in tl.range(0, num_fours, num_stages=STAGES):
        cols = i * (4 * LANES) + lanes
        x0 = _load(row_ptr, cols, col_stride, 0.0, False)
        x1 = _load(row_ptr, cols + LANES, col_stride, 0.0, False)
        x2 = _load(row_ptr, cols + 2 * LANES, col_stride, 0.0, False)
        x3 = _load(row_ptr, cols + 3 * LANES, col_stride, 0.0, False)
        ahead = last - i * (4 * LANES)  # one subtraction a step, not a sum a column
        mass = _add_kept(mass, x0, lanes <= ahead, boundary, row_max, scale, floor, MIN_P)
        mass = _add_kept(mass, x1, lanes <= ahead - LANES, boundary, row_max, scale, floor, MIN_P)
        mass = _add_kept(
            mass, x2, lanes <= ahead - 2 * LANES, boundary, row_max, scale, floor, MIN_P
        )
        mass = _add_kept(
            mass, x3, lanes <= ahead - 3 * LANES, boundary, row_max, scale, floor, MIN_P
        )
    for start in range(num_fours * 4 * LANES, vocab_size, LANES):
        x = _load_columns(row_ptr, start + lanes, col_stride, vocab_size)
        mass = _add_kept(mass, x, lanes <= last - start, boundary, row_max, scale, floor, MIN_P)
    return mass


@triton.jit
def _is_equal(row_ptr, cols, col_stride, vocab_size, value):  # type: ignore[no-untyped-def]
    """int32 [BLOCK]: 1 where a column of the row holds the value."""
    equal = _load_columns(row_ptr, cols, col_stride, vocab_size) == value
    return (equal & (cols < vocab_size)).to(tl.int32)


@triton.jit
def _nth_equal(row_ptr, col_stride, vocab_size, value, nth):  # type: ignore[no-untyped-def]
    """Column of the nth entry (from 1) equal to value; vocab_size if there are fewer."""
    block = tl.arange(0, BLOCK)
    start, before = vocab_size * 0, nth * 0
    count = tl.sum(_is_equal(row_ptr, block, col_stride, vocab_size, value), axis=0)
    while (before + count < nth) & (start + BLOCK < vocab_size):
        before += count
        start += BLOCK
        count = tl.sum(_is_equal(row_ptr, start + block, col_stride, vocab_size, value), axis=0)
    cols = start + block
    equal = _is_equal(row_ptr, cols, col_stride, vocab_size, value)
    is_nth = (equal == 1) & (before + tl.cumsum(equal, axis=0) == nth)
    return tl.min(tl.where(is_nth, cols, vocab_size), axis=0)


# --- the boundary of the kept set


@triton.jit
def _guess(  # type: ignore[no-untyped-def]
    row_ptr, col_stride, vocab_size, lane_max, row_max, scale, low, high, whole, goal,
    COUNT: tl.constexpr,
):  # fmt: skip
    """A key in (low, high] near the smallest one with less than goal above it; whole is the weight
    of the row, both float32.

    Each lane's maximum is known, and the heaviest entries are nearly all among them. The rest of
    the row is taken to be distributed like four samples a lane, spread over the columns. Only the
    time depends on how good the guess is, so sums here may have any order."""
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    lanes = tl.arange(0, LANES)
    turns = tl.cdiv(vocab_size, LANES)
    x0 = _load_columns(row_ptr, lanes, col_stride, vocab_size)
    x1 = _load_columns(row_ptr, turns // 4 * LANES + lanes, col_stride, vocab_size)
    x2 = _load_columns(row_ptr, turns // 2 * LANES + lanes, col_stride, vocab_size)
    x3 = _load_columns(row_ptr, turns * 3 // 4 * LANES + lanes, col_stride, vocab_size)
    w = tl.where(lane_max > -float("inf"), _weigh(lane_max, row_max, scale, COUNT), 0.0)
    w0 = tl.where(x0 < lane_max, _weigh(x0, row_max, scale, COUNT), 0.0)
    w1 = tl.where(x1 < lane_max, _weigh(x1, row_max, scale, COUNT), 0.0)
    w2 = tl.where(x2 < lane_max, _weigh(x2, row_max, scale, COUNT), 0.0)
    w3 = tl.where(x3 < lane_max, _weigh(x3, row_max, scale, COUNT), 0.0)
    sampled = tl.sum((w0 + w1) + (w2 + w3), axis=0)
    rest = tl.maximum(whole - tl.sum(w, axis=0), 0.0)
    share = tl.where(sampled > 0, rest / tl.maximum(sampled, 1e-30), 0.0)
    for _ in range(dtype.primitive_bitwidth):  # halvings of all keys leave one
        middle = (low + high) >> 1
        t = _value(middle, dtype)
        sample = tl.where(x0 > t, w0, 0.0) + tl.where(x1 > t, w1, 0.0)
        sample += tl.where(x2 > t, w2, 0.0) + tl.where(x3 > t, w3, 0.0)
        above = tl.sum(tl.where(lane_max > t, w, 0.0) + share * sample, axis=0)
        high = tl.where((above < goal) & (middle > low), middle, high)
        low = tl.where(above < goal, low, middle)
    return high


@triton.jit
def _narrow(low, high, low_weight, high_weight, key, weight, goal):  # type: ignore[no-untyped-def]
    """The bracket after one more key is known."""
    raises = (weight >= goal) & (key > low)
    lowers = (weight < goal) & (key < high)
    return (
        tl.where(raises, key, low),
        tl.where(lowers, key, high),
        tl.where(raises, weight, low_weight),
        tl.where(lowers, weight, high_weight),
    )


@triton.jit
def _boundary(  # type: ignore[no-untyped-def]
    row_ptr, col_stride, vocab_size, lane_max, row_max, scale, low, whole, low_weight, goal,
    COUNT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(key, weight above it) of the smallest key over low with a weight above it less than goal.

    whole: weight of the row, float32. low_weight >= goal: taken for the weight above low. Nothing
    is above the maximum, so there is such a key. Every other walk takes a quarter of the bracket
    at most, unless the guesses do as well on their own."""
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    high = _key(row_max, dtype)
    high_weight = goal * 0
    guess = _guess(
        row_ptr, col_stride, vocab_size, lane_max, row_max, scale, low, high, whole,
        goal.to(tl.float32) / FIXED_ONE, COUNT,
    )  # fmt: skip
    # Four times the spread of the guess from 8192 samples of normal logits, in bf16.
    reach = goal * 0 + 16
    if dtype == tl.float32:
        reach <<= 16
    while high - low > 1:
        span = high - low
        least, most = low + 1, high - 1
        k0 = tl.minimum(tl.maximum(guess - 1 - reach, least), most)
        k1 = tl.minimum(tl.maximum(guess - 1, least), most)
        k2 = tl.minimum(tl.maximum(guess, least), most)
        k3 = tl.minimum(tl.maximum(guess + reach, least), most)
        w0, w1, w2, w3 = _sums_above(
            row_ptr, col_stride, vocab_size, row_max, scale,
            _value(k0, dtype), _value(k1, dtype), _value(k2, dtype), _value(k3, dtype),
            COUNT, STAGES,
        )  # fmt: skip
        low, high, low_weight, high_weight = _narrow(
            low, high, low_weight, high_weight, k0, w0, goal
        )
        low, high, low_weight, high_weight = _narrow(
            low, high, low_weight, high_weight, k1, w1, goal
        )
        low, high, low_weight, high_weight = _narrow(
            low, high, low_weight, high_weight, k2, w2, goal
        )
        low, high, low_weight, high_weight = _narrow(
            low, high, low_weight, high_weight, k3, w3, goal
        )
        left = high - low
        guess, reach = low + (left >> 1), left >> 2
        if 4 * left <= span:
            over = (low_weight - goal).to(tl.float32)
            part = over / (low_weight - high_weight).to(tl.float32)
            guess, reach = low + 1 + (part * left.to(tl.float32)).to(tl.int64), (left >> 4) + 1
    return high, high_weight


@triton.jit
def _truncate(  # type: ignore[no-untyped-def]
    row_ptr, col_stride, vocab_size, lane_max, row_max, scale, mass, top_k, top_p,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(boundary, column of the last entry kept of those equal to it) of top_k, then top_p.

    mass: of the row, in fixed point."""
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    low = _key(row_max * 0 - float("inf"), dtype) - 1  # all entries are above
    key, room = low, mass * 0
    if TOP_K:
        goal = _fixed(top_k.to(tl.float32))
        whole = _fixed(vocab_size.to(tl.float32))
        key, above = _boundary(
            row_ptr, col_stride, vocab_size, lane_max, row_max, scale, low,
            vocab_size.to(tl.float32), whole, goal, True, STAGES,
        )  # fmt: skip
        room = (goal - above) >> 40
    if TOP_P:
        whole = mass.to(tl.float32) / FIXED_ONE
        if TOP_K:
            t = _value(key, dtype)
            above, _, _, _ = _sums_above(
                row_ptr, col_stride, vocab_size, row_max, scale, t, row_max, row_max, row_max,
                False, STAGES,
            )  # fmt: skip
            mass = above + room * _fixed(tl.exp2((t - row_max) * scale))
            low = key - 1
        goal = tl.maximum(tl.ceil(mass.to(tl.float64) * top_p).to(tl.int64), 1)
        cut, above = _boundary(
            row_ptr, col_stride, vocab_size, lane_max, row_max, scale, low, whole, mass, goal,
            False, STAGES,
        )  # fmt: skip
        each = tl.maximum(_fixed(tl.exp2((_value(cut, dtype) - row_max) * scale)), 1)
        enough = (goal - above + each - 1) // each
        if TOP_K:
            enough = tl.where(cut == key, tl.minimum(enough, room), enough)
        key, room = cut, enough
    boundary = _value(key, dtype)
    room = tl.minimum(room, vocab_size).to(tl.int32)
    return boundary, _nth_equal(row_ptr, col_stride, vocab_size, boundary, room)


# --- the draw


@triton.jit
def _draw(  # type: ignore[no-untyped-def]
    row_ptr, col_stride, vocab_size, mass, bits, row_max, scale, boundary, last, floor,
    TRUNCATES: tl.constexpr, MIN_P: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Column of the first kept entry, lane by lane, whose cumulative mass exceeds u times the
    total; mass: of the lanes, in fixed point [LANES].

    The lane's own entries are weighed relative to the largest of them and cut to the lane's share,
    so the column has mass whatever was rounded."""
    lanes = tl.arange(0, LANES)
    total = tl.sum(mass, axis=0)
    target = tl.umulhi(bits << 11, total.to(tl.uint64)).to(tl.int64)  # floor(u total) < total
    lane = tl.sum((tl.cumsum(mass, axis=0) <= target).to(tl.int32), axis=0)
    before = tl.sum(tl.where(lanes < lane, mass, 0), axis=0)
    lane_mass = tl.sum(tl.where(lanes == lane, mass, 0), axis=0)
    part = (target - before).to(tl.float64) / lane_mass.to(tl.float64)

    cols = tl.arange(0, TURNS) * LANES + lane
    x = _load_columns(row_ptr, cols, col_stride, vocab_size)
    if TRUNCATES:
        kept = _is_kept(x, cols <= last, boundary, row_max, floor, MIN_P)
        x = tl.where(kept, x, -float("inf"))
    entries = _fixed(tl.exp2((x - tl.max(x, axis=0)) * scale))
    total = tl.sum(entries, axis=0)
    target = tl.minimum((part * total.to(tl.float64)).to(tl.int64), total - 1)
    turn = tl.sum((tl.cumsum(entries, axis=0) <= target).to(tl.int32), axis=0)
    return turn * LANES + lane


@triton.jit(do_not_specialize=["top_k", "top_p_bits", "seed_low", "seed_high"])
def _sample_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    request_ids_ptr,
    positions_ptr,
    token_ids_ptr,
    logprobs_ptr,
    truncated_ptr,
    vocab_size,
    row_stride,
    col_stride,
    temperature,
    top_k,
    top_p_bits,  # those of a float64
    floor,  # temperature * log(min_p)
    seed_low,
    seed_high,
    GREEDY: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
    MIN_P: tl.constexpr,
    TURNS: tl.constexpr,  # at least the columns of a lane
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * row_stride
    scale = LOG2E / temperature
    lane_max, lane_sum, lane_dot = _lane_statistics(
        row_ptr, col_stride, vocab_size, scale, 0.0, False, False, STAGES
    )
    row_max, log_sum, _ = _merge_lanes(lane_max, lane_sum, lane_dot, scale, False)
    if (log_sum != log_sum) | (row_max == -float("inf")):
        tl.store(token_ids_ptr + row, -1)
        tl.store(logprobs_ptr + row, float("nan"))
        tl.store(truncated_ptr + row, float("nan"))
        return

    if GREEDY:
        token_id = _nth_equal(row_ptr, col_stride, vocab_size, row_max, 1)
    else:
        TRUNCATES: tl.constexpr = TOP_K or TOP_P or MIN_P
        boundary, last, kept_log_sum = row_max, vocab_size, log_sum
        lane_mass, _ = _merge(lane_max, lane_sum, lane_dot, row_max, scale, False)
        if TOP_K or TOP_P:
            boundary, last = _truncate(
                row_ptr, col_stride, vocab_size, lane_max, row_max, scale,
                tl.sum(_fixed(lane_mass), axis=0), top_k,
                top_p_bits.to(tl.int64).to(tl.float64, bitcast=True), TOP_K, TOP_P, STAGES,
            )  # fmt: skip
        elif MIN_P:
            boundary = row_max * 0 - float("inf")
        if TRUNCATES:
            lane_mass = _kept_lanes(
                row_ptr, col_stride, vocab_size, row_max, scale, boundary, last, floor,
                MIN_P, STAGES,
            )  # fmt: skip
        mass = _fixed(lane_mass)
        if TRUNCATES:
            kept_log_sum = tl.log(tl.sum(mass, axis=0).to(tl.float32) / FIXED_ONE)
        bits = _uniform_bits(
            seed_low, seed_high, tl.load(request_ids_ptr + row), tl.load(positions_ptr + row)
        )
        token_id = _draw(
            row_ptr, col_stride, vocab_size, mass, bits, row_max, scale, boundary, last, floor,
            TRUNCATES, MIN_P, TURNS,
        )  # fmt: skip
    logprob = _token_logprob(
        row_ptr, col_stride, vocab_size, token_id.to(tl.int64), row_max, log_sum, temperature,
        0.0, False,
    )  # fmt: skip
    truncated = logprob * 0.0
    if not GREEDY:
        truncated = _token_logprob(
            row_ptr, col_stride, vocab_size, token_id.to(tl.int64), row_max, kept_log_sum,
            temperature, 0.0, False,
        )  # fmt: skip
    tl.store(token_ids_ptr + row, token_id.to(tl.int64))
    tl.store(logprobs_ptr + row, logprob)
    tl.store(truncated_ptr + row, truncated)


# By the bytes of a logit. Eight warps leave room for two rows of bf16 a multiprocessor, or four
# untruncated; sixteen keep one, and the rows in flight within L2. Each gives the same bits, so
# timing may choose.
CONFIGURATIONS = {
    2: [Configuration(w, 3, {"STAGES": stages}) for w, stages in ((8, 2), (16, 1), (16, 2))],
    4: [Configuration(w, 3, {"STAGES": stages}) for w, stages in ((16, 2), (16, 1), (8, 2))],
}


def _signed(word: int) -> int:
    """The int32 with the bits of a 32-bit word: one type, so one compiled kernel, for all."""
    return word - (1 << 32) if word >> 31 else word


def sample_triton(
    logits: torch.Tensor,  # [B, V], any strides
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    request_ids: torch.Tensor,  # [B] int64
    positions: torch.Tensor,  # [B] int64
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns token_ids int64, logprobs and truncated_logprobs fp32 [B].

    Raises ValueError for more than 2^22 columns, which would overflow the fixed point."""
    num_rows, vocab_size = logits.shape
    if vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(f"logits may have {MAX_VOCAB_SIZE} columns at most, not {vocab_size}")
    token_ids = logits.new_empty(num_rows, dtype=torch.int64)
    logprobs = logits.new_empty(num_rows, dtype=torch.float32)
    truncated = torch.empty_like(logprobs)
    if num_rows == 0:
        return token_ids, logprobs, truncated
    greedy = temperature == 0.0
    temperature = 1.0 if greedy else temperature
    flags = {
        "GREEDY": greedy,
        "TOP_K": not greedy and 0 < top_k < vocab_size,
        "TOP_P": not greedy and top_p < 1.0,
        "MIN_P": not greedy and min_p > 0.0,
    }
    arguments = (
        logits,
        request_ids.contiguous(),
        positions.contiguous(),
        token_ids,
        logprobs,
        truncated,
        vocab_size,
        *logits.stride(),
        temperature,
        min(top_k, vocab_size),
        int.from_bytes(struct.pack("<d", top_p), "little"),
        temperature * math.log(min_p) if min_p > 0.0 else 0.0,
        _signed(seed & 0xFFFFFFFF),
        _signed(seed >> 32),
    )
    turns = triton.next_power_of_2(triton.cdiv(vocab_size, LANES.value))

    def launch(configuration: Configuration) -> None:
        _sample_kernel[(num_rows,)](*arguments, **flags, TURNS=turns, **configuration.arguments())

    rows = min(num_rows, TUNING_ROWS).bit_length()
    key = ("sample_tokens", logits.device, logits.dtype, rows, vocab_size, *flags.values())
    launch(fastest(key, CONFIGURATIONS[logits.element_size()], launch))
    return token_ids, logprobs, truncated

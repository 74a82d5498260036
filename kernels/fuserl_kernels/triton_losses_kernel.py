"""The kernel of policy_loss, value_loss and ppo_loss: loss, gradients and metrics together.

Tokens are walked in segments: blocks of fixed length, or whole sequences where an option belongs to
a sequence. Only then is there a first walk, which sums a sequence's log-ratios and counts its
tokens, and, where the gradient flows through the sequence's ratio, a third one that writes it; the
second and third read what the cache holds. A tile is ROWS segments of BLOCK tokens, so that short
sequences fill a program too. Sums over all tokens: triton_partial_sums.py.

Gradients are written unscaled (reference/policy.py), for the denominator is known only at the end.
"""

from fuserl_kernels.reference.policy import METRICS as POLICY_METRICS
from fuserl_kernels.reference.value import LEAST_SPREAD
from fuserl_kernels.triton_helpers import _cast
from fuserl_kernels.triton_kl import _kl, _kl_slope
from fuserl_kernels.triton_partial_sums import (
    _collect,
    _four,
    _is_last,
    _leave,
    _leave_one,
    _one,
    _slot,
    _slots,
)
from fuserl_kernels.triton_policy_terms import _between, _correction, _surrogate
from fuserl_kernels.triton_runtime import tl, triton

_NUM_POLICY_METRICS = tl.constexpr(len(POLICY_METRICS))
_LEAST_SPREAD = tl.constexpr(LEAST_SPREAD)


@triton.jit
def _sum_rows(x):  # type: ignore[no-untyped-def]
    """[rows, block] -> float64 [rows]"""
    return tl.sum(x.to(tl.float64), axis=1)


# --- tiles


@triton.jit
def _mask(mask_ptr, index, inside):  # type: ignore[no-untyped-def]
    return tl.load(mask_ptr + index, mask=inside, other=0) != 0


@triton.jit
def _take(ptr, index, inside, trained):  # type: ignore[no-untyped-def]
    """Float32, 0 where not trained, whatever lies there."""
    x = tl.load(ptr + index, mask=inside, other=0.0).to(tl.float32)
    return tl.where(trained, x, 0.0)


@triton.jit
def _put(ptr, index, inside, trained, x):  # type: ignore[no-untyped-def]
    tl.store(ptr + index, _cast(tl.where(trained, x, 0.0), ptr.dtype.element_ty), mask=inside)


@triton.jit
def _segments(  # type: ignore[no-untyped-def]
    rows, cu_seqlens_ptr, num_segments, segment_length, num_tokens, SEQUENCES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """First token and end of each row's segment, and the length of the longest."""
    if not SEQUENCES:  # ROWS is 1, and no row is past the last
        start, end, longest = rows * BLOCK, num_tokens, BLOCK
    else:
        present = rows < num_segments
        if cu_seqlens_ptr is None:
            start = rows * segment_length
            end, longest = start + tl.where(present, segment_length, 0), segment_length
        else:
            start = tl.load(cu_seqlens_ptr + rows, mask=present, other=0).to(rows.dtype)
            end = tl.load(cu_seqlens_ptr + rows + 1, mask=present, other=0).to(rows.dtype)
            longest = tl.max(tl.max(end - start, axis=1), axis=0)
    return start, end, longest


@triton.jit
def _scale(denominator_ptr, count):  # type: ignore[no-untyped-def]
    """One over the caller's denominator or this call's count; 1 for none. Float32."""
    count = count.to(tl.float32)
    if denominator_ptr is not None:
        count = tl.load(denominator_ptr).to(tl.float32)
    return tl.div_rn(1.0, tl.where(count == 0, 1.0, count))


# --- the end: what the last program makes of the sums

# First slots of the groups of sums.
_TERMS = tl.constexpr(0)  # term, half of the squared log-ratio, ratio - 1, its square
_EXTRAS = tl.constexpr(4)  # KL estimate, entropy, correction's factor, weighted objective
_COUNTS = tl.constexpr(8)  # tokens, clipped ones, ones whose correction the bounds held
_SEQUENCES = tl.constexpr(12)  # those with a token
_VALUES = tl.constexpr(16)  # return, its square, error, its square
_VALUE_COUNTS = tl.constexpr(20)  # slots, clipped ones
_VALUE_LOSS = tl.constexpr(24)


@triton.jit
def _finish_policy(  # type: ignore[no-untyped-def]
    sums, denominator_ptr, metrics_ptr, scales_ptr, AGGREGATION: tl.constexpr, EXTRAS: tl.constexpr
):
    """Writes the policy's metrics and scale; returns its loss."""
    num_tokens = _slot(sums, _COUNTS)
    any_token = tl.where(num_tokens == 0, 0.0, 1.0)
    share = 1.0 / tl.where(num_tokens == 0, 1.0, num_tokens)
    means = sums * share
    excess = _slot(means, _TERMS + 2)
    variance = _slot(means, _TERMS + 3) - excess * excess
    slots = _slots()
    # The moments are those of ratio - 1, where ratios, which are near 1, cancel least.
    means = tl.where(slots == _TERMS + 2, excess + any_token, means)
    means = tl.where(slots == _TERMS + 3, tl.where(variance < 0, 0.0, variance), means)
    if not EXTRAS:  # a factor of 1 where there are tokens, 0 of the others
        means = tl.where(slots >= _EXTRAS, tl.where(slots == _EXTRAS + 2, any_token, 0.0), means)
    # The order of METRICS, which has the clip fraction third.
    places = metrics_ptr + slots + tl.where(slots < 2, 0, 1)
    tl.store(places, means.to(tl.float32), mask=slots < _EXTRAS + 3)
    tl.store(metrics_ptr + 2, (_slot(sums, _COUNTS + 1) * share).to(tl.float32))
    tl.store(metrics_ptr + 8, (_slot(sums, _COUNTS + 2) * share).to(tl.float32))
    tl.store(metrics_ptr + 9, num_tokens.to(tl.float32))
    count = num_tokens
    if AGGREGATION != "token_mean":
        count = _slot(sums, _SEQUENCES)
    scale = _scale(denominator_ptr, count)
    tl.store(scales_ptr, scale)
    return _slot(sums, _EXTRAS + 3 if EXTRAS else _TERMS).to(tl.float32) * scale


@triton.jit
def _finish_value(sums, denominator_ptr, metrics_ptr, scale_ptr, vf_coef):  # type: ignore[no-untyped-def]
    """Writes the value's metrics and scale; returns its loss times vf_coef."""
    num_tokens = _slot(sums, _VALUE_COUNTS)
    squares = _slot(sums, _VALUE_LOSS)
    share = 1.0 / tl.where(num_tokens == 0, 1.0, num_tokens)
    means = sums * share
    target, square = _slot(means, _VALUES), _slot(means, _VALUES + 1)
    error, error_square = _slot(means, _VALUES + 2), _slot(means, _VALUES + 3)
    spread, unexplained = square - target * target, error_square - error * error
    varies = spread > _LEAST_SPREAD * square
    unexplained = tl.div_rn(
        unexplained.to(tl.float32), tl.where(varies, spread, 1.0).to(tl.float32)
    )
    explained = tl.where(varies, 1.0 - unexplained, 0.0)
    tl.store(metrics_ptr, (squares * share).to(tl.float32))
    tl.store(metrics_ptr + 1, (_slot(sums, _VALUE_COUNTS + 1) * share).to(tl.float32))
    tl.store(metrics_ptr + 2, explained)
    tl.store(metrics_ptr + 3, num_tokens.to(tl.float32))
    scale = vf_coef * _scale(denominator_ptr, num_tokens)
    tl.store(scale_ptr, scale)
    return scale * squares.to(tl.float32)


# --- policy and value loss


@triton.jit(do_not_specialize=["num_segments"])
def _losses_kernel(  # type: ignore[no-untyped-def]
    new_logprobs_ptr,  # or None: no policy loss
    logprobs_ptr,
    advantages_ptr,
    loss_mask_ptr,
    denominator_ptr,  # or None
    cu_seqlens_ptr,  # or None
    ref_logprobs_ptr,  # or None
    entropy_ptr,  # or None
    rollout_logprobs_ptr,  # or None
    new_values_ptr,  # or None: no value loss
    values_ptr,
    returns_ptr,
    value_mask_ptr,  # or None for the loss mask
    value_denominator_ptr,  # or None
    grad_logprobs_ptr,  # or None
    grad_entropy_ptr,  # or None
    grad_values_ptr,  # or None
    loss_ptr,
    metrics_ptr,
    scales_ptr,
    partials_ptr,
    ticket_ptr,
    num_tokens,
    num_segments,
    segment_length,  # of padded sequences
    advantage_row_stride,
    advantage_col_stride,
    ratio_low,
    ratio_high,
    dual_clip,
    gate_pos,
    gate_neg,
    gate_rate_pos,
    gate_rate_neg,
    log_ratio_clip,
    kl_coef,
    kl_clip,
    entropy_coef,
    correction_low,
    correction_high,
    vf_coef,
    value_clip_range,
    LEVEL: tl.constexpr,
    CLIP: tl.constexpr,
    AGGREGATION: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    CORRECTION: tl.constexpr,
    CORRECTION_LEVEL: tl.constexpr,
    SEQUENCES: tl.constexpr,  # segments are sequences
    ADVANTAGE_ROWS: tl.constexpr,  # advantages are addressed by sequence and position
    TOGETHER: tl.constexpr,  # segments start at multiples of 16 tokens
    WIDE: tl.constexpr,  # tokens are numbered in 64 bits
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    WITH_POLICY: tl.constexpr = new_logprobs_ptr is not None
    WITH_VALUE: tl.constexpr = new_values_ptr is not None
    FIRST_WALK: tl.constexpr = (
        LEVEL != "token" or CORRECTION_LEVEL != "token" or AGGREGATION != "token_mean"
    )
    # The gradient of a token is that of its sequence's ratio.
    THROUGH: tl.constexpr = (
        (LEVEL == "sequence_sum" or LEVEL == "sequence_mean")
        and CLIP != "cispo"
        and CLIP != "vespo"
        and grad_logprobs_ptr is not None
    )
    EXTRAS: tl.constexpr = (
        ref_logprobs_ptr is not None
        or entropy_ptr is not None
        or CORRECTION != "none"
        or AGGREGATION == "sequence_mean"
    )
    INDEX: tl.constexpr = tl.int64 if WIDE else tl.int32
    lanes = tl.arange(0, BLOCK)[None, :]
    terms = tl.zeros((ROWS * BLOCK // 4, 4), tl.float64)
    extras, value_terms = terms, terms
    # Counts of a thread, exact up to 2^24: float32 needs no more instructions than an integer.
    counts = tl.zeros((ROWS * BLOCK // 4, 4), tl.float32)
    value_counts = counts
    value_loss = tl.zeros((ROWS * BLOCK // 4,), tl.float64)
    num_sequences = tl.zeros((), tl.int32)
    for group in range(tl.program_id(0), tl.cdiv(num_segments, ROWS), tl.num_programs(0)):
        rows = group * ROWS + tl.arange(0, ROWS)[:, None].to(INDEX)
        start, end, longest = _segments(
            rows, cu_seqlens_ptr, num_segments, segment_length, num_tokens, SEQUENCES, BLOCK
        )
        weight = 1.0
        if FIRST_WALK:
            lengths = tl.zeros((ROWS,), tl.float64)
            log_ratios = tl.zeros((ROWS,), tl.float64)
            log_weights = tl.zeros((ROWS,), tl.float64)
            for offset in range(0, longest, BLOCK):
                index = start + offset + lanes
                inside = index < end
                trained = _mask(loss_mask_ptr, index, inside)
                lengths += _sum_rows(trained)
                if LEVEL != "token":
                    new = _take(new_logprobs_ptr, index, inside, trained)
                    log_ratios += _sum_rows(new - _take(logprobs_ptr, index, inside, trained))
                if CORRECTION_LEVEL != "token":
                    old = _take(logprobs_ptr, index, inside, trained)
                    rollout = _take(rollout_logprobs_ptr, index, inside, trained)
                    log_weights += _sum_rows(old - rollout)
            num_sequences += tl.sum((lengths > 0).to(tl.int32), axis=0)
            inverse = 1.0 / tl.where(lengths == 0, 1.0, lengths)
            if LEVEL == "sequence_mean" or LEVEL == "sequence_mean_token":
                log_ratios *= inverse
            if CORRECTION_LEVEL == "sequence_mean":
                log_weights *= inverse
            if AGGREGATION == "sequence_mean":
                weight = inverse.to(tl.float32)[:, None]
            row_log_ratio = log_ratios.to(tl.float32)[:, None]
            row_log_weight = log_weights.to(tl.float32)[:, None]
        row_slope = tl.zeros((ROWS,), tl.float64)
        for offset in range(0, longest, BLOCK):
            index = start + offset + lanes
            inside = index < end
            if WITH_POLICY:
                # Where not trained all inputs are 0, and with them every summand but a factor's.
                trained = _mask(loss_mask_ptr, index, inside)
                new = _take(new_logprobs_ptr, index, inside, trained)
                old = _take(logprobs_ptr, index, inside, trained)
                if ADVANTAGE_ROWS:
                    where = rows.to(tl.int64) * advantage_row_stride
                    where += (offset + lanes).to(tl.int64) * advantage_col_stride
                    advantage = _take(advantages_ptr, where, inside, trained)
                else:
                    advantage = _take(advantages_ptr, index, inside, trained)
                corrected = trained != trained  # nowhere
                factor = tl.where(trained, 1.0, 0.0)
                if CORRECTION != "none":
                    if CORRECTION_LEVEL == "token":
                        log_weight = old - _take(rollout_logprobs_ptr, index, inside, trained)
                    else:
                        log_weight = tl.where(trained, row_log_weight, 0.0)
                    factor, corrected = _correction(
                        log_weight, correction_low, correction_high, CORRECTION
                    )
                    factor = tl.where(trained, factor, 0.0)
                    corrected = corrected & trained
                    advantage *= factor
                token_log_ratio = new - old
                if LEVEL == "token":
                    log_ratio = token_log_ratio
                else:
                    log_ratio = tl.where(trained, row_log_ratio, 0.0)
                term, slope, clipped, ratio = _surrogate(
                    new, log_ratio, advantage, ratio_low, ratio_high, dual_clip,
                    gate_pos, gate_neg, gate_rate_pos, gate_rate_neg, log_ratio_clip, CLIP,
                )  # fmt: skip
                objective = term
                gradient = weight * slope
                if THROUGH:
                    row_slope += _sum_rows(gradient)
                kl, bonus = tl.zeros_like(factor), tl.zeros_like(factor)
                if ref_logprobs_ptr is not None:
                    ref = _take(ref_logprobs_ptr, index, inside, trained)
                    kl = _kl(new - ref, kl_clip, ESTIMATOR)
                    kl_slope = _kl_slope(new - ref, kl_clip, ESTIMATOR)
                    # An infinite estimate of no weight is none.
                    objective += tl.where(kl_coef == 0, 0.0, kl_coef * kl)
                    gradient += tl.where(kl_coef == 0, 0.0, kl_coef * weight * kl_slope)
                if entropy_ptr is not None:
                    bonus = _take(entropy_ptr, index, inside, trained)
                    objective -= tl.where(entropy_coef == 0, 0.0, entropy_coef * bonus)
                    if grad_entropy_ptr is not None:
                        _put(grad_entropy_ptr, index, inside, trained, -entropy_coef * weight)
                if grad_logprobs_ptr is not None and not THROUGH:
                    _put(grad_logprobs_ptr, index, inside, trained, gradient)
                excess = (ratio - 1.0).to(tl.float64)
                half_square = (0.5 * token_log_ratio * token_log_ratio).to(tl.float64)
                terms += _four(term.to(tl.float64), half_square, excess, excess * excess, TOGETHER)
                if EXTRAS:
                    extras += _four(
                        kl.to(tl.float64), bonus.to(tl.float64), factor.to(tl.float64),
                        (weight * objective).to(tl.float64), TOGETHER,
                    )  # fmt: skip
                counts += _four(
                    trained.to(tl.float32), clipped.to(tl.float32), corrected.to(tl.float32),
                    tl.zeros((ROWS, BLOCK), tl.float32), TOGETHER,
                )  # fmt: skip
            if WITH_VALUE:
                if value_mask_ptr is not None:
                    valued = _mask(value_mask_ptr, index, inside)
                else:
                    valued = _mask(loss_mask_ptr, index, inside)
                value = _take(new_values_ptr, index, inside, valued)
                old_value = _take(values_ptr, index, inside, valued)
                target = _take(returns_ptr, index, inside, valued)
                low, high = old_value - value_clip_range, old_value + value_clip_range
                bounded = _between(value, low, high)
                error, bounded_error = value - target, bounded - target
                worse = bounded_error * bounded_error > error * error
                worst = tl.where(worse, bounded_error, error)
                if grad_values_ptr is not None:
                    slope = tl.where(worse & (bounded != value), 0.0, worst)
                    _put(grad_values_ptr, index, inside, valued, slope)
                wide_target, wide_error = target.to(tl.float64), error.to(tl.float64)
                value_terms += _four(
                    wide_target,
                    wide_target * wide_target,
                    wide_error,
                    wide_error * wide_error,
                    TOGETHER,
                )
                none = tl.zeros((ROWS, BLOCK), tl.float32)
                value_counts += _four(
                    valued.to(tl.float32), worse.to(tl.float32), none, none, TOGETHER
                )
                value_loss += _one((0.5 * worst * worst).to(tl.float64), TOGETHER)
        if THROUGH:
            if LEVEL == "sequence_mean":
                row_slope *= inverse
            row_gradient = row_slope.to(tl.float32)[:, None]
            for offset in range(0, longest, BLOCK):
                index = start + offset + lanes
                inside = index < end
                trained = _mask(loss_mask_ptr, index, inside)
                gradient = tl.where(trained, row_gradient, 0.0)
                if ref_logprobs_ptr is not None:
                    new = _take(new_logprobs_ptr, index, inside, trained)
                    ref = _take(ref_logprobs_ptr, index, inside, trained)
                    kl_slope = _kl_slope(new - ref, kl_clip, ESTIMATOR)
                    gradient += tl.where(kl_coef == 0, 0.0, kl_coef * weight * kl_slope)
                _put(grad_logprobs_ptr, index, inside, trained, gradient)

    if WITH_POLICY:
        _leave(partials_ptr, _TERMS, terms)
        if EXTRAS:
            _leave(partials_ptr, _EXTRAS, extras)
        _leave(partials_ptr, _COUNTS, counts.to(tl.int32))
        _leave_one(partials_ptr, _SEQUENCES, num_sequences)
    if WITH_VALUE:
        _leave(partials_ptr, _VALUES, value_terms)
        _leave(partials_ptr, _VALUE_COUNTS, value_counts.to(tl.int32))
        _leave_one(partials_ptr, _VALUE_LOSS, tl.sum(value_loss, axis=0))
    if _is_last(ticket_ptr):
        sums = _collect(partials_ptr)
        loss = 0.0
        if WITH_POLICY:
            loss += _finish_policy(
                sums, denominator_ptr, metrics_ptr, scales_ptr, AGGREGATION, EXTRAS
            )
            metrics_ptr += _NUM_POLICY_METRICS
            scales_ptr += 1
        if WITH_VALUE:
            loss += _finish_value(sums, value_denominator_ptr, metrics_ptr, scales_ptr, vf_coef)
        tl.store(loss_ptr, loss)
        tl.store(ticket_ptr, 0)

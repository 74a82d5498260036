"""policy_loss, value_loss and ppo_loss in one launch: loss, gradients and metrics together.

Tokens are walked in segments: blocks of fixed length, or whole sequences where an option belongs to
a sequence. Only then is there a first walk, which sums a sequence's log-ratios and counts its
tokens, and, where the gradient flows through the sequence's ratio, a third one that writes it; the
second and third read what the cache holds. A tile is ROWS segments of BLOCK tokens, so that short
sequences fill a program too. Sums over all tokens: triton_partial_sums.py.

Gradients are written unscaled (reference/policy.py), for the denominator is known only at the end.
"""

import math
from typing import Any, NamedTuple

import torch

from fuserl_kernels.reference.policy import METRICS as POLICY_METRICS
from fuserl_kernels.reference.policy import split_choices
from fuserl_kernels.reference.value import LEAST_SPREAD
from fuserl_kernels.reference.value import METRICS as VALUE_METRICS
from fuserl_kernels.triton_helpers import _cast
from fuserl_kernels.triton_kl import _kl, _kl_slope
from fuserl_kernels.triton_partial_sums import (
    MAX_PROGRAMS,
    NUM_WARPS,
    TILE,
    _collect,
    _four,
    _is_last,
    _leave,
    _leave_one,
    _one,
    _slot,
    _slots,
    scratch,
)
from fuserl_kernels.triton_policy_terms import _between, _correction, _surrogate
from fuserl_kernels.triton_runtime import Configuration, tl, triton

SHORTEST_BLOCK = 32
WIDE_FROM = 1 << 30  # tokens: half of what 32 bits hold, for a tile may begin anywhere below
CONFIGURATION = Configuration(NUM_WARPS, 1)
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


# --- launchers


class _Policy(NamedTuple):
    """The kernel's arguments that belong to the policy, in its order."""

    tensors: tuple[torch.Tensor | None, ...]
    sizes: tuple[int, int, int, int]  # segments, length of one, strides of advantages
    numbers: tuple[float, ...]
    flags: tuple[str | bool, ...]
    tile: tuple[int, int]  # rows and block


class _Value(NamedTuple):
    """The kernel's arguments that belong to the value, in its order."""

    tensors: tuple[torch.Tensor | None, ...]
    numbers: tuple[float, float]


def _flat(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _policy(
    new_logprobs: torch.Tensor,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    denominator: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    entropy: torch.Tensor | None,
    rollout_logprobs: torch.Tensor | None,
    *choices: Any,
) -> _Policy:
    """choices: as in policy_loss_fwd."""
    options, corrections, _ = split_choices(choices)
    correction, correction_level, *correction_range = corrections
    if rollout_logprobs is None or correction == "none":
        rollout_logprobs, correction, correction_level = None, "none", "token"
    num_tokens, aggregation = loss_mask.numel(), options.aggregation
    if aggregation == "sequence_sum" and denominator is not None:
        aggregation = "token_mean"  # it differs in the denominator's default alone
    # One for each sequence, or a view that repeats them: taken as it is.
    by_row = advantages.shape != loss_mask.shape
    by_row = by_row or (advantages.dim() == 2 and not advantages.is_contiguous())
    sequences = (
        by_row
        or options.ratio_level != "token"
        or correction_level != "token"
        or aggregation != "token_mean"
    )
    if not sequences:
        num_segments, length, tile = -(-num_tokens // TILE), 0, (1, TILE)
    elif cu_seqlens is None:
        num_segments, length = loss_mask.shape
        tile = _tile(length)
    else:
        num_segments, length = cu_seqlens.shape[0] - 1, 0
        tile = _tile(num_tokens // max(num_segments, 1))
    row_stride, col_stride = (*advantages.stride(), 0)[:2] if by_row else (0, 0)
    return _Policy(
        (
            new_logprobs.contiguous(),
            logprobs.contiguous(),
            advantages if by_row else advantages.contiguous(),
            loss_mask.contiguous(),
            denominator,
            _flat(cu_seqlens) if sequences else None,
            _flat(ref_logprobs),
            _flat(entropy),
            _flat(rollout_logprobs),
        ),
        (num_segments, length, row_stride, col_stride),
        (
            1.0 - options.clip_low,
            1.0 + options.clip_high,
            options.dual_clip,
            options.gate_pos,
            options.gate_neg,
            options.gate_rate_pos,
            options.gate_rate_neg,
            options.log_ratio_clip,
            options.kl_coef,
            options.kl_clip or math.inf,
            options.entropy_coef,
            *correction_range,
        ),
        (
            options.ratio_level,
            options.clip,
            aggregation,
            options.kl_estimator,
            correction,
            correction_level,
            sequences,
            by_row,
            not sequences or (cu_seqlens is None and length % 16 == 0),
            num_tokens >= WIDE_FROM,
        ),
        tile,
    )


def _tile(length: int) -> tuple[int, int]:
    """Rows and block for sequences of about this length: one of seven, so that few are compiled."""
    block = min(max(triton.next_power_of_2(length), SHORTEST_BLOCK), TILE)
    return TILE // block, block


def _no_policy(num_tokens: int) -> _Policy:
    wide = num_tokens >= WIDE_FROM
    flags = ("token", "none", "token_mean", "k1", "none", "token", False, False, True, wide)
    return _Policy((None,) * 9, (-(-num_tokens // TILE), 0, 0, 0), (0.0,) * 13, flags, (1, TILE))


_NO_VALUE = _Value((None,) * 5, (0.0, 0.0))


def _launch(
    policy: _Policy,
    value: _Value,
    like: torch.Tensor,
    gradients: tuple[torch.Tensor | None, ...],
    num_metrics: int,
    num_scales: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, metrics and scales. like: a tensor with one entry a token. gradients: room for those of
    new_logprobs, entropy and new_values that are wanted."""
    loss = like.new_empty((), dtype=torch.float32)
    metrics = like.new_empty(num_metrics, dtype=torch.float32)
    scales = like.new_empty(num_scales, dtype=torch.float32)
    num_tiles = -(-policy.sizes[0] // policy.tile[0])
    _losses_kernel[(max(1, min(num_tiles, MAX_PROGRAMS)),)](
        *policy.tensors,
        *value.tensors,
        *gradients,
        loss,
        metrics,
        scales,
        *scratch(like.device),
        like.numel(),
        *policy.sizes,
        *policy.numbers,
        *value.numbers,
        *policy.flags,
        *policy.tile,
        **CONFIGURATION.arguments(),
    )
    return loss, metrics, scales


def _room(tensor: torch.Tensor | None, wanted: bool) -> torch.Tensor | None:
    """Where a gradient goes."""
    return tensor.new_empty(tensor.shape) if wanted and tensor is not None else None


def _or_empty(gradient: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if gradient is None else gradient


def policy_loss_triton(new_logprobs: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, ...]:
    """policy_loss_fwd of reference/policy.py for float32, bf16 and fp16."""
    needs_grad, entropy = arguments[-1], arguments[6]
    gradients = _room(new_logprobs, needs_grad), _room(entropy, needs_grad), None
    loss, metrics, scale = _launch(
        _policy(new_logprobs, *arguments),
        _NO_VALUE,
        new_logprobs,
        gradients,
        len(POLICY_METRICS),
        1,
    )
    return loss, metrics, scale, *(_or_empty(g, new_logprobs) for g in gradients[:2])


def value_loss_triton(
    new_values: torch.Tensor,
    values: torch.Tensor,
    returns: torch.Tensor,
    loss_mask: torch.Tensor,
    clip_range: float,
    denominator: torch.Tensor | None,
    needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """value_loss_fwd of reference/value.py for float32, bf16 and fp16."""
    gradient = _room(new_values, needs_grad)
    value = _value(new_values, values, returns, loss_mask, 1.0, clip_range, denominator)
    loss, metrics, scale = _launch(
        _no_policy(new_values.numel()),
        value,
        new_values,
        (None, None, gradient),
        len(VALUE_METRICS),
        1,
    )
    return loss, metrics, scale, _or_empty(gradient, new_values)


def _value(
    new_values: torch.Tensor,
    values: torch.Tensor,
    returns: torch.Tensor,
    value_mask: torch.Tensor | None,
    vf_coef: float,
    clip_range: float,
    denominator: torch.Tensor | None,
) -> _Value:
    """value_mask: None for the policy's."""
    tensors = (
        new_values.contiguous(),
        values.contiguous(),
        returns.contiguous(),
        _flat(value_mask),
        denominator,
    )
    return _Value(tensors, (vf_coef, clip_range))


def _is_same(mask: torch.Tensor, other: torch.Tensor) -> bool:
    return mask.data_ptr() == other.data_ptr() and mask.stride() == other.stride()


def ppo_loss_triton(
    new_logprobs: torch.Tensor,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    new_values: torch.Tensor,
    values: torch.Tensor,
    returns: torch.Tensor,
    loss_mask: torch.Tensor,
    value_mask: torch.Tensor,
    vf_coef: float,
    value_clip_range: float,
    value_denominator: torch.Tensor | None,
    *policy_arguments: Any,
) -> tuple[torch.Tensor, ...]:
    """ppo_loss_fwd of reference/policy.py for float32, bf16 and fp16."""
    needs_grad, entropy = policy_arguments[-1], policy_arguments[3]
    gradients = tuple(_room(x, needs_grad) for x in (new_logprobs, entropy, new_values))
    # By default the value's mask is the policy's: read once.
    own_mask = None if _is_same(value_mask, loss_mask) else value_mask
    loss, metrics, scales = _launch(
        _policy(new_logprobs, logprobs, advantages, loss_mask, *policy_arguments),
        _value(new_values, values, returns, own_mask, vf_coef, value_clip_range, value_denominator),
        new_logprobs,
        gradients,
        len(POLICY_METRICS) + len(VALUE_METRICS),
        2,
    )
    return loss, metrics, scales, *(_or_empty(g, new_logprobs) for g in gradients)

"""policy_loss, value_loss and ppo_loss in one launch of triton_losses_kernel.py."""

import math
from typing import Any, NamedTuple

import torch

from fuserl_kernels.reference.policy import METRICS as POLICY_METRICS
from fuserl_kernels.reference.policy import split_choices
from fuserl_kernels.reference.value import METRICS as VALUE_METRICS
from fuserl_kernels.triton_losses_kernel import _losses_kernel
from fuserl_kernels.triton_partial_sums import (
    MAX_PROGRAMS,
    NUM_WARPS,
    TILE,
    scratch,
)
from fuserl_kernels.triton_runtime import Configuration, triton

SHORTEST_BLOCK = 32
WIDE_FROM = 1 << 30  # tokens: half of what 32 bits hold, for a tile may begin anywhere below
CONFIGURATION = Configuration(NUM_WARPS, 1)


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

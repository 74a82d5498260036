"""From scores to whitened advantages on a GPU: one launch, and a second one where anything is
whitened. Formulas: reference/rewards.py, rewards_to_advantages_fwd; the scan: triton_advantages.py.

Whitened advantages: the first launch writes them unwhitened and leaves their moments, the second is
that of masked_whiten.

Whitened rewards: what gae sees is known after all rows have been read, r' = s r + c on the value
mask with s and c from the moments of r. But an advantage is linear in rewards and values,
A = s x + c y + z, where x comes of the rewards alone, y of a reward of 1 at each valued slot and z
of the values alone. The first launch scans the three and sums them and their products; from the
sums the second knows mean and variance of A before it scans r' and writes.
"""

import math

import torch

from fuserl_kernels.reference.sequences import compute_dtype
from fuserl_kernels.triton_advantages import _earliest, _map, _returns
from fuserl_kernels.triton_rewards import (
    BLOCKS,
    FIELD_BLOCKS,
    _block,
    _coefficient,
    _padded_rows,
    _row_scores,
    _score_slot,
    _shaped,
    blocks,
    max_slot,
)
from fuserl_kernels.triton_runtime import tl, triton
from fuserl_kernels.triton_whitening import (
    MAX_PARTS,
    _absorb,
    _merged,
    _store_moments,
    _whitening_factor,
    new_like,
    parts_like,
    whiten_with,
)

NUM_ITEMS = 16  # 10 sums, as a power of two
_ITEMS = tl.constexpr(NUM_ITEMS)


@triton.jit
def _valued_block(  # type: ignore[no-untyped-def]
    loss_mask_ptr, values_ptr, starts, lengths, score_slot, step, BLOCK_T: tl.constexpr
):
    """A block of the value mask: loss_mask and the slot of the score.

    (offsets, inside, trained, is_score_slot, valued, value, valued one slot behind, value one slot
    behind); values are float64, 0 where there is none."""
    slots, offsets, inside = _block(starts, lengths, step, BLOCK_T)
    behind = inside & (slots + 1 < lengths[:, None])
    trained = tl.load(loss_mask_ptr + offsets, mask=inside, other=0) != 0
    trained_behind = tl.load(loss_mask_ptr + offsets + 1, mask=behind, other=0) != 0
    is_score_slot = inside & (slots == score_slot)
    valued = trained | is_score_slot
    valued_behind = trained_behind | (behind & (slots + 1 == score_slot))
    value = tl.load(values_ptr + offsets, mask=valued, other=0.0).to(tl.float64)
    value_behind = tl.load(values_ptr + offsets + 1, mask=valued_behind, other=0.0)
    return (
        offsets, inside, trained, is_score_slot, valued, value, valued_behind,
        value_behind.to(tl.float64),
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "max_slot"])
def _advantages_kernel(  # type: ignore[no-untyped-def]
    scores_ptr,
    logprobs_ptr,
    ref_logprobs_ptr,
    values_ptr,
    loss_mask_ptr,
    has_eos_ptr,  # or None
    kl_coefs_ptr,  # or None for the number
    kl_coef_number: tl.float64,
    advantages_ptr,
    returns_ptr,
    rewards_ptr,
    kl_ptr,
    moments_ptr,  # of the advantages, or None where nobody whitens
    num_rows,
    row_length,
    max_slot,
    kl_clip,
    score_clip,
    score_scale,
    penalty,
    decay: tl.float64,
    value_weight: tl.float64,
    part_stride,
    item_stride,
    ESTIMATOR: tl.constexpr,
    SCORE_SLOT: tl.constexpr,
    MISSING_EOS: tl.constexpr,
    CARRY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Rewards, kl, returns and advantages, and the moments of the advantages."""
    dtype: tl.constexpr = rewards_ptr.dtype.element_ty
    wide: tl.constexpr = advantages_ptr.dtype.element_ty
    kl_coef = _coefficient(kl_coefs_ptr, kl_coef_number, dtype)
    zero = tl.full((), 0.0, tl.float64)
    count, mean, squares = zero, zero, zero
    part = tl.program_id(0).to(tl.int64)
    for group in range(part, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = group * ROWS + tl.arange(0, ROWS)
        starts, lengths = _padded_rows(rows, num_rows, row_length)
        score_slot, score = _row_scores(
            scores_ptr, has_eos_ptr, loss_mask_ptr, rows, starts, lengths, row_length, max_slot,
            score_clip, score_scale, penalty, SCORE_SLOT, MISSING_EOS, BLOCK_T, dtype,
        )  # fmt: skip
        carry = tl.zeros((ROWS,), tl.float64)
        for step in range(0, row_length, BLOCK_T):
            (
                offsets, inside, trained, is_score_slot, valued, value, valued_behind, value_behind,
            ) = _valued_block(
                loss_mask_ptr, values_ptr, starts, lengths, score_slot, step, BLOCK_T
            )  # fmt: skip
            reward, kl = _shaped(
                scores_ptr, logprobs_ptr, ref_logprobs_ptr, offsets, trained, is_score_slot,
                score, kl_coef, kl_clip, score_clip, score_scale, ESTIMATOR, SCORE_SLOT, dtype,
            )  # fmt: skip
            tl.store(rewards_ptr + offsets, reward, mask=inside)
            tl.store(kl_ptr + offsets, kl, mask=inside)
            factors, maps = _map(
                valued_behind, value_behind, reward.to(tl.float64), decay, value_weight, CARRY
            )
            states = _returns(factors, maps, carry)
            if step + BLOCK_T < row_length:
                carry = _earliest(states)
            advantage = tl.where(trained, states - value, 0.0).to(wide)
            tl.store(advantages_ptr + offsets, advantage, mask=inside)
            tl.store(returns_ptr + offsets, tl.where(valued, states, 0.0).to(wide), mask=inside)
            if moments_ptr is not None:
                count, mean, squares = _absorb(
                    count, mean, squares, advantage.to(tl.float64), trained
                )
    if moments_ptr is not None:
        _store_moments(moments_ptr, part, part_stride, item_stride, count, mean, squares)


@triton.jit
def _compose_fields(factor, x, y, z, next_factor, next_x, next_y, next_z):  # type: ignore[no-untyped-def]
    return (
        factor * next_factor,
        tl.fma(next_factor, x, next_x),
        tl.fma(next_factor, y, next_y),
        tl.fma(next_factor, z, next_z),
    )


@triton.jit
def _sum_as(ITEM: tl.constexpr, x, mask):  # type: ignore[no-untyped-def]
    """The sum of x over the mask as one entry of a vector that is 0 elsewhere."""
    return tl.where(tl.arange(0, _ITEMS) == ITEM, tl.sum(tl.where(mask, x, 0.0)), 0.0)


@triton.jit(do_not_specialize=["num_rows", "max_slot"])
def _fields_kernel(  # type: ignore[no-untyped-def]
    scores_ptr,
    logprobs_ptr,
    ref_logprobs_ptr,
    values_ptr,
    loss_mask_ptr,
    has_eos_ptr,  # or None
    kl_coefs_ptr,  # or None for the number
    kl_coef_number: tl.float64,
    rewards_ptr,
    kl_ptr,
    moments_ptr,  # of the rewards
    sums_ptr,  # of x, y, z, or None where nobody whitens the advantages
    num_rows,
    row_length,
    max_slot,
    kl_clip,
    score_clip,
    score_scale,
    penalty,
    decay: tl.float64,
    value_weight: tl.float64,
    part_stride,
    item_stride,
    ESTIMATOR: tl.constexpr,
    SCORE_SLOT: tl.constexpr,
    MISSING_EOS: tl.constexpr,
    CARRY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Rewards before their whitening, kl, the moments of the rewards over the value mask, and the
    sums of the three fields over loss_mask."""
    dtype: tl.constexpr = rewards_ptr.dtype.element_ty
    kl_coef = _coefficient(kl_coefs_ptr, kl_coef_number, dtype)
    zero = tl.full((), 0.0, tl.float64)
    count, mean, squares = zero, zero, zero
    sums = tl.zeros((_ITEMS,), tl.float64)
    part = tl.program_id(0).to(tl.int64)
    for group in range(part, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = group * ROWS + tl.arange(0, ROWS)
        starts, lengths = _padded_rows(rows, num_rows, row_length)
        score_slot, score = _row_scores(
            scores_ptr, has_eos_ptr, loss_mask_ptr, rows, starts, lengths, row_length, max_slot,
            score_clip, score_scale, penalty, SCORE_SLOT, MISSING_EOS, BLOCK_T, dtype,
        )  # fmt: skip
        carry_x = tl.zeros((ROWS,), tl.float64)
        carry_y, carry_z = carry_x, carry_x
        for step in range(0, row_length, BLOCK_T):
            (
                offsets, inside, trained, is_score_slot, valued, value, valued_behind, value_behind,
            ) = _valued_block(
                loss_mask_ptr, values_ptr, starts, lengths, score_slot, step, BLOCK_T
            )  # fmt: skip
            reward, kl = _shaped(
                scores_ptr, logprobs_ptr, ref_logprobs_ptr, offsets, trained, is_score_slot,
                score, kl_coef, kl_clip, score_clip, score_scale, ESTIMATOR, SCORE_SLOT, dtype,
            )  # fmt: skip
            tl.store(rewards_ptr + offsets, reward, mask=inside)
            tl.store(kl_ptr + offsets, kl, mask=inside)
            reward = reward.to(tl.float64)
            count, mean, squares = _absorb(count, mean, squares, reward, valued)
            if sums_ptr is not None:
                nothing = tl.zeros((ROWS, BLOCK_T), tl.float64)
                factors, maps = _map(
                    valued_behind, value_behind, nothing, decay, value_weight, CARRY
                )
                factors, x, y, z = tl.associative_scan(
                    (factors, reward, valued.to(tl.float64), maps), 1, _compose_fields
                )
                x = tl.fma(factors, tl.broadcast_to(carry_x[:, None], x.shape), x)
                y = tl.fma(factors, tl.broadcast_to(carry_y[:, None], x.shape), y)
                z = tl.fma(factors, tl.broadcast_to(carry_z[:, None], x.shape), z)
                if step + BLOCK_T < row_length:
                    carry_x, carry_y, carry_z = _earliest(x), _earliest(y), _earliest(z)
                z -= value
                sums += _sum_as(0, trained.to(tl.float64), trained)
                sums += _sum_as(1, x, trained) + _sum_as(2, y, trained) + _sum_as(3, z, trained)
                sums += _sum_as(4, x * x, trained) + _sum_as(5, x * y, trained)
                sums += _sum_as(6, x * z, trained) + _sum_as(7, y * y, trained)
                sums += _sum_as(8, y * z, trained) + _sum_as(9, z * z, trained)
    _store_moments(moments_ptr, part, part_stride, item_stride, count, mean, squares)
    if sums_ptr is not None:
        items = tl.arange(0, _ITEMS)
        tl.store(sums_ptr + part * part_stride + items * item_stride, sums)


@triton.jit
def _item(sums_ptr, num_parts, part_stride, item_stride, ITEM: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One sum over all parts."""
    parts = tl.arange(0, PARTS)
    part_ptr = sums_ptr + parts * part_stride + ITEM * item_stride
    return tl.sum(tl.load(part_ptr, mask=parts < num_parts, other=0.0))


@triton.jit
def _field_moments(  # type: ignore[no-untyped-def]
    sums_ptr, num_parts, part_stride, item_stride, s, c, PARTS: tl.constexpr
):
    """(count, mean, sum of squared deviations) of A = s x + c y + z."""
    n = _item(sums_ptr, num_parts, part_stride, item_stride, 0, PARTS)
    x = _item(sums_ptr, num_parts, part_stride, item_stride, 1, PARTS)
    y = _item(sums_ptr, num_parts, part_stride, item_stride, 2, PARTS)
    z = _item(sums_ptr, num_parts, part_stride, item_stride, 3, PARTS)
    xx = _item(sums_ptr, num_parts, part_stride, item_stride, 4, PARTS)
    xy = _item(sums_ptr, num_parts, part_stride, item_stride, 5, PARTS)
    xz = _item(sums_ptr, num_parts, part_stride, item_stride, 6, PARTS)
    yy = _item(sums_ptr, num_parts, part_stride, item_stride, 7, PARTS)
    yz = _item(sums_ptr, num_parts, part_stride, item_stride, 8, PARTS)
    zz = _item(sums_ptr, num_parts, part_stride, item_stride, 9, PARTS)
    total = s * x + c * y + z
    mean = total / tl.maximum(n, 1.0)
    second = s * s * xx + c * c * yy + zz + 2.0 * (s * c * xy + s * xz + c * yz)
    return n, mean, tl.maximum(second - total * mean, 0.0)


@triton.jit(do_not_specialize=["num_rows", "num_parts", "max_slot"])
def _whitened_kernel(  # type: ignore[no-untyped-def]
    loss_mask_ptr,
    values_ptr,
    moments_ptr,
    sums_ptr,  # or None where nobody whitens the advantages
    rewards_ptr,  # whitened in place
    advantages_ptr,
    returns_ptr,
    num_rows,
    row_length,
    max_slot,
    num_parts,
    decay: tl.float64,
    value_weight: tl.float64,
    part_stride,
    item_stride,
    SCORE_SLOT: tl.constexpr,
    UNBIASED: tl.constexpr,
    CARRY: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Whitened rewards, and the returns and advantages that follow from them."""
    dtype: tl.constexpr = rewards_ptr.dtype.element_ty
    wide: tl.constexpr = advantages_ptr.dtype.element_ty
    count, mean, squares = _merged(moments_ptr, num_parts, part_stride, item_stride)
    scale = _whitening_factor(count, squares, UNBIASED)
    shift = mean - scale * mean
    if sums_ptr is not None:
        num_trained, advantage_mean, advantage_squares = _field_moments(
            sums_ptr, num_parts, part_stride, item_stride, scale, shift, PARTS
        )
        factor = _whitening_factor(num_trained, advantage_squares, UNBIASED)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    starts, lengths = _padded_rows(rows, num_rows, row_length)
    score_slot = tl.full((ROWS,), -1, tl.int32)
    if SCORE_SLOT != "token":
        score_slot = _score_slot(
            loss_mask_ptr, starts, lengths, row_length, max_slot, SCORE_SLOT == "after", BLOCK_T
        )
    score_slot = score_slot[:, None]
    carry = tl.zeros((ROWS,), tl.float64)
    for step in range(0, row_length, BLOCK_T):
        (
            offsets, inside, trained, _, valued, value, valued_behind, value_behind,
        ) = _valued_block(
            loss_mask_ptr, values_ptr, starts, lengths, score_slot, step, BLOCK_T
        )  # fmt: skip
        reward = tl.load(rewards_ptr + offsets, mask=valued, other=0.0).to(tl.float64)
        tl.debug_barrier()  # every thread has loaded before any of it is overwritten
        reward = tl.where(valued, (reward - mean) * scale + mean, 0.0)
        tl.store(rewards_ptr + offsets, reward.to(dtype), mask=inside)
        factors, maps = _map(valued_behind, value_behind, reward, decay, value_weight, CARRY)
        states = _returns(factors, maps, carry)
        if step + BLOCK_T < row_length:
            carry = _earliest(states)
        advantage = states - value
        if sums_ptr is not None:
            advantage = (advantage - advantage_mean) * factor
        advantage = tl.where(trained, advantage, 0.0).to(wide)
        tl.store(advantages_ptr + offsets, advantage, mask=inside)
        tl.store(returns_ptr + offsets, tl.where(valued, states, 0.0).to(wide), mask=inside)


def rewards_to_advantages_triton(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    values: torch.Tensor,
    loss_mask: torch.Tensor,
    has_eos: torch.Tensor | None,
    kl_coefs: torch.Tensor | None,
    kl_coef: float,
    estimator: str,
    kl_clip: float,
    score_slot: str,
    score_clip: float,
    score_scale: float,
    missing_eos: str,
    missing_eos_penalty: float,
    max_length: int,
    gamma: float,
    gae_lambda: float,
    masked: str,
    whiten: bool,
    whiten_rewards: bool,
    unbiased: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """rewards_to_advantages_fwd of the reference: one launch, and a second one that whitens."""
    num_rows, row_length = logprobs.shape
    shaped = compute_dtype(scores, logprobs)
    wide = torch.promote_types(shaped, compute_dtype(values))
    advantages, returns = (new_like(logprobs, wide) for _ in range(2))
    rewards, kl = (new_like(logprobs, shaped) for _ in range(2))
    if logprobs.numel() == 0:
        return advantages, returns, rewards, kl
    choices = FIELD_BLOCKS if whiten_rewards else BLOCKS
    num_blocks, configuration = blocks(num_rows, row_length, choices)
    num_parts = min(num_blocks, MAX_PARTS)
    values, loss_mask = values.contiguous(), loss_mask.contiguous()
    moments = parts_like(logprobs, num_parts) if whiten or whiten_rewards else None
    sums = parts_like(logprobs, num_parts, NUM_ITEMS) if whiten and whiten_rewards else None
    strides = (0, 0) if moments is None else moments.stride()
    slot = score_slot if scores.dim() == 1 else "token"
    last_slot = max_slot(max_length, row_length)
    weights = (gamma * gae_lambda, gamma * (1.0 - gae_lambda))
    inputs = (
        scores.contiguous(),
        logprobs.contiguous(),
        ref_logprobs.contiguous(),
        values,
        loss_mask,
        None if has_eos is None else has_eos.contiguous(),
        kl_coefs,
        kl_coef,
    )
    numbers = (
        num_rows,
        row_length,
        last_slot,
        kl_clip or math.inf,
        score_clip,
        score_scale,
        missing_eos_penalty,
        *weights,
        *strides,
        estimator,
        slot,
        missing_eos if has_eos is not None else "",
        masked == "carry",
    )
    if not whiten_rewards:
        outputs = (advantages, returns, rewards, kl, moments)
        _advantages_kernel[(num_parts,)](*inputs, *outputs, *numbers, **configuration.arguments())
        if moments is not None:
            whiten_with(advantages, loss_mask, moments, True, unbiased, advantages)
        return advantages, returns, rewards, kl
    _fields_kernel[(num_parts,)](
        *inputs, rewards, kl, moments, sums, *numbers, **configuration.arguments()
    )
    num_blocks, configuration = blocks(num_rows, row_length)
    _whitened_kernel[(num_blocks,)](
        loss_mask,
        values,
        moments,
        sums,
        rewards,
        advantages,
        returns,
        num_rows,
        row_length,
        last_slot,
        num_parts,
        *weights,
        *strides,
        slot,
        unbiased,
        masked == "carry",
        MAX_PARTS,
        **configuration.arguments(),
    )
    return advantages, returns, rewards, kl

"""Advantages and returns on a GPU: a scan over the slots of each row, from the last to the first.

With r and v zero outside the value mask, and X_t what slot t hands to the slot before it:

    R_t = r_t + X_{t+1}
    X_t = gamma * lambda * R_t + gamma * (1 - lambda) * v_t     at a slot
    X_t = R_t (identity)  or  gamma * lambda * R_t (carry)      at a hole, where r = v = 0

R is the return and R - v the advantage; this is the recursion of reference/rewards.py without its
"value at the next slot". R_t is an affine map of R_{t+1} that knows only the masks and v of slot
t+1 and r of slot t, so the maps of a block compose in an associative scan. States are float64: the
advantage is a small difference where values predict returns well, and a row's results then hardly
ever depend on where the blocks of the row begin. Blocks and lanes: triton_rewards.py.
"""

import torch

from fuserl_kernels.reference.sequences import compute_dtype
from fuserl_kernels.triton_rewards import _block, _padded_rows, blocks
from fuserl_kernels.triton_runtime import tl, triton
from fuserl_kernels.triton_whitening import new_like

# --- the scan


@triton.jit
def _compose(decay, state, next_decay, next_state):  # type: ignore[no-untyped-def]
    """The affine map of the later slots, then that of the earlier one."""
    return decay * next_decay, tl.fma(next_decay, state, next_state)


@triton.jit
def _map(slot_behind, value_behind, reward, decay, value_weight, CARRY: tl.constexpr):  # type: ignore[no-untyped-def]
    """(factor, offset) of R_t = factor * R_{t+1} + offset. The value behind is 0 where there is
    none."""
    factors = tl.full(reward.shape, decay, tl.float64)
    if not CARRY:
        factors = tl.where(slot_behind, factors, 1.0)
    return factors, reward + value_weight * value_behind


@triton.jit
def _returns(decays, offsets, carry):  # type: ignore[no-untyped-def]
    """States R [ROWS, BLOCK_T] of a block, given the state [ROWS] behind it."""
    decays, states = tl.associative_scan((decays, offsets), 1, _compose)
    return tl.fma(decays, tl.broadcast_to(carry[:, None], states.shape), states)


@triton.jit
def _earliest(states):  # type: ignore[no-untyped-def]
    """The state [ROWS] that a block hands to the one before it: that of its last lane."""
    lanes = tl.arange(0, states.shape[1])[None, :]
    return tl.sum(tl.where(lanes == states.shape[1] - 1, states, 0.0), axis=1)


# --- gae and discounted_returns


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def _gae_kernel(  # type: ignore[no-untyped-def]
    rewards_ptr,
    values_ptr,  # or None
    loss_mask_ptr,
    value_mask_ptr,
    cu_seqlens_ptr,  # or None for rows of row_length
    advantages_ptr,  # or None
    returns_ptr,
    num_rows,
    row_length,
    num_tokens,
    decay: tl.float64,
    value_weight: tl.float64,
    CARRY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    starts, lengths = _padded_rows(rows, num_rows, row_length)
    longest = row_length
    if cu_seqlens_ptr is not None:
        present = rows < num_rows
        starts = tl.load(cu_seqlens_ptr + rows, mask=present, other=0).to(tl.int64)
        ends = tl.load(cu_seqlens_ptr + rows + 1, mask=present, other=0).to(tl.int64)
        # Bounds that no one checked on the device may be wrong, but never reach outside.
        starts, ends = tl.maximum(starts, 0), tl.minimum(ends, num_tokens)
        lengths = (ends - starts).to(tl.int32)
        longest = tl.max(lengths, axis=0)
    carry = tl.zeros((ROWS,), tl.float64)
    for step in range(0, longest, BLOCK_T):
        slots, offsets, inside = _block(starts, lengths, step, BLOCK_T)
        behind = inside & (slots + 1 < lengths[:, None])
        loss = tl.load(loss_mask_ptr + offsets, mask=inside, other=0) != 0
        valued = tl.load(value_mask_ptr + offsets, mask=inside, other=0) != 0
        reward = tl.load(rewards_ptr + offsets, mask=valued, other=0.0).to(tl.float64)
        loss_behind = tl.load(loss_mask_ptr + offsets + 1, mask=behind, other=0) != 0
        valued_behind = tl.load(value_mask_ptr + offsets + 1, mask=behind, other=0) != 0
        value = tl.zeros((ROWS, BLOCK_T), tl.float64)
        value_behind = value
        if values_ptr is not None:
            value = tl.load(values_ptr + offsets, mask=valued, other=0.0).to(tl.float64)
            value_behind = tl.load(values_ptr + offsets + 1, mask=valued_behind, other=0.0)
            value_behind = value_behind.to(tl.float64)
        decays, maps = _map(
            loss_behind | valued_behind, value_behind, reward, decay, value_weight, CARRY
        )
        states = _returns(decays, maps, carry)
        if step + BLOCK_T < longest:
            carry = _earliest(states)
        dtype: tl.constexpr = returns_ptr.dtype.element_ty
        if values_ptr is None:
            tl.store(returns_ptr + offsets, tl.where(loss, states, 0.0).to(dtype), mask=inside)
        else:
            advantage = tl.where(loss, states - value, 0.0).to(dtype)
            tl.store(advantages_ptr + offsets, advantage, mask=inside)
            tl.store(returns_ptr + offsets, tl.where(valued, states, 0.0).to(dtype), mask=inside)


def _gae_launch(
    rewards: torch.Tensor,
    values: torch.Tensor | None,
    loss_mask: torch.Tensor,
    value_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    advantages: torch.Tensor | None,
    returns: torch.Tensor,
    gamma: float,
    gae_lambda: float,
    masked: str,
) -> None:
    if cu_seqlens is None:
        num_rows, row_length = rewards.shape
        num_programs, configuration = blocks(num_rows, row_length)
    else:
        # The lengths are on the device: take the block that would hold rows of equal lengths.
        num_rows, row_length = cu_seqlens.shape[0] - 1, 0
        num_programs, configuration = blocks(num_rows, rewards.numel() // max(num_rows, 1))
        cu_seqlens = cu_seqlens.contiguous()
    if rewards.numel() == 0:
        return
    _gae_kernel[(num_programs,)](
        rewards.contiguous(),
        None if values is None else values.contiguous(),
        loss_mask.contiguous(),
        value_mask.contiguous(),
        cu_seqlens,
        advantages,
        returns,
        num_rows,
        row_length,
        rewards.numel(),
        gamma * gae_lambda,
        gamma * (1.0 - gae_lambda),
        masked == "carry",
        **configuration.arguments(),
    )


def gae_triton(
    rewards: torch.Tensor,
    values: torch.Tensor,
    loss_mask: torch.Tensor,
    value_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    gamma: float,
    gae_lambda: float,
    masked: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """gae_fwd of the reference, in one launch."""
    dtype = compute_dtype(rewards, values)
    advantages, returns = (new_like(rewards, dtype) for _ in range(2))
    _gae_launch(
        rewards, values, loss_mask, value_mask, cu_seqlens, advantages, returns,
        gamma, gae_lambda, masked,
    )  # fmt: skip
    return advantages, returns


def discounted_returns_triton(
    rewards: torch.Tensor,
    loss_mask: torch.Tensor,
    reward_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    gamma: float,
) -> torch.Tensor:
    """discounted_returns_fwd of the reference, in one launch."""
    returns = new_like(rewards, compute_dtype(rewards))
    _gae_launch(
        rewards, None, loss_mask, reward_mask, cu_seqlens, None, returns, gamma, 1.0, "identity"
    )
    return returns

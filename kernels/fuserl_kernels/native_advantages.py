"""KL, shaping, GAE and whitening on the CPU: launchers of csrc/cpu/advantages.h.

Each takes the arguments of the reference function of its name (reference/rewards.py) and gives its
results. Inputs of any strides in float32, bf16 or fp16; arithmetic and results in float32, sums
over tokens in float64, in an order that does not depend on the number of threads.
"""

from typing import Any

import torch

from fuserl_kernels import native


def _floats(**tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors as contiguous float32. A float64 one would make the result float64."""
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float64:
            raise ValueError(
                f"{name} is float64, which the native kernels do not compute in: give {name} the "
                "dtype of the other tensors, or choose the reference"
            )
    return [tensor.float().contiguous() for tensor in tensors.values()]


def _like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=torch.float32)


def kl_penalty_fwd(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str, kl_clip: float
) -> torch.Tensor:
    logprobs, ref_logprobs = _floats(logprobs=logprobs, ref_logprobs=ref_logprobs)
    out = _like(logprobs)
    native.module().kl_penalty_forward(
        logprobs=logprobs.data_ptr(),
        ref_logprobs=ref_logprobs.data_ptr(),
        size=logprobs.numel(),
        estimator=estimator,
        kl_clip=kl_clip,
        out=out.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return out


def kl_penalty_bwd(
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    estimator: str,
    kl_clip: float,
    grad: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtypes = logprobs.dtype, ref_logprobs.dtype
    logprobs, ref_logprobs, grad = _floats(logprobs=logprobs, ref_logprobs=ref_logprobs, grad=grad)
    grad_logprobs, grad_ref_logprobs = _like(logprobs), _like(logprobs)
    native.module().kl_penalty_backward(
        logprobs=logprobs.data_ptr(),
        ref_logprobs=ref_logprobs.data_ptr(),
        size=logprobs.numel(),
        estimator=estimator,
        kl_clip=kl_clip,
        grad=grad.data_ptr(),
        grad_logprobs=grad_logprobs.data_ptr(),
        grad_ref_logprobs=grad_ref_logprobs.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return grad_logprobs.to(dtypes[0]), grad_ref_logprobs.to(dtypes[1])


class _Shaping:
    """shape_rewards' arguments as the native struct of pointers, and the tensors they point to."""

    def __init__(
        self,
        scores: torch.Tensor,
        logprobs: torch.Tensor,
        ref_logprobs: torch.Tensor,
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
    ):
        scores, logprobs = _floats(scores=scores, logprobs=logprobs)
        ref_logprobs = ref_logprobs.float().contiguous()
        self.loss_mask = loss_mask.contiguous()
        has_eos = None if has_eos is None else has_eos.contiguous()
        self.rewards, self.kl = _like(logprobs), _like(logprobs)
        num_rows, num_slots = logprobs.shape
        self._inputs = scores, logprobs, ref_logprobs, has_eos
        self.struct: Any = native.module().Shaping(
            scores=scores.data_ptr(),
            each_slot=scores.dim() == 2,
            logprobs=logprobs.data_ptr(),
            ref_logprobs=ref_logprobs.data_ptr(),
            loss_mask=self.loss_mask.data_ptr(),
            has_eos=native.address(has_eos),
            num_rows=num_rows,
            num_slots=num_slots,
            estimator=estimator,
            kl_clip=kl_clip,
            kl_coef=kl_coef if kl_coefs is None else float(kl_coefs),
            after=score_slot == "after",
            limit=min(max_length, num_slots) if max_length else num_slots,
            score_clip=score_clip,
            score_scale=score_scale,
            missing_eos="" if has_eos is None else missing_eos,
            missing_eos_penalty=missing_eos_penalty,
            rewards=self.rewards.data_ptr(),
            kl=self.kl.data_ptr(),
        )


def shape_rewards_fwd(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    shaping = _Shaping(*arguments)
    native.module().shape_rewards(shaping.struct, num_threads=torch.get_num_threads())
    return shaping.rewards, shaping.kl


def _scan(
    rewards: torch.Tensor,
    values: torch.Tensor | None,
    loss_mask: torch.Tensor,
    value_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    gamma: float,
    gae_lambda: float,
    masked: str,
    returns: torch.Tensor | None,
) -> torch.Tensor:
    loss_mask, value_mask = loss_mask.contiguous(), value_mask.contiguous()
    advantages = _like(rewards)
    if cu_seqlens is None:
        num_rows, num_slots = rewards.shape
    else:
        cu_seqlens = cu_seqlens.long().contiguous()
        num_rows, num_slots = cu_seqlens.shape[0] - 1, 0
    native.module().gae(
        rewards=rewards.data_ptr(),
        values=native.address(values),
        loss_mask=loss_mask.data_ptr(),
        value_mask=value_mask.data_ptr(),
        num_rows=num_rows,
        num_slots=num_slots,
        starts=native.address(cu_seqlens),
        gamma=gamma,
        gae_lambda=gae_lambda,
        carry=masked == "carry",
        advantages=advantages.data_ptr(),
        returns=native.address(returns),
        num_threads=torch.get_num_threads(),
    )
    return advantages


def gae_fwd(
    rewards: torch.Tensor,
    values: torch.Tensor,
    loss_mask: torch.Tensor,
    value_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    gamma: float,
    gae_lambda: float,
    masked: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    rewards, values = _floats(rewards=rewards, values=values)
    returns = _like(rewards)
    discount = gamma, gae_lambda, masked
    advantages = _scan(
        rewards, values, loss_mask, value_mask, cu_seqlens, *discount, returns=returns
    )
    return advantages, returns


def discounted_returns_fwd(
    rewards: torch.Tensor,
    loss_mask: torch.Tensor,
    reward_mask: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    gamma: float,
) -> torch.Tensor:
    """The advantages of rewards whose values are all 0."""
    rewards = rewards.float().contiguous()
    discount = gamma, 1.0, "identity"
    return _scan(rewards, None, loss_mask, reward_mask, cu_seqlens, *discount, returns=None)


def masked_moments_fwd(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    x, mask = x.float().contiguous(), mask.contiguous()
    moments = torch.empty(3, dtype=torch.float64)
    native.module().masked_moments(
        x=x.data_ptr(),
        mask=mask.data_ptr(),
        size=x.numel(),
        moments=moments.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return moments


def masked_whiten_fwd(
    x: torch.Tensor,
    mask: torch.Tensor,
    moments: torch.Tensor | None,
    shift_mean: bool,
    unbiased: bool,
) -> torch.Tensor:
    x, mask = x.float().contiguous(), mask.contiguous()
    moments = None if moments is None else moments.contiguous()
    out = _like(x)
    native.module().masked_whiten(
        x=x.data_ptr(),
        mask=mask.data_ptr(),
        size=x.numel(),
        moments=native.address(moments),
        num_parts=0 if moments is None else moments.shape[0],
        shift_mean=shift_mean,
        unbiased=unbiased,
        out=out.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return out


def rewards_to_advantages_fwd(
    scores: torch.Tensor,
    logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    values: torch.Tensor,
    loss_mask: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    *shaping_options, gamma, gae_lambda, masked, whiten, whiten_rewards, unbiased = options
    shaping = _Shaping(scores, logprobs, ref_logprobs, loss_mask, *shaping_options)
    (values,) = _floats(values=values)
    advantages, returns = _like(values), _like(values)
    native.module().rewards_to_advantages(
        shaping.struct,
        values=values.data_ptr(),
        gamma=gamma,
        gae_lambda=gae_lambda,
        carry=masked == "carry",
        whiten=whiten,
        whiten_rewards=whiten_rewards,
        unbiased=unbiased,
        advantages=advantages.data_ptr(),
        returns=returns.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return advantages, returns, shaping.rewards, shaping.kl

"""Launchers of the losses on the CPU: csrc/cpu/losses.h and pairwise_loss.h.

Each takes the arguments of its reference function and returns the same shapes and dtypes. Inputs
are read as contiguous float32 (bf16 and fp16 are converted first); gradients go back to the dtype
of their input, and are multiplied by their scales already, which are 1 then: not those of float16,
where a gradient divided by a million tokens is no normal number.
"""

from typing import Any

import torch

from fuserl_kernels import native
from fuserl_kernels.reference.pairwise import METRICS as PAIRWISE_METRICS
from fuserl_kernels.reference.policy import METRICS as POLICY_METRICS
from fuserl_kernels.reference.policy import split_choices
from fuserl_kernels.reference.sequences import compute_dtype
from fuserl_kernels.reference.value import METRICS as VALUE_METRICS

# Options that are words, and the module's enumeration of each.
_ENUMERATIONS = {
    "ratio_level": "Level",
    "clip": "Clip",
    "aggregation": "Aggregation",
    "kl_estimator": "KlEstimator",
    "correction": "Correction",
    "correction_level": "Level",
}


def _floats(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _number(denominator: torch.Tensor | None) -> float | None:
    return None if denominator is None else float(denominator)


def _empty_gradient(tensor: torch.Tensor | None, wanted: bool) -> torch.Tensor | None:
    if tensor is None or not wanted:
        return None
    return torch.empty(tensor.shape, dtype=torch.float32)


class _Policy:
    """The module's PolicyLoss, with the tensors that it points into."""

    def __init__(
        self,
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
    ) -> None:
        module = native.module()
        options, corrections, needs_grad = split_choices(choices)
        if advantages.dim() == 2 and advantages.stride(1) == 0 and advantages.shape[1] > 0:
            advantages = advantages[:, 0]  # one for each sequence, expanded
        if corrections.correction == "none":
            rollout_logprobs = None
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.long().contiguous()
        self.num_sequences = _num_sequences(loss_mask, cu_seqlens)
        self.new_logprobs, self.entropy = new_logprobs, entropy
        self.tensors = {
            "new_logprobs": _floats(new_logprobs),
            "logprobs": _floats(logprobs),
            "advantages": _floats(advantages),
            "loss_mask": loss_mask.contiguous(),
            "ref_logprobs": _floats(ref_logprobs),
            "entropy": _floats(entropy),
            "rollout_logprobs": _floats(rollout_logprobs),
            "grad_logprobs": _empty_gradient(new_logprobs, needs_grad),
            "grad_entropy": _empty_gradient(entropy, needs_grad),
        }
        chosen = options._asdict() | corrections._asdict()
        for name, kind in _ENUMERATIONS.items():
            chosen[name] = getattr(getattr(module, kind), chosen[name])
        self.task = module.PolicyLoss(
            **{name: native.address(tensor) for name, tensor in self.tensors.items()},
            sequence_advantages=advantages.shape != loss_mask.shape,
            denominator=_number(denominator),
            **chosen,
        )

    def has_float16(self) -> bool:
        sources = (self.new_logprobs, self.entropy)
        return any(tensor is not None and tensor.dtype == torch.float16 for tensor in sources)

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of new_logprobs and entropy, in their dtypes; [0] where not wanted."""
        return (
            _gradient(self.tensors["grad_logprobs"], self.new_logprobs, self.new_logprobs),
            _gradient(self.tensors["grad_entropy"], self.entropy, self.new_logprobs),
        )


class _Value:
    """The module's ValueLoss, with the tensors that it points into."""

    def __init__(
        self,
        new_values: torch.Tensor,
        values: torch.Tensor,
        returns: torch.Tensor,
        loss_mask: torch.Tensor,
        clip_range: float,
        coef: float,
        denominator: torch.Tensor | None,
        needs_grad: bool,
    ) -> None:
        self.new_values = new_values
        self.tensors = {
            "new_values": _floats(new_values),
            "values": _floats(values),
            "returns": _floats(returns),
            "loss_mask": loss_mask.contiguous(),
            "grad_values": _empty_gradient(new_values, needs_grad),
        }
        self.task = native.module().ValueLoss(
            **{name: native.address(tensor) for name, tensor in self.tensors.items()},
            clip_range=clip_range,
            coef=coef,
            denominator=_number(denominator),
        )

    def has_float16(self) -> bool:
        return self.new_values.dtype == torch.float16

    def gradient(self) -> torch.Tensor:
        return _gradient(self.tensors["grad_values"], self.new_values, self.new_values)


def _gradient(
    gradient: torch.Tensor | None, tensor: torch.Tensor | None, like: torch.Tensor
) -> torch.Tensor:
    if gradient is None or tensor is None:
        return like.new_empty(0)
    return gradient.to(tensor.dtype)


def _num_sequences(loss_mask: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:
    if cu_seqlens is not None:
        return cu_seqlens.shape[0] - 1
    return loss_mask.shape[0] if loss_mask.dim() == 2 else 0


def _run(
    policy: _Policy | None, value: _Value | None, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss, metrics and scales; the gradients are written into those of `policy` and `value`."""
    num_metrics = (len(POLICY_METRICS) if policy else 0) + (len(VALUE_METRICS) if value else 0)
    loss = torch.empty((), dtype=torch.float32)
    metrics = torch.empty(num_metrics, dtype=torch.float32)
    scales = torch.empty((policy is not None) + (value is not None), dtype=torch.float32)
    native.module().policy_and_value_losses(
        policy=policy.task if policy else None,
        value=value.task if value else None,
        num_tokens=num_tokens,
        num_sequences=policy.num_sequences if policy else 0,
        cu_seqlens=native.address(policy.cu_seqlens) if policy else 0,
        scale_gradients=not any(part.has_float16() for part in (policy, value) if part),
        loss=loss.data_ptr(),
        metrics=metrics.data_ptr(),
        scales=scales.data_ptr(),
        num_threads=torch.get_num_threads(),
    )
    return loss, metrics, scales


def policy_loss_native(*arguments: Any) -> tuple[torch.Tensor, ...]:
    policy = _Policy(*arguments)
    loss, metrics, scale = _run(policy, None, policy.new_logprobs.numel())
    return loss, metrics, scale, *policy.gradients()


def value_loss_native(
    new_values: torch.Tensor,
    values: torch.Tensor,
    returns: torch.Tensor,
    loss_mask: torch.Tensor,
    clip_range: float,
    denominator: torch.Tensor | None,
    needs_grad: bool,
) -> tuple[torch.Tensor, ...]:
    value = _Value(new_values, values, returns, loss_mask, clip_range, 1.0, denominator, needs_grad)
    loss, metrics, scale = _run(None, value, new_values.numel())
    return loss, metrics, scale, value.gradient()


def ppo_loss_native(
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
    policy = _Policy(new_logprobs, logprobs, advantages, loss_mask, *policy_arguments)
    value = _Value(
        new_values,
        values,
        returns,
        value_mask,
        value_clip_range,
        vf_coef,
        value_denominator,
        policy_arguments[-1],
    )
    loss, metrics, scales = _run(policy, value, new_logprobs.numel())
    return loss, metrics, scales, *policy.gradients(), value.gradient()


def pairwise_loss_native(
    chosen_scores: torch.Tensor,  # [N]
    rejected_scores: torch.Tensor,
    margin: torch.Tensor | None,  # [N] or 0-d
    center_coef: float,
    needs_grad: bool,
) -> tuple[torch.Tensor, ...]:
    """Everything is double until the end: there is little of it."""
    dtype = compute_dtype(chosen_scores, rejected_scores)
    chosen, rejected = chosen_scores.double().contiguous(), rejected_scores.double().contiguous()
    margins = None if margin is None else margin.double().contiguous()
    size = chosen.shape if needs_grad else (0,)
    loss, metrics = chosen.new_empty(()), chosen.new_empty(len(PAIRWISE_METRICS))
    grad_chosen, grad_rejected = chosen.new_empty(size), chosen.new_empty(size)
    native.module().pairwise_loss(
        chosen=chosen.data_ptr(),
        rejected=rejected.data_ptr(),
        margin=native.address(margins),
        shared_margin=margins is not None and margins.dim() == 0,
        center_coef=center_coef,
        num_pairs=chosen.shape[0],
        loss=loss.data_ptr(),
        metrics=metrics.data_ptr(),
        grad_chosen=grad_chosen.data_ptr() if needs_grad else 0,
        grad_rejected=grad_rejected.data_ptr() if needs_grad else 0,
    )
    return (
        loss.to(dtype),
        metrics.to(dtype),
        grad_chosen.to(chosen_scores.dtype),
        grad_rejected.to(rejected_scores.dtype),
    )

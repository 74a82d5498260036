"""Policy loss + vf_coef * value loss as one op, with all its gradients made in the forward pass."""

from typing import Any

import torch

from fuserl_kernels import checks
from fuserl_kernels.loss_gradients import fake_gradient, fake_loss, save_gradients, scaled_gradients
from fuserl_kernels.native_losses import ppo_loss_native
from fuserl_kernels.policy_options import (
    CORRECTION_SCHEMA,
    OPTIONS_SCHEMA,
    SAPO_TEMPERATURES,
    VESPO_GAMMA,
    check_entropy,
    check_layout,
    check_reference,
    checked_advantages,
    correction_options,
    policy_metrics,
    policy_options,
)
from fuserl_kernels.reference.policy import METRICS as POLICY_METRICS
from fuserl_kernels.reference.policy import CorrectionOptions, PolicyOptions, ppo_loss_fwd
from fuserl_kernels.reference.value import METRICS as VALUE_METRICS
from fuserl_kernels.registration import register
from fuserl_kernels.scalars import constant_like, denominator_tensor
from fuserl_kernels.triton_losses import ppo_loss_triton
from fuserl_kernels.value_loss import checked_clip_range

FORWARD = {"reference": ppo_loss_fwd, "native": ppo_loss_native, "triton": ppo_loss_triton}

_NEW_VALUES, _CU_SEQLENS, _ENTROPY = 3, 12, 14  # positions in the schema
_NUM_INPUTS = 16 + len(PolicyOptions._fields) + len(CorrectionOptions._fields) + 1


def _fake(*inputs: Any) -> tuple[torch.Tensor, ...]:
    new_logprobs, needs_grad = inputs[0], inputs[-1]
    loss, metrics = fake_loss(new_logprobs, len(POLICY_METRICS) + len(VALUE_METRICS))
    return (
        loss,
        metrics,
        loss.new_empty(2),
        fake_gradient(new_logprobs, needs_grad, new_logprobs),
        fake_gradient(inputs[_ENTROPY], needs_grad, new_logprobs),
        fake_gradient(inputs[_NEW_VALUES], needs_grad, inputs[_NEW_VALUES]),
    )


def _check_data(*inputs: Any) -> None:
    checks.cu_seqlens_data(inputs[_CU_SEQLENS], inputs[0].numel())


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    needs_grad = inputs[-1]
    made = (needs_grad, needs_grad and inputs[_ENTROPY] is not None, needs_grad)
    save_gradients(ctx, output, made)


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple:
    gradients: list[torch.Tensor | None] = [None] * _NUM_INPUTS
    scaled = scaled_gradients(ctx, grad_loss, (0, 0, 1))
    gradients[0], gradients[_ENTROPY], gradients[_NEW_VALUES] = scaled
    return tuple(gradients)


_op = register(
    "ppo_loss(Tensor new_logprobs, Tensor logprobs, Tensor advantages, Tensor new_values, "
    "Tensor values, Tensor returns, Tensor loss_mask, Tensor value_mask, float vf_coef, "
    "float value_clip_range, Tensor? value_denominator, Tensor? denominator, Tensor? cu_seqlens, "
    "Tensor? ref_logprobs, Tensor? entropy, Tensor? rollout_logprobs, "
    f"{OPTIONS_SCHEMA}, {CORRECTION_SCHEMA}, bool needs_grad) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    FORWARD,
    _fake,
    check=_check_data,
    setup_context=_setup_context,
    backward=_backward,
)


def ppo_loss(
    new_logprobs: torch.Tensor,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    new_values: torch.Tensor,
    values: torch.Tensor,
    returns: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    value_mask: torch.Tensor | None = None,
    vf_coef: float = 0.1,
    value_clip_range: float | None = 0.2,
    value_denominator: float | torch.Tensor | None = None,
    denominator: float | torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    rollout_logprobs: torch.Tensor | None = None,
    ratio_level: str = "token",
    clip: str = "ppo",
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    sapo_temperatures: tuple[float, float] = SAPO_TEMPERATURES,
    vespo_gamma: tuple[tuple[float, float], tuple[float, float]] = VESPO_GAMMA,
    log_ratio_clip: float | None = None,
    aggregation: str = "token_mean",
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_clip: float | None = None,
    entropy_coef: float = 0.0,
    correction: str = "none",
    correction_level: str = "token",
    correction_range: tuple[float, float] = (0.0, 3.0),
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """policy_loss(...) + vf_coef * value_loss(...) of one microbatch.

    Every tensor has the shape of new_logprobs ([B, T] or packed [N]); advantages may be [B].
    value_mask: slots of the value loss (default loss_mask); value_denominator: their count over the
        whole optimizer step; value_clip_range: None for no clipping.
    The other options are those of policy_loss.

    Returns the 0-d loss and the metrics of both losses; "num_tokens" counts loss_mask and
    "value/num_tokens" value_mask. Gradients reach new_logprobs, entropy and new_values.
    """
    checks.floating("new_logprobs", new_logprobs)
    checks.mask("loss_mask", loss_mask, "new_logprobs", new_logprobs)
    value_mask = loss_mask if value_mask is None else value_mask
    checks.mask("value_mask", value_mask, "new_logprobs", new_logprobs)
    checks.like("logprobs", logprobs, "new_logprobs", new_logprobs)
    checks.like("new_values", new_values, "new_logprobs", new_logprobs)
    checks.like("values", values, "new_logprobs", new_logprobs)
    checks.like("returns", returns, "new_logprobs", new_logprobs)
    checks.finite("vf_coef", vf_coef)
    options = policy_options(
        ratio_level,
        clip,
        clip_range,
        clip_range_high,
        dual_clip,
        sapo_temperatures,
        vespo_gamma,
        log_ratio_clip,
        aggregation,
        kl_coef,
        kl_estimator,
        kl_clip,
        entropy_coef,
    )
    corrections = correction_options(
        correction, correction_level, correction_range, clip, rollout_logprobs
    )
    check_layout(loss_mask, cu_seqlens, options, correction_level)
    check_reference(options, ref_logprobs)
    check_entropy(options, entropy, new_logprobs)
    loss, metrics, *_ = _op(
        new_logprobs,
        checks.detached(logprobs),
        checked_advantages(advantages, loss_mask, cu_seqlens),
        new_values,
        checks.detached(values),
        checks.detached(returns),
        loss_mask,
        value_mask,
        float(vf_coef),
        checked_clip_range("value_clip_range", value_clip_range),
        denominator_tensor("value_denominator", value_denominator, new_logprobs),
        denominator_tensor("denominator", denominator, new_logprobs),
        cu_seqlens,
        constant_like("ref_logprobs", ref_logprobs, "new_logprobs", new_logprobs),
        entropy,
        constant_like("rollout_logprobs", rollout_logprobs, "new_logprobs", new_logprobs),
        *options,
        *corrections,
        checks.wants_grad(new_logprobs, entropy, new_values),
    )
    named = policy_metrics(
        metrics[: len(POLICY_METRICS)],
        ref_logprobs is not None,
        entropy is not None,
        correction != "none",
    )
    values_part = metrics[len(POLICY_METRICS) :]
    return loss, named | dict(zip(VALUE_METRICS, values_part.unbind(), strict=True))

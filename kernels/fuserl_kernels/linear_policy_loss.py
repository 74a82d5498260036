"""Policy loss straight from hidden states: linear_token_logprobs and policy_loss as one op.

The gradients of hidden, weight and bias are made in the forward pass, chunk by chunk, so that with
a token-level ratio no logits are computed twice (6 N D V flops). Formulas: reference/policy.py.
"""

import functools
from typing import Any

import torch

from fuserl_kernels import checks
from fuserl_kernels.linear_token_logprobs import check_projection, fake_gradients
from fuserl_kernels.policy_loss import (
    OPTIONS_SCHEMA,
    check_layout,
    check_reference,
    constant_like,
    denominator_tensor,
    fake_loss,
    policy_metrics,
    policy_options,
    save_gradients,
    scaled_gradients,
    token_advantages,
)
from fuserl_kernels.reference.logprobs import ROWS
from fuserl_kernels.reference.policy import METRICS, PolicyOptions, linear_policy_loss_fwd
from fuserl_kernels.registration import register
from fuserl_kernels.token_logprobs import NATIVE_ROWS

FORWARD = {
    "reference": functools.partial(linear_policy_loss_fwd, ROWS),
    "native": functools.partial(linear_policy_loss_fwd, NATIVE_ROWS),
}

_CU_SEQLENS = 11  # position in the schema
_NUM_INPUTS = 13 + len(PolicyOptions._fields) + 3


def _fake(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, ...]:
    wide = weight if weight.dtype == torch.float64 else hidden
    return (
        *fake_loss(wide, len(METRICS)),
        *fake_gradients(hidden, weight, bias, *rest[-3:]),
    )


def _check_data(*inputs: Any) -> None:
    weight, token_ids, loss_mask, temperatures = inputs[1], inputs[3], inputs[6], inputs[7]
    flat_mask = loss_mask.reshape(-1)
    checks.token_ids_data(token_ids, weight.shape[0], flat_mask)
    checks.temperature_data(temperatures, flat_mask)
    checks.cu_seqlens_data(inputs[_CU_SEQLENS], loss_mask.numel())


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    save_gradients(ctx, output)
    ctx.made = inputs[-3:]


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple:
    return (*scaled_gradients(ctx, grad_loss), *[None] * (_NUM_INPUTS - 3))


_op = register(
    "linear_policy_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, "
    "Tensor logprobs, Tensor advantages, Tensor loss_mask, Tensor? temperatures, "
    "float temperature, float softcap, Tensor? denominator, Tensor? cu_seqlens, "
    f"Tensor? ref_logprobs, {OPTIONS_SCHEMA}, bool needs_hidden, bool needs_weight, "
    "bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    FORWARD,
    _fake,
    check=_check_data,
    setup_context=_setup_context,
    backward=_backward,
)


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    token_ids: torch.Tensor,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    denominator: float | torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    ratio_level: str = "token",
    clip: str = "ppo",
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    aggregation: str = "token_mean",
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy_coef: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """policy_loss of linear_token_logprobs(hidden, weight, token_ids), with equal gradients.

    hidden: [B, T, D], or packed [N, D]; token_ids, logprobs, loss_mask and the rest: [B, T] or [N].
    bias, temperature, softcap: as in linear_token_logprobs. The other options are those of
    policy_loss; the entropy of entropy_coef is computed inside, and is always among the metrics.

    Returns the 0-d loss and the metrics of policy_loss. Gradients reach hidden, weight and bias;
    they are held from forward to backward in the dtypes of their inputs.
    """
    check_projection(hidden, weight, bias, token_ids, softcap)
    temperatures, number = checks.temperature(temperature, token_ids)
    checks.mask("loss_mask", loss_mask, "token_ids", token_ids)
    checks.like("logprobs", logprobs, "token_ids", token_ids)
    options = policy_options(
        ratio_level,
        clip,
        clip_range,
        clip_range_high,
        dual_clip,
        aggregation,
        kl_coef,
        kl_estimator,
        entropy_coef,
    )
    check_layout(loss_mask, cu_seqlens, options)
    check_reference(options, ref_logprobs)
    loss, metrics, *_ = _op(
        hidden.reshape(token_ids.numel(), hidden.shape[-1]),
        weight,
        bias,
        token_ids.reshape(-1).long(),
        checks.detached(logprobs),
        token_advantages(advantages, loss_mask, cu_seqlens),
        loss_mask,
        temperatures,
        number,
        softcap or 0.0,
        denominator_tensor("denominator", denominator, hidden),
        cu_seqlens,
        constant_like("ref_logprobs", ref_logprobs, "token_ids", token_ids),
        *options,
        checks.wants_grad(hidden),
        checks.wants_grad(weight),
        checks.wants_grad(bias),
    )
    return loss, policy_metrics(metrics, ref_logprobs is not None, True)

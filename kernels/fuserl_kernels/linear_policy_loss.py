"""Policy loss straight from hidden states: linear_token_logprobs and policy_loss as one op.

    policy_loss(linear_token_logprobs(hidden, weight, token_ids, ...), logprobs, advantages, ...)

The gradients of hidden, weight and bias are made in the forward pass: each chunk of logits turns
into its gradient at once and no logits are computed twice (6 N D V flops). With a token-level ratio
a row needs nothing from other rows but its weight in the mean. With a sequence-level ratio chunks
end where sequences end; only a sequence longer than a chunk is computed twice (8 N D V). Formulas:
reference/policy.py.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from fuserl_kernels import checks
from fuserl_kernels.linear_token_logprobs import FORWARD as LINEAR_FORWARD
from fuserl_kernels.linear_token_logprobs import (
    KERNELS,
    check_projection,
    empty_gradients,
    gradient_dtype,
    takes_wide_gradient,
)
from fuserl_kernels.loss_gradients import fake_loss, save_gradients
from fuserl_kernels.policy_options import (
    OPTIONS_SCHEMA,
    SAPO_TEMPERATURES,
    VESPO_GAMMA,
    check_layout,
    check_reference,
    checked_advantages,
    correction_options,
    policy_metrics,
    policy_options,
)
from fuserl_kernels.projection import Kernels, Projection
from fuserl_kernels.reference.policy import (
    LOG_RATIO,
    METRICS,
    CorrectionOptions,
    PolicyOptions,
    aggregation_weights,
    correction_weights,
    log_ratio_range,
    policy_gradient,
    policy_loss_fwd,
)
from fuserl_kernels.reference.sequences import compute_dtype, sequence_sum, spread
from fuserl_kernels.registration import not_twice, register
from fuserl_kernels.scalars import constant_like, denominator_tensor
from fuserl_kernels.triton_policy_rows import policy_rows_triton

# The advantages come in corrected.
_UNCORRECTED = CorrectionOptions("none", "token", 0.0, 0.0)

# --- by chunks of rows: any implementation of token_logprobs' rows


class _Implementation(NamedTuple):
    """What one entry of the op's table is made of."""

    kernels: Kernels
    forward: Callable  # linear_token_logprobs, for a call without gradients
    policy_rows: Callable | None  # forward and backward of a chunk in one launch


class _PerToken(NamedTuple):
    """What the loss knows of each token, [N], but the new log-probability."""

    logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    ref_logprobs: torch.Tensor | None

    def at(self, projection: Projection, rows: slice) -> "_PerToken":
        return _PerToken(
            projection.take(self.logprobs, rows),
            projection.take(self.advantages, rows),
            projection.take(self.weights, rows),
            projection.take_optional(self.ref_logprobs, rows),
        )


class _Rows:
    """The rows that train, computed unit by unit: a chunk, or a sequence longer than one."""

    def __init__(
        self,
        kernels: Kernels,
        projection: Projection,
        token_ids: torch.Tensor,
        temperatures: torch.Tensor | None,
        temperature: float,
        softcap: float,
    ) -> None:
        self._kernels, self._projection = kernels, projection
        self._token_ids, self._temperatures = token_ids, temperatures
        self._numbers = (temperature, softcap)
        num_rows, dtype = token_ids.shape[0], compute_dtype(projection.weight)
        self.logprobs = projection.weight.new_zeros(num_rows, dtype=dtype)
        self.entropy = torch.zeros_like(self.logprobs)
        self._stats = self.logprobs.new_zeros(2, num_rows)

    def _arguments(self, rows: slice) -> tuple:
        return (
            self._projection.take(self._token_ids, rows),
            self._projection.take_optional(self._temperatures, rows),
            *self._numbers,
        )

    def _put(self, rows: slice, logprobs: torch.Tensor, entropy: torch.Tensor) -> None:
        self._projection.put(self.logprobs, rows, logprobs)
        self._projection.put(self.entropy, rows, entropy)

    def in_one_pass(
        self, rows: slice, policy_rows: Callable, per_token: _PerToken, options: PolicyOptions
    ) -> None:
        """Forward and backward of a chunk whose rows need nothing from each other."""
        logits = self._projection.logits(rows)
        gradient = self._projection.gradient_over(logits)
        self._put(rows, *policy_rows(logits, *self._arguments(rows), *per_token, options, gradient))
        self._projection.backward(rows, gradient)

    def forward(self, rows: slice) -> torch.Tensor:
        """Fill in the rows' log-probabilities and entropies; returns their logits."""
        logits = self._projection.logits(rows)
        logprobs, entropy, stats = self._kernels.forward(logits, *self._arguments(rows), None, True)
        self._put(rows, logprobs, entropy)
        self._projection.put(self._stats, rows, stats)
        return logits

    def backward(
        self,
        rows: slice,
        logits: torch.Tensor,
        grad_logprobs: torch.Tensor,
        grad_entropy: torch.Tensor | None,
    ) -> None:
        projection = self._projection
        gradient = self._kernels.backward(
            logits,
            *self._arguments(rows),
            None,
            projection.take(self._stats.t(), rows).t(),
            projection.take(self.entropy, rows),
            grad_logprobs,
            grad_entropy,
            projection.gradient_over(logits),
        )
        projection.backward(rows, gradient)


def _units(lengths: list[int], capacity: int) -> list[list[int]]:
    """Runs of whole sequences that fit a chunk together; one too long for it is alone."""
    units: list[list[int]] = []
    room = 0
    for length in lengths:
        if length == 0:
            continue
        if length > room:
            units.append([])
            room = capacity
        units[-1].append(length)
        room -= length
    return units


def forward_by_chunks(
    implementation: _Implementation,
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,  # [N]
    logprobs: torch.Tensor,  # [B, T] with B * T = N, or packed [N]
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    temperatures: torch.Tensor | None,  # [N]
    temperature: float,
    softcap: float,
    denominator: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    ref_logprobs: torch.Tensor | None,
    *choices: Any,
    weight_total: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """choices: the fields of PolicyOptions, then needs_hidden, needs_weight, needs_bias and
    wide_weight_grad.

    Returns loss, metrics in the order of METRICS and LOG_RATIO, and the gradients of hidden, weight
    and bias ([0] where not needed). The weight's is added to weight_total instead, if that is
    given."""
    options = PolicyOptions(*choices[:-4])
    needs_hidden, needs_weight, needs_bias, wide_weight_grad = choices[-4:]
    projected = (hidden, weight, bias, token_ids, temperatures, temperature, softcap)
    flat_mask = loss_mask.reshape(-1)
    if needs_hidden or needs_weight or needs_bias or weight_total is not None:
        weights = aggregation_weights(
            loss_mask, cu_seqlens, options.aggregation, denominator, compute_dtype(weight)
        )
        per_token = _PerToken(
            logprobs.reshape(-1),
            advantages.reshape(-1),
            weights.reshape(-1),
            None if ref_logprobs is None else ref_logprobs.reshape(-1),
        )
        lengths = None
        if options.ratio_level != "token":
            lengths = sequence_sum(loss_mask.long(), cu_seqlens).tolist()
        projection = Projection(
            implementation.kernels, hidden, weight, bias, flat_mask.nonzero().squeeze(-1)
        )
        projection.want_gradients(needs_hidden, needs_weight, needs_bias, weight_total)
        rows = _Rows(implementation.kernels, projection, *projected[3:])
        _make_gradients(
            rows,
            projection,
            implementation.policy_rows,
            per_token,
            lengths,
            options,
        )
        new, entropy = rows.logprobs, rows.entropy
        gradients = projection.gradients(gradient_dtype(weight, wide_weight_grad))
    else:
        new, entropy, _ = implementation.forward(*projected, flat_mask, True)
        gradients = empty_gradients(hidden, weight, bias, False, False, False, wide_weight_grad)

    new = new.view(loss_mask.shape)
    loss, metrics, *_ = policy_loss_fwd(
        new,
        logprobs,
        advantages,
        loss_mask,
        denominator,
        cu_seqlens,
        ref_logprobs,
        entropy.view(loss_mask.shape),
        None,
        *options,
        *_UNCORRECTED,
        False,
    )
    metrics = torch.cat([metrics, log_ratio_range(new, logprobs, loss_mask)])
    return loss, metrics, *gradients


def _make_gradients(
    rows_of: _Rows,
    projection: Projection,
    policy_rows: Callable | None,
    per_token: _PerToken,
    lengths: list[int] | None,  # of the sequences, where the ratio is theirs
    options: PolicyOptions,
) -> None:
    """Fill rows_of, and projection with the gradients."""
    if lengths is None:
        units = [[rows.stop - rows.start] for rows in projection.slices(0, projection.num_rows)]
    else:
        units = _units(lengths, projection.capacity)
    start = 0
    for unit_lengths in units:
        unit = slice(start, start + sum(unit_lengths))
        start = unit.stop
        of_unit = per_token.at(projection, unit)
        if policy_rows is not None and lengths is None:
            rows_of.in_one_pass(unit, policy_rows, of_unit, options)
            continue
        chunks = projection.slices(unit.start, unit.stop)
        for rows in chunks:
            logits = rows_of.forward(rows)
        ends = None
        if lengths is not None:
            ends = torch.tensor([0, *unit_lengths], device=logits.device).cumsum(0)
        grad_logprobs, grad_entropy = policy_gradient(
            projection.take(rows_of.logprobs, unit), *of_unit, ends, options
        )
        for rows in chunks:
            if len(chunks) > 1:
                logits = projection.logits(rows)
            here = slice(rows.start - unit.start, rows.stop - unit.start)
            rows_of.backward(
                rows,
                logits,
                grad_logprobs[here],
                None if grad_entropy is None else grad_entropy[here],
            )


# --- the op

_POLICY_ROWS = {"triton": policy_rows_triton}
FORWARD = {
    name: functools.partial(
        forward_by_chunks,
        _Implementation(kernels, LINEAR_FORWARD[name], _POLICY_ROWS.get(name)),
    )
    for name, kernels in KERNELS.items()
}

_CU_SEQLENS = 11  # position in the schema
_NUM_INPUTS = 13 + len(PolicyOptions._fields) + 4


def _fake(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor, ...]:
    wide = weight if weight.dtype == torch.float64 else hidden
    return (
        *fake_loss(wide, len(METRICS) + len(LOG_RATIO)),
        *empty_gradients(hidden, weight, bias, *rest[-4:]),
    )


def _check_data(*inputs: Any) -> None:
    weight, token_ids, loss_mask, temperatures = inputs[1], inputs[3], inputs[6], inputs[7]
    flat_mask = loss_mask.reshape(-1)
    checks.token_ids_data(token_ids, weight.shape[0], flat_mask)
    checks.temperature_data(temperatures, flat_mask)
    checks.cu_seqlens_data(inputs[_CU_SEQLENS], loss_mask.numel())


def _hand_out(ctx: Any, grad_loss: torch.Tensor | None) -> list[torch.Tensor | None]:
    """The saved gradients times that of the loss, scaled where they lie: a copy would be as large
    as the weight. So they can be handed out once."""
    if ctx.handed_out:
        raise RuntimeError(
            "linear_policy_loss hands out its gradients once; call it again for a second backward"
        )

    def scaled(gradient: torch.Tensor, loss_gradient: torch.Tensor) -> torch.Tensor:
        # Another type is a tracer's, whose compiler plans the memory itself and forbids this.
        if type(gradient) is torch.Tensor:
            if torch.is_grad_enabled():  # create_graph
                not_twice(ctx)
            ctx.handed_out = True
            return gradient.mul_(loss_gradient)
        return gradient * loss_gradient

    if grad_loss is None:
        return [None] * len(ctx.made)
    gradients = zip(ctx.saved_tensors, ctx.made, strict=True)
    return [scaled(g, grad_loss) if made else None for g, made in gradients]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    save_gradients(ctx, output, inputs[-4:-1])
    ctx.handed_out = False


def _backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple:
    return (*_hand_out(ctx, grad_loss), *[None] * (_NUM_INPUTS - 3))


_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids, "
    "Tensor logprobs, Tensor advantages, Tensor loss_mask, Tensor? temperatures, "
    "float temperature, float softcap, Tensor? denominator, Tensor? cu_seqlens, "
    f"Tensor? ref_logprobs, {OPTIONS_SCHEMA}, bool needs_hidden, bool needs_weight, "
    "bool needs_bias, bool wide_weight_grad"
)
_op = register(
    f"linear_policy_loss({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    FORWARD,
    _fake,
    check=_check_data,
    setup_context=_setup_context,
    backward=_backward,
)


def _into_total(implementation: Any) -> Any:
    def run(*arguments: Any) -> tuple[torch.Tensor, ...]:
        *inputs, weight_total = arguments
        loss, metrics, grad_hidden, _, grad_bias = implementation(
            *inputs, weight_total=weight_total
        )
        return loss, metrics, grad_hidden, grad_bias

    return run


def _fake_into_total(*inputs: Any) -> tuple[torch.Tensor, ...]:
    loss, metrics, grad_hidden, _, grad_bias = _fake(*inputs[:-1])
    return loss, metrics, grad_hidden, grad_bias


_op_into_total = register(
    f"linear_policy_loss_({_INPUTS}, Tensor(a!) weight_total) -> (Tensor, Tensor, Tensor, Tensor)",
    {name: _into_total(function) for name, function in FORWARD.items()},
    _fake_into_total,
    check=lambda *inputs: _check_data(*inputs[:-1]),
)


class _AccumulatedLoss(torch.autograd.Function):
    """The same op with the weight's gradient added to a tensor of the caller's in forward."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple:
        output = _op_into_total(*inputs)
        save_gradients(ctx, output, (inputs[-5], inputs[-3]))
        ctx.handed_out = False
        return output[:2]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor | None, _: Any) -> tuple:
        if grad_loss is not None:
            torch._assert_async(
                grad_loss == 1,
                "with weight_grad the weight's gradient is added in the forward pass, so the loss "
                "must be differentiated as it is: scale it by denominator instead",
            )
        grad_hidden, grad_bias = _hand_out(ctx, grad_loss)
        return (grad_hidden, None, grad_bias, *[None] * (_NUM_INPUTS - 2))


# --- public


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
    weight_grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """policy_loss of linear_token_logprobs(hidden, weight, token_ids), with equal gradients.

    hidden: [B, T, D], or packed [N, D]; token_ids, logprobs, loss_mask and the rest: [B, T] or [N].
    bias, temperature, softcap: as in linear_token_logprobs. The other options are those of
    policy_loss; the entropy of entropy_coef is computed inside, and is always among the metrics.
    weight_grad: float32 [V, D], to which the weight's gradient is added in the forward pass
        (unless grad mode is off), instead of one handed to autograd: microbatches then share one
        float32 sum. Whether the weight requires a gradient does not matter. The loss must then be
        differentiated as it is, not scaled, and not be computed again by activation checkpointing,
        which would add twice.

    Returns the 0-d loss and the metrics of policy_loss, and of the log-ratio of each trained token
    "log_ratio/abs" (mean of the absolute value), "log_ratio/min" and "log_ratio/max". Gradients
    reach hidden, weight and bias; they are held from forward to backward in the dtypes of their
    inputs (the weight's in float32 if weight.grad_dtype says so), and handed out once: a second
    backward raises.
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
    logprobs = checks.detached(logprobs)
    advantages = checked_advantages(advantages, loss_mask, cu_seqlens)
    if loss_mask.device.type == "cpu" and not torch.compiler.is_compiling():
        checks.cu_seqlens_data(cu_seqlens, loss_mask.numel())  # before they are followed below
    if advantages.shape != loss_mask.shape:
        advantages = spread(advantages, loss_mask, cu_seqlens)
    corrected = None
    rollout_logprobs = constant_like("rollout_logprobs", rollout_logprobs, "token_ids", token_ids)
    if rollout_logprobs is not None:
        factors, corrected = correction_weights(
            logprobs, rollout_logprobs, loss_mask, cu_seqlens, corrections
        )
        advantages = advantages * factors
    inputs = (
        hidden.reshape(token_ids.numel(), hidden.shape[-1]),
        weight,
        bias,
        token_ids.reshape(-1).long(),
        logprobs,
        advantages,
        loss_mask,
        temperatures,
        number,
        softcap or 0.0,
        denominator_tensor("denominator", denominator, hidden),
        cu_seqlens,
        constant_like("ref_logprobs", ref_logprobs, "token_ids", token_ids),
        *options,
        checks.wants_grad(hidden),
        checks.wants_grad(weight) and weight_grad is None,
        checks.wants_grad(bias),
        takes_wide_gradient(weight),
    )
    if weight_grad is not None:
        _check_weight_grad(weight_grad, weight)
    if weight_grad is not None and torch.is_grad_enabled():
        loss, metrics = _AccumulatedLoss.apply(*inputs, weight_grad)
    else:
        loss, metrics, *_ = _op(*inputs)
    named = policy_metrics(metrics[: len(METRICS)], ref_logprobs is not None, True)
    named |= zip(LOG_RATIO, metrics[len(METRICS) :].unbind(), strict=True)
    if corrected is not None:
        num_tokens = loss_mask.sum().clamp(min=1)
        named["correction/weight"] = torch.where(loss_mask, factors, 0).sum() / num_tokens
        named["correction/clipfrac"] = (corrected & loss_mask).sum() / num_tokens
    return loss, named


def _check_weight_grad(weight_grad: torch.Tensor, weight: torch.Tensor) -> None:
    checks.like("weight_grad", weight_grad, "weight", weight)
    if weight_grad.dtype != compute_dtype(weight):
        raise ValueError(f"weight_grad must be {compute_dtype(weight)}, not {weight_grad.dtype}")
    if weight_grad.requires_grad or not weight_grad.is_contiguous():
        raise ValueError("weight_grad must be contiguous and require no gradient of its own")

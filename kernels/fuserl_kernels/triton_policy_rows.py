"""The rows of linear_policy_loss in one launch: statistics, token-level policy loss, gradient.

For each row of logits [n, V] the kernel reads the row once for its statistics, makes the row's
gradients to log-probability and entropy from the scalars of the token (formulas:
reference/policy.py, reference/rewards.py), and reads it a second time to write the gradient of the
logits. A persistent grid keeps few rows in flight: 132 rows of 128256 bf16 logits are 34 MB, which
an H200's 50 MB L2 holds, so that device memory sees the row read once and written once. The first
walk goes down the row and the second goes up, which starts where the cache is warmest.

Statistics and log-probability have the bits of token_logprobs' Triton kernel: one device function.
"""

import math

import torch

from fuserl_kernels.reference.policy import PolicyOptions
from fuserl_kernels.triton_helpers import (
    LOG2E,
    _row_statistics,
    _store_gradient,
    _token_logprob,
    overlays,
)
from fuserl_kernels.triton_kl import _kl_slope
from fuserl_kernels.triton_policy_terms import _surrogate
from fuserl_kernels.triton_runtime import (
    TUNING_ROWS,
    Configuration,
    fastest,
    num_processors,
    tl,
    triton,
)


@triton.jit(do_not_specialize=["num_rows"])
def _policy_rows_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,
    token_ids_ptr,
    temperatures_ptr,  # or None for the number
    logprobs_ptr,
    advantages_ptr,
    weights_ptr,
    ref_logprobs_ptr,  # or None
    new_logprobs_ptr,
    entropy_ptr,
    out_ptr,
    num_rows,
    vocab_size,
    row_stride,
    col_stride,
    out_row_stride,
    out_col_stride,
    temperature,
    softcap,
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
    SOFTCAP: tl.constexpr,
    CLIP: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    BONUS: tl.constexpr,
    OVERLAY: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS_IN_FLIGHT: tl.constexpr,  # programs a multiprocessor: read by the grid
):
    for row in range(tl.program_id(0).to(tl.int64), num_rows, tl.num_programs(0)):
        if temperatures_ptr is not None:
            row_temperature = tl.load(temperatures_ptr + row)
        else:
            row_temperature = temperature
        row_ptr = logits_ptr + row * row_stride
        token_id = tl.load(token_ids_ptr + row)
        row_max, log_sum, entropy = _row_statistics(
            row_ptr, col_stride, vocab_size, LOG2E / row_temperature, softcap,
            SOFTCAP, True, STAGES,
        )  # fmt: skip
        new_logprob = _token_logprob(
            row_ptr, col_stride, vocab_size, token_id, row_max, log_sum, row_temperature, softcap,
            SOFTCAP,
        )  # fmt: skip
        tl.store(new_logprobs_ptr + row, new_logprob)
        tl.store(entropy_ptr + row, entropy)
        weight = tl.load(weights_ptr + row)
        log_ratio = new_logprob - tl.load(logprobs_ptr + row)
        _, slope, _, _ = _surrogate(
            new_logprob, log_ratio, tl.load(advantages_ptr + row), ratio_low, ratio_high, dual_clip,
            gate_pos, gate_neg, gate_rate_pos, gate_rate_neg, log_ratio_clip, CLIP,
        )  # fmt: skip
        g = weight * slope
        if ref_logprobs_ptr is not None:
            d = new_logprob - tl.load(ref_logprobs_ptr + row)
            kl_slope = _kl_slope(d, kl_clip, ESTIMATOR)
            g += kl_coef * weight * kl_slope
        h = -entropy_coef * weight
        # Every thread has read the row, the token's logit too, before any of it is overwritten.
        tl.debug_barrier()
        _store_gradient(
            row_ptr, col_stride, out_ptr + row * out_row_stride, out_col_stride, vocab_size,
            token_id, row_max, log_sum, entropy, -g, -g, h, row_temperature, softcap,
            SOFTCAP, BONUS, OVERLAY, BLOCK_V, STAGES,
        )  # fmt: skip


# One row a multiprocessor keeps the rows in flight within L2; two hide more latency.
POLICY_CONFIGURATIONS = [
    Configuration(warps, 3, {"BLOCK_V": 4096, "STAGES": stages, "ROWS_IN_FLIGHT": rows})
    for warps, stages, rows in ((8, 3, 1), (8, 2, 2), (8, 1, 2))
]


def policy_rows_triton(
    logits: torch.Tensor,
    token_ids: torch.Tensor,
    temperatures: torch.Tensor | None,
    temperature: float,
    softcap: float,
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    options: PolicyOptions,
    out: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New log-probabilities and entropy [n] fp32; the gradient of the logits goes to `out` [n, V].

    logits: [n, V] fp32, bf16 or fp16, any strides, every row trained. The other tensors are [n].
    weights: w_t of reference/policy.py. out: as in backward_triton, perhaps the logits themselves.
    options: those of the loss; kl_coef and entropy_coef count inside the loss.
    Raises ValueError for a ratio level other than "token", where rows depend on each other.
    """
    if options.ratio_level != "token":
        raise ValueError(f"ratio_level must be token for one pass, not {options.ratio_level!r}")
    num_rows, vocab_size = logits.shape
    new_logprobs = logits.new_empty(num_rows, dtype=torch.float32)
    entropy = torch.empty_like(new_logprobs)
    if num_rows == 0:
        return new_logprobs, entropy
    with_reference = ref_logprobs is not None and options.kl_coef != 0.0
    rows = [logprobs, advantages, weights, ref_logprobs if with_reference else None]
    tensors = (
        logits,
        token_ids.contiguous(),
        None if temperatures is None else temperatures.float().contiguous(),
        *(None if row is None else row.float().contiguous() for row in rows),
        new_logprobs,
        entropy,
    )
    numbers = (
        temperature,
        softcap,
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
    )
    flags = (
        softcap != 0.0,
        options.clip,
        options.kl_estimator,
        options.entropy_coef != 0.0,
        overlays(out, logits),
    )

    def launch(configuration: Configuration, into: torch.Tensor) -> None:
        programs = num_processors(logits.device) * configuration.constants["ROWS_IN_FLIGHT"]
        _policy_rows_kernel[(min(into.shape[0], programs),)](
            *tensors,
            into,
            into.shape[0],
            vocab_size,
            *logits.stride(),
            *into.stride(),
            *numbers,
            *flags,
            **configuration.arguments(),
        )

    def measure(configuration: Configuration) -> None:
        launch(configuration, out.new_empty(tuning_rows, vocab_size))

    tuning_rows = min(num_rows, TUNING_ROWS)
    key = ("policy_rows", logits.device, logits.dtype, out.dtype, tuning_rows.bit_length())
    launch(fastest((*key, vocab_size, flags), POLICY_CONFIGURATIONS, measure), out)
    return new_logprobs, entropy

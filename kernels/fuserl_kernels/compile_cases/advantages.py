"""Cases of the kernels from scores to advantages. Sizes of the floors: B = 512, T = 1024."""

from collections.abc import Iterator
from typing import Any

from fuserl_kernels import triton_advantages as scan
from fuserl_kernels import triton_rewards as rewards
from fuserl_kernels import triton_rewards_to_advantages as whole
from fuserl_kernels import triton_whitening as whitening
from fuserl_kernels.compile_cases.case import ITEM_BYTES, Case, arguments_of
from fuserl_kernels.triton_runtime import Configuration

_NUM_TOKENS = 512 * 1024
_MASKS = ("mask_ptr", "loss_mask_ptr", "value_mask_ptr", "has_eos_ptr")
_TYPES: dict[str, Any] = {
    **dict.fromkeys(_MASKS, "*i1:16"),
    **dict.fromkeys(("moments_ptr", "sums_ptr", "parts_ptr"), "*fp64:16"),
    **dict.fromkeys(("decay", "value_weight", "kl_coef_number"), "fp64"),
    **dict.fromkeys(("kl_clip", "score_clip", "score_scale", "penalty"), "fp32"),
    **dict.fromkeys(("num_rows", "num_parts", "num_blocks", "num_tokens", "max_slot"), "i32"),
    "part_stride": 1,
}


def _case(
    op: str,
    variant: str,
    target: str,
    function: Any,
    configuration: Configuration,
    given: dict[str, Any],
    bytes_a_token: int,
) -> Case:
    types = {name: _TYPES[name] for name in function.arg_names if name in _TYPES}
    arguments = arguments_of(function, types | given)
    num_bytes = _NUM_TOKENS * bytes_a_token
    # ptxas gives up a few registers of a scan where that fits one more block.
    spill = 32 if "decay" in function.arg_names else 0
    return Case(op, variant, target, function, configuration, arguments, 8, spill, num_bytes)


def _inputs(dtype: str, *names: str) -> dict[str, Any]:
    return {f"{name}_ptr": f"*{dtype}:16" for name in names}


def _kl_penalty(target: str) -> Iterator[Case]:
    for dtype in ("bf16", "fp32"):
        item = ITEM_BYTES[dtype]
        inputs = _inputs(dtype, "logprobs", "ref_logprobs")
        gradients = _inputs(dtype, "grad_logprobs", "grad_ref_logprobs")
        for estimator in ("k1", "k3"):
            given = inputs | {"ESTIMATOR": estimator}
            yield _case(
                "kl_penalty", f"{dtype} {estimator}", target, rewards._kl_kernel,
                rewards.KL_CONFIGURATION, given, 2 * item + 4,
            )  # fmt: skip
            yield _case(
                "kl_penalty_bwd", f"{dtype} {estimator}", target, rewards._kl_bwd_kernel,
                rewards.KL_CONFIGURATION, given | gradients | {"grad_step": 1}, 4 * item + 4,
            )  # fmt: skip


_PLAIN: dict[str, Any] = {
    "ESTIMATOR": "k1",
    "SCORE_SLOT": "last",
    "MISSING_EOS": "",
    "has_eos_ptr": None,
    "kl_coefs_ptr": None,
    "CARRY": False,
    "UNBIASED": False,
    "PARTS": whitening.MAX_PARTS,
}
_FULL = _PLAIN | {
    "ESTIMATOR": "k3",
    "SCORE_SLOT": "after",
    "MISSING_EOS": "replace",
    "has_eos_ptr": "*i1:16",
    "kl_coefs_ptr": "*fp32:16",
    "CARRY": True,
    "UNBIASED": True,
}
_TOKEN_SCORES = _PLAIN | {"ESTIMATOR": "k2", "SCORE_SLOT": "token"}
_ODD = {"row_length": "i32"}


def _shape_rewards(target: str) -> Iterator[Case]:
    for configuration in rewards.BLOCKS:
        for variant, dtype, given in (
            ("fp32", "fp32", _PLAIN),
            ("bf16 all options", "bf16", _FULL | _ODD),
            ("fp32 token scores", "fp32", _TOKEN_SCORES),
        ):
            inputs = _inputs(dtype, "scores", "logprobs", "ref_logprobs")
            yield _case(
                "shape_rewards", variant, target, rewards._shape_kernel, configuration,
                inputs | given, 2 * ITEM_BYTES[dtype] + 1 + 8,
            )  # fmt: skip


def _gae(target: str) -> Iterator[Case]:
    padded: dict[str, Any] = {"cu_seqlens_ptr": None, "CARRY": False}
    packed: dict[str, Any] = {"CARRY": False}
    no_values: dict[str, Any] = {"values_ptr": None, "advantages_ptr": None}
    for configuration in rewards.BLOCKS:
        for op, variant, dtype, given, num_bytes in (
            ("gae", "fp32", "fp32", padded, 18),
            ("gae", "fp32 carry", "fp32", padded | _ODD | {"CARRY": True}, 18),
            ("gae", "bf16 packed", "bf16", packed | {"cu_seqlens_ptr": "*i32:16"}, 14),
            ("gae", "fp32 packed int64", "fp32", packed | {"cu_seqlens_ptr": "*i64:16"}, 18),
            ("discounted_returns", "fp32", "fp32", padded | no_values, 10),
        ):
            inputs = _inputs(dtype, "rewards", "values")
            yield _case(
                op, variant, target, scan._gae_kernel, configuration, inputs | given, num_bytes
            )


def _rewards_to_advantages(target: str) -> Iterator[Case]:
    op = "rewards_to_advantages"
    for configuration in rewards.BLOCKS:
        for variant, dtype, given in (
            ("fp32", "fp32", _PLAIN | {"moments_ptr": None, "item_stride": 0, "part_stride": 0}),
            ("fp32 whiten", "fp32", _PLAIN),
            ("bf16 all options", "bf16", _FULL | _ODD),
            ("fp32 token scores", "fp32", _TOKEN_SCORES),
        ):
            inputs = _inputs(dtype, "scores", "logprobs", "ref_logprobs", "values")
            yield _case(
                op, variant, target, whole._advantages_kernel, configuration, inputs | given,
                3 * ITEM_BYTES[dtype] + 1 + 16,
            )  # fmt: skip
    for variant, dtype, given in (
        ("fp32 rewards", "fp32", _PLAIN | {"sums_ptr": None}),
        ("fp32 both", "fp32", _PLAIN),
        ("bf16 both, all options", "bf16", _FULL | _ODD),
    ):
        item = ITEM_BYTES[dtype]
        inputs = _inputs(dtype, "scores", "logprobs", "ref_logprobs", "values")
        fields_read = 2 if "sums_ptr" in given else 3
        for configuration in rewards.FIELD_BLOCKS:
            yield _case(
                op, f"{variant}, 1st", target, whole._fields_kernel, configuration, inputs | given,
                fields_read * item + 1 + 8,
            )  # fmt: skip
        for configuration in rewards.BLOCKS:
            yield _case(
                op, f"{variant}, 2nd", target, whole._whitened_kernel, configuration,
                _inputs(dtype, "values") | given, item + 1 + 16,
            )  # fmt: skip


def _whitening(target: str) -> Iterator[Case]:
    for dtype in ("fp32", "bf16"):
        item = ITEM_BYTES[dtype]
        yield _case(
            "masked_moments", dtype, target, whitening._moments_kernel,
            whitening.MOMENTS_CONFIGURATION, _inputs(dtype, "x"), item + 1,
        )  # fmt: skip
        for shift in (True, False):
            given = _inputs(dtype, "x") | {"SHIFT_MEAN": shift, "UNBIASED": not shift}
            yield _case(
                "masked_whiten", f"{dtype} {'' if shift else 'keeps the mean'}".strip(), target,
                whitening._whiten_kernel, whitening.WHITEN_CONFIGURATION, given, item + 1 + 4,
            )  # fmt: skip
    yield _case(
        "masked_moments", "merge", target, whitening._merge_kernel,
        whitening.MERGE_CONFIGURATION, {}, 0,
    )  # fmt: skip


def cases(target: str) -> Iterator[Case]:
    for op in (_kl_penalty, _shape_rewards, _gae, _rewards_to_advantages, _whitening):
        yield from op(target)

"""Cases of the losses. Sizes of the floors: B = 512, T = 1024."""

from collections.abc import Iterator
from typing import Any

from fuserl_kernels import triton_losses as losses
from fuserl_kernels import triton_pairwise as pairwise
from fuserl_kernels.compile_cases.case import ITEM_BYTES, Case, arguments_of
from fuserl_kernels.triton_losses_kernel import _losses_kernel
from fuserl_kernels.triton_partial_sums import TILE

_NUM_TOKENS, _NUM_PAIRS = 512 * 1024, 512
_NUMBERS = (
    "ratio_low ratio_high dual_clip gate_pos gate_neg gate_rate_pos gate_rate_neg log_ratio_clip "
    "kl_coef kl_clip entropy_coef correction_low correction_high vf_coef value_clip_range"
)
_POLICY = "new_logprobs logprobs advantages ref_logprobs entropy rollout_logprobs grad_logprobs"
_VALUE = "new_values values returns grad_values"


def _pointers(names: str, type_name: str | None) -> dict[str, Any]:
    return dict.fromkeys((f"{name}_ptr" for name in names.split()), type_name)


_COMMON: dict[str, Any] = {
    **dict.fromkeys(_NUMBERS.split(), "fp32"),
    "partials_ptr": "*fp64:16",
    "ticket_ptr": "*i32:16",
    "loss_mask_ptr": "*i1:16",
    "value_mask_ptr": None,
    "cu_seqlens_ptr": None,
    "num_segments": "i32",
    "advantage_row_stride": "i32",
    "advantage_col_stride": "i32",
    "LEVEL": "token",
    "CLIP": "ppo",
    "AGGREGATION": "token_mean",
    "ESTIMATOR": "k3",
    "CORRECTION": "none",
    "CORRECTION_LEVEL": "token",
    "SEQUENCES": False,
    "ADVANTAGE_ROWS": False,
    "TOGETHER": True,
    "WIDE": False,
    "ROWS": 1,
    "BLOCK": TILE,
}
_PLAIN = _pointers("ref_logprobs entropy rollout_logprobs grad_entropy", None)
_NO_DENOMINATOR = _pointers("denominator value_denominator", None)
_NO_VALUE = _pointers(_VALUE + " value_denominator", None)
_NO_POLICY = _pointers(_POLICY + " loss_mask grad_entropy denominator", None)
_NO_GRADIENT = _pointers("grad_logprobs grad_entropy grad_values", None)
_ALL: dict[str, Any] = {
    "value_mask_ptr": "*i1:16",
    "CORRECTION": "truncate",
    "ESTIMATOR": "k2",
}
_BY_SEQUENCE: dict[str, Any] = {
    "LEVEL": "sequence_mean",
    "AGGREGATION": "sequence_mean",
    "SEQUENCES": True,
    "ADVANTAGE_ROWS": True,
}
# Sizes of 1, which Triton compiles for apart.
_ONE = dict.fromkeys(
    "num_tokens segment_length advantage_row_stride advantage_col_stride".split(), 1
) | {"TOGETHER": False, "ROWS": 32, "BLOCK": 32}
_PACKED: dict[str, Any] = {
    **_ALL,
    "cu_seqlens_ptr": "*i32:16",
    "LEVEL": "sequence_sum",
    "CLIP": "sapo",
    "AGGREGATION": "sequence_sum",
    "CORRECTION": "mask",
    "CORRECTION_LEVEL": "sequence_mean",
    "SEQUENCES": True,
    "num_tokens": "i32",
    "TOGETHER": False,
    "ROWS": TILE // 128,
    "BLOCK": 128,
}
_VESPO: dict[str, Any] = {"LEVEL": "sequence_sum", "CLIP": "vespo", "AGGREGATION": "sequence_mean"}


def _losses(target: str) -> Iterator[Case]:
    """(op, variant, what differs from the common arguments, tokens read and written a token)"""
    variants: list[tuple[str, str, dict[str, Any], int]] = [
        ("ppo_loss", "plain", _PLAIN | _NO_DENOMINATOR, 8),
        ("ppo_loss", "all options", _ALL, 12),
        ("ppo_loss", "no gradient", _ALL | _NO_GRADIENT, 9),
        ("ppo_loss", "past 2^31", _PLAIN | {"num_tokens": "i64:16", "WIDE": True}, 8),
        ("ppo_loss", "by sequence", _PLAIN | _BY_SEQUENCE, 7),
        ("ppo_loss", "one token", _PLAIN | _BY_SEQUENCE | _ONE, 7),
        ("ppo_loss", "packed, all options", _PACKED, 12),
        ("policy_loss", "plain", _PLAIN | _NO_DENOMINATOR | _NO_VALUE, 4),
        ("policy_loss", "cispo", _PLAIN | _NO_DENOMINATOR | _NO_VALUE | {"CLIP": "cispo"}, 4),
        ("policy_loss", "vespo", _PLAIN | _NO_VALUE | _BY_SEQUENCE | _VESPO, 4),
        ("value_loss", "plain", _NO_POLICY | {"value_mask_ptr": "*i1:16"}, 4),
    ]
    for op, variant, given, per_token in variants:
        for dtype in ("fp32", "bf16"):
            tensors = _pointers(f"{_POLICY} {_VALUE} grad_entropy", f"*{dtype}:16")
            yield Case(
                op,
                f"{dtype} {variant}",
                target,
                _losses_kernel,
                losses.CONFIGURATION,
                arguments_of(_losses_kernel, _COMMON | tensors | given),
                8,
                32 if given.get("SEQUENCES") else 0,  # numbers of a sequence, across its walks
                _NUM_TOKENS * (per_token * ITEM_BYTES[dtype] + 1),
                # Four tokens a thread, but where a walk may start anywhere.
                load_bits=0 if given.get("SEQUENCES") else 4 * 8 * ITEM_BYTES[dtype],
            )


def _pairwise(target: str) -> Iterator[Case]:
    types = {"num_pairs": "i32", "chosen_stride": "i32", "rejected_stride": "i32"}
    types |= {"margin_stride": "i32", "center_coef": "fp32"}
    no_gradient = _pointers("margin grad_chosen grad_rejected", None)
    for dtype in ("fp32", "bf16"):
        scores = _pointers("chosen rejected grad_chosen grad_rejected", f"*{dtype}:16")
        for variant, given in (("", {}), (" plain, no gradient", no_gradient)):
            yield Case(
                "pairwise_loss",
                dtype + variant,
                target,
                pairwise._pairwise_kernel,
                pairwise.CONFIGURATION,
                arguments_of(pairwise._pairwise_kernel, types | scores | given),
                8,
                0,
                4 * _NUM_PAIRS * ITEM_BYTES[dtype],
            )


def cases(target: str) -> Iterator[Case]:
    yield from _losses(target)
    yield from _pairwise(target)

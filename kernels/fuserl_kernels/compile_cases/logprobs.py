"""Cases of the log-probability kernels and of the policy rows."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

from fuserl_kernels import triton_linear_logprobs as linear
from fuserl_kernels import triton_policy_rows as policy
from fuserl_kernels.compile_cases.case import (
    HIDDEN_SIZE,
    ITEM_BYTES,
    MATRIX_FLOPS,
    NUM_ROWS,
    VECTOR_FLOPS,
    VOCAB_SIZE,
    Case,
    arguments_of,
)
from fuserl_kernels.triton_runtime import triton

# The module: the package has a function of the same name.
token_logprobs = import_module("fuserl_kernels.token_logprobs")

# A plain call, and one with every option on.
_PLAIN: dict[str, Any] = {"temperatures_ptr": None, "SOFTCAP": False}
_FULL: dict[str, Any] = {"SOFTCAP": True}
_UNIT: dict[str, Any] = {"col_stride": 1, "out_col_stride": 1}
# Strides past 2^31, and sizes of 1, which Triton compiles for apart.
_FAR: dict[str, Any] = {**_UNIT, "row_stride": "i64", "out_row_stride": "i64"}
_ONE_BY_ONE: dict[str, Any] = {"vocab_size": 1, "hidden_size": 1}
_ONE_COLUMN: dict[str, Any] = {"vocab_size": 1, "row_stride": 1, "out_row_stride": 1}
_ODD: dict[str, Any] = {
    "vocab_size": "i32",
    "row_stride": "i32",
    "col_stride": "i32",
    "out_row_stride": "i32",
    "out_col_stride": "i32",
}


def _load_bits(given: dict[str, Any]) -> int:
    """Rows of any stride are read a number at a time."""
    return 0 if given.keys() & {"vocab_size", "row_stride"} else 128


def _token_logprobs(target: str) -> Iterator[Case]:
    variants: list[tuple[str, str, dict[str, Any]]] = []
    for dtype in ("bf16", "fp32"):
        variants += [
            (dtype, dtype, _PLAIN | _UNIT | {"mask_ptr": None, "ENTROPY": False}),
            (f"{dtype} entropy", dtype, _PLAIN | _UNIT | {"mask_ptr": None, "ENTROPY": True}),
        ]
    variants.append(("fp16 all options", "fp16", _FULL | _UNIT | {"ENTROPY": True}))
    variants.append(("bf16 any strides", "bf16", _PLAIN | _ODD | {"ENTROPY": True}))
    variants.append(("bf16 far rows", "bf16", _PLAIN | _FAR | {"ENTROPY": True}))
    variants.append(("bf16 one column", "bf16", _PLAIN | _UNIT | {"ENTROPY": True} | _ONE_COLUMN))
    for variant, dtype, given in variants:
        logits = {"logits_ptr": f"*{dtype}:16"}
        for configuration in token_logprobs.FWD_CONFIGURATIONS[ITEM_BYTES[dtype]]:
            yield Case(
                "token_logprobs",
                variant,
                target,
                token_logprobs._fwd_kernel,
                configuration,
                arguments_of(token_logprobs._fwd_kernel, logits | given),
                16,
                0,
                NUM_ROWS * VOCAB_SIZE * ITEM_BYTES[dtype],
                load_bits=_load_bits(given),
            )


def _token_logprobs_bwd(target: str) -> Iterator[Case]:
    no_entropy = {"mask_ptr": None, "grad_entropy_ptr": None, "OVERLAY": False}
    for variant, dtype, out, given in (
        ("bf16", "bf16", "bf16", _PLAIN | _UNIT | no_entropy),
        ("fp32", "fp32", "fp32", _PLAIN | _UNIT | no_entropy),
        ("fp16 all options", "fp16", "fp16", _FULL | _UNIT | {"OVERLAY": False}),
        ("fp32 over bf16, entropy", "fp32", "bf16", _PLAIN | _UNIT | {"OVERLAY": True}),
        ("bf16 any strides", "bf16", "bf16", _PLAIN | _ODD | {"OVERLAY": False}),
        ("bf16 far rows", "bf16", "bf16", _PLAIN | _FAR | {"OVERLAY": False}),
        ("bf16 one column", "bf16", "bf16", _PLAIN | _UNIT | {"OVERLAY": False} | _ONE_COLUMN),
    ):
        tensors = {"logits_ptr": f"*{dtype}:16", "out_ptr": f"*{out}:16"}
        for configuration in token_logprobs.BWD_CONFIGURATIONS:
            yield Case(
                "token_logprobs_bwd",
                variant,
                target,
                token_logprobs._bwd_kernel,
                configuration,
                arguments_of(token_logprobs._bwd_kernel, tensors | given),
                16,
                0,
                NUM_ROWS * VOCAB_SIZE * (ITEM_BYTES[dtype] + ITEM_BYTES[out]),
                load_bits=_load_bits(given),
            )


def _policy_rows(target: str) -> Iterator[Case]:
    numbers = dict.fromkeys(
        "ratio_low ratio_high gate_pos gate_neg gate_rate_pos gate_rate_neg log_ratio_clip "
        "kl_clip".split(),
        "fp32",
    )
    common = _UNIT | numbers | {"ESTIMATOR": "k3"}
    plain = _PLAIN | common | {"ref_logprobs_ptr": None, "CLIP": "ppo"}
    full = _FULL | common | {"CLIP": "sapo", "BONUS": True}
    for variant, dtype, out, given in (
        ("bf16 ppo", "bf16", "bf16", plain | {"BONUS": False, "OVERLAY": False}),
        ("fp32 over bf16, ppo", "fp32", "bf16", plain | {"BONUS": False, "OVERLAY": True}),
        ("fp32 over bf16, all options", "fp32", "bf16", full | {"OVERLAY": True}),
    ):
        tensors = {"logits_ptr": f"*{dtype}:16", "out_ptr": f"*{out}:16"}
        for configuration in policy.POLICY_CONFIGURATIONS:
            yield Case(
                "policy_rows",
                variant,
                target,
                policy._policy_rows_kernel,
                configuration,
                arguments_of(policy._policy_rows_kernel, tensors | given),
                8,
                64,  # scalars of the row that live across both walks
                NUM_ROWS * VOCAB_SIZE * (ITEM_BYTES[dtype] + ITEM_BYTES[out]),
                load_bits=128,
            )


def _linear_forward(target: str) -> Iterator[Case]:
    plain = _PLAIN | {"bias_ptr": None, "ENTROPY": False}
    full = _FULL | {"bias_ptr": "*bf16:16", "ENTROPY": True}
    entropy = _PLAIN | {"bias_ptr": None, "ENTROPY": True}
    strides = {"hidden_col_stride": 1, "weight_col_stride": 1}
    release = ".".join(triton.__version__.split(".")[:2])
    choices = list(linear.LINEAR_CONFIGURATIONS[target])
    if (release, target) in linear.SPECIALIZED:
        choices.append(linear.SPECIALIZED[release, target])
    for dtype, configurations in (("bf16", choices), ("fp32", [linear.FLOAT32_CONFIGURATION])):
        for configuration in configurations:
            blocks = configuration.constants
            variants = [("", plain), (" entropy", entropy)]
            if linear.fits_softcap(configuration):
                variants.append((" all options", full))
            if not blocks["TMA"]:
                variants.append((" one by one", plain | _ONE_BY_ONE))
            for variant, given in variants:
                matrices = {"hidden": f"*{dtype}:16", "weight": f"*{dtype}:16"}
                if blocks["TMA"]:
                    matrices = {
                        "hidden": f"tensordesc<{dtype}[{blocks['BLOCK_N']},{blocks['BLOCK_D']}]>",
                        "weight": f"tensordesc<{dtype}[{blocks['BLOCK_V']},{blocks['BLOCK_D']}]>",
                    }
                yield Case(
                    "linear_token_logprobs",
                    dtype + variant,
                    target,
                    linear._linear_kernel,
                    configuration,
                    arguments_of(linear._linear_kernel, matrices | strides | given),
                    8,
                    64,  # values that live across the product, spilled once a tile
                    (NUM_ROWS + VOCAB_SIZE) * HIDDEN_SIZE * ITEM_BYTES[dtype],
                    2.0 * NUM_ROWS * VOCAB_SIZE * HIDDEN_SIZE,
                    MATRIX_FLOPS if dtype == "bf16" else VECTOR_FLOPS,
                    tensor_cores="HGMMA" if dtype == "bf16" else "",
                )
    num_tiles = -(-VOCAB_SIZE // 256)
    for variant, entropy_on in (("", False), (" entropy", True)):
        yield Case(
            "linear_token_logprobs",
            "merge" + variant,
            target,
            linear._merge_kernel,
            linear.MERGE_CONFIGURATION,
            arguments_of(linear._merge_kernel, {"ENTROPY": entropy_on}),
            16,
            0,
            NUM_ROWS * num_tiles * (12 if entropy_on else 8),
        )


def cases(target: str) -> Iterator[Case]:
    for op in (_token_logprobs, _token_logprobs_bwd, _policy_rows, _linear_forward):
        yield from op(target)

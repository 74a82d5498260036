"""What the compile gate compiles: each Triton kernel, its configurations, and typical arguments.

A case's arguments are Triton's type names ("*bf16", "i32", "fp32"; with ":16" where a pointer or a
size is a multiple of 16, as it is in training), or values the compiler knows (None for an absent
tensor, a stride of 1, a constexpr). Sizes of the floors: N = 8192, V = 128256, D = 4096.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from fuserl_kernels import triton_linear_logprobs as linear
from fuserl_kernels import triton_policy_rows as policy
from fuserl_kernels.triton_runtime import Configuration, triton

# The module: the package has a function of the same name.
token_logprobs = import_module("fuserl_kernels.token_logprobs")

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
NUM_ROWS, VOCAB_SIZE, HIDDEN_SIZE = 8192, 128256, 4096
BYTES_A_SECOND = 4.3e12  # an H200's copy bandwidth, measured, reads and writes counted
MATRIX_FLOPS = 790e12  # its bf16 product rate, measured on random data
VECTOR_FLOPS = 67e12  # its float32 rate by the data sheet
_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
_NUMBERS = "temperature softcap clip_low clip_high dual_clip kl_coef entropy_coef".split()


@dataclass(frozen=True)
class Case:
    """One kernel with one configuration and one set of argument types, for one target.

    min_warps: resident warps a multiprocessor, at least, as the occupancy calculation gives them.
    max_spill_bytes: stack of a thread, at most.
    num_bytes: read and written in device memory by design; num_flops: of the product.
    """

    op: str
    variant: str
    target: str
    function: Any
    configuration: Configuration
    arguments: dict[str, Any]
    min_warps: int
    max_spill_bytes: int
    num_bytes: float
    num_flops: float = 0.0
    flops_a_second: float = MATRIX_FLOPS

    def floor_ms(self) -> float:
        """Time at an H200's measured limits, in milliseconds."""
        return 1e3 * max(
            self.num_bytes / BYTES_A_SECOND,
            self.num_flops / self.flops_a_second,
        )


def _arguments(function: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Types of all arguments: those given, and by their names those that are not."""
    types: dict[str, Any] = {
        "token_ids_ptr": "*i64:16",
        "mask_ptr": "*i1:16",
        "num_rows": "i32",
        "num_vocab_tiles": "i32",
        **dict.fromkeys(_NUMBERS, "fp32"),
    }
    return {
        name: given[name]
        if name in given
        else types.get(name, "*fp32:16" if name.endswith("_ptr") else "i32:16")
        for name in function.arg_names
    }


# A plain call, and one with every option on.
_PLAIN: dict[str, Any] = {"temperatures_ptr": None, "SOFTCAP": False}
_FULL: dict[str, Any] = {"SOFTCAP": True}
_UNIT: dict[str, Any] = {"col_stride": 1, "out_col_stride": 1}
_ODD: dict[str, Any] = {
    "vocab_size": "i32",
    "row_stride": "i32",
    "col_stride": "i32",
    "out_row_stride": "i32",
    "out_col_stride": "i32",
}


def _token_logprobs(target: str) -> Iterator[Case]:
    variants: list[tuple[str, str, dict[str, Any]]] = []
    for dtype in ("bf16", "fp32"):
        variants += [
            (dtype, dtype, _PLAIN | _UNIT | {"mask_ptr": None, "ENTROPY": False}),
            (f"{dtype} entropy", dtype, _PLAIN | _UNIT | {"mask_ptr": None, "ENTROPY": True}),
        ]
    variants.append(("fp16 all options", "fp16", _FULL | _UNIT | {"ENTROPY": True}))
    variants.append(("bf16 any strides", "bf16", _PLAIN | _ODD | {"ENTROPY": True}))
    for variant, dtype, given in variants:
        logits = {"logits_ptr": f"*{dtype}:16"}
        for configuration in token_logprobs.FWD_CONFIGURATIONS[_SIZES[dtype]]:
            yield Case(
                "token_logprobs",
                variant,
                target,
                token_logprobs._fwd_kernel,
                configuration,
                _arguments(token_logprobs._fwd_kernel, logits | given),
                16,
                0,
                NUM_ROWS * VOCAB_SIZE * _SIZES[dtype],
            )


def _token_logprobs_bwd(target: str) -> Iterator[Case]:
    no_entropy = {"mask_ptr": None, "grad_entropy_ptr": None, "OVERLAY": False}
    for variant, dtype, out, given in (
        ("bf16", "bf16", "bf16", _PLAIN | _UNIT | no_entropy),
        ("fp32", "fp32", "fp32", _PLAIN | _UNIT | no_entropy),
        ("fp16 all options", "fp16", "fp16", _FULL | _UNIT | {"OVERLAY": False}),
        ("fp32 over bf16, entropy", "fp32", "bf16", _PLAIN | _UNIT | {"OVERLAY": True}),
        ("bf16 any strides", "bf16", "bf16", _PLAIN | _ODD | {"OVERLAY": False}),
    ):
        tensors = {"logits_ptr": f"*{dtype}:16", "out_ptr": f"*{out}:16"}
        for configuration in token_logprobs.BWD_CONFIGURATIONS:
            yield Case(
                "token_logprobs_bwd",
                variant,
                target,
                token_logprobs._bwd_kernel,
                configuration,
                _arguments(token_logprobs._bwd_kernel, tensors | given),
                16,
                0,
                NUM_ROWS * VOCAB_SIZE * (_SIZES[dtype] + _SIZES[out]),
            )


def _policy_rows(target: str) -> Iterator[Case]:
    plain = _PLAIN | _UNIT | {"ref_logprobs_ptr": None, "CLIP": "ppo", "ESTIMATOR": "k3"}
    full = _FULL | _UNIT | {"CLIP": "cispo", "ESTIMATOR": "k3", "BONUS": True}
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
                _arguments(policy._policy_rows_kernel, tensors | given),
                8,
                64,  # scalars of the row that live across both walks
                NUM_ROWS * VOCAB_SIZE * (_SIZES[dtype] + _SIZES[out]),
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
            variants = [("", plain), (" entropy", entropy), (" all options", full)]
            for variant, given in variants[: 3 if linear.fits_softcap(configuration) else 2]:
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
                    _arguments(linear._linear_kernel, matrices | strides | given),
                    8,
                    64,  # values that live across the product, spilled once a tile
                    (NUM_ROWS + VOCAB_SIZE) * HIDDEN_SIZE * _SIZES[dtype],
                    2.0 * NUM_ROWS * VOCAB_SIZE * HIDDEN_SIZE,
                    MATRIX_FLOPS if dtype == "bf16" else VECTOR_FLOPS,
                )
    num_tiles = -(-VOCAB_SIZE // 256)
    for variant, entropy_on in (("", False), (" entropy", True)):
        yield Case(
            "linear_token_logprobs",
            "merge" + variant,
            target,
            linear._merge_kernel,
            linear.MERGE_CONFIGURATION,
            _arguments(linear._merge_kernel, {"ENTROPY": entropy_on}),
            16,
            0,
            NUM_ROWS * num_tiles * (12 if entropy_on else 8),
        )


def cases(target: str) -> list[Case]:
    """Every case for one of TARGETS."""
    ops = (_token_logprobs, _token_logprobs_bwd, _policy_rows, _linear_forward)
    return [case for op in ops for case in op(target)]

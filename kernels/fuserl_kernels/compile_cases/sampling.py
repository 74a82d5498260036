"""Cases of the sampler."""

from collections.abc import Iterator
from typing import Any

from fuserl_kernels import triton_sampling as sampling
from fuserl_kernels.compile_cases.case import ITEM_BYTES, VOCAB_SIZE, Case, arguments_of
from fuserl_kernels.triton_runtime import Configuration

_NUM_ROWS = 256  # a large decode step
_PLAIN: dict[str, Any] = {"TOP_K": False, "TOP_P": False, "MIN_P": False}
_TOP_P = _PLAIN | {"TOP_P": True}
_FULL: dict[str, Any] = {"TOP_K": True, "TOP_P": True, "MIN_P": True}
_TYPES: dict[str, Any] = {
    "request_ids_ptr": "*i64:16",
    "positions_ptr": "*i64:16",
    "top_k": "i32",
    "top_p_bits": "i64",
    "floor": "fp32",
    "seed_low": "i32",
    "seed_high": "i32",
    "col_stride": 1,
    "GREEDY": False,
    "TURNS": 64,
}
_ODD: dict[str, Any] = {"vocab_size": "i32", "row_stride": "i32", "col_stride": "i32"}


def _load_bits(dtype: str, configuration: Configuration) -> int:
    """Sixteen warps share 2048 lanes: four logits a thread."""
    return min(128, 8 * ITEM_BYTES[dtype] * 64 // configuration.num_warps)


def cases(target: str) -> Iterator[Case]:
    variants: list[tuple[str, str, dict[str, Any]]] = []
    for dtype in ("bf16", "fp16", "fp32"):
        variants += [(dtype, dtype, _PLAIN), (f"{dtype} all truncations", dtype, _FULL)]
    variants += [
        ("bf16 greedy", "bf16", _PLAIN | {"GREEDY": True}),
        ("bf16 top_p", "bf16", _TOP_P),
        ("bf16 top_p, any strides", "bf16", _TOP_P | _ODD),
    ]
    for variant, dtype, given in variants:
        for configuration in sampling.CONFIGURATIONS[ITEM_BYTES[dtype]]:
            yield Case(
                "sample_tokens",
                variant,
                target,
                sampling._sample_kernel,
                configuration,
                arguments_of(
                    sampling._sample_kernel,
                    {"logits_ptr": f"*{dtype}:16"} | _TYPES | given,
                ),
                8,
                64 if given["TOP_P"] else 0,  # scalars of the search that live across its walks
                _NUM_ROWS * VOCAB_SIZE * ITEM_BYTES[dtype],
                load_bits=0 if "vocab_size" in given else _load_bits(dtype, configuration),
            )

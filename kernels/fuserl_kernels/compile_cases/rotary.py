"""Cases of the rotary embedding. Sizes of the floors: 32 query and 8 key heads of 128."""

from collections.abc import Iterator
from typing import Any

from fuserl_kernels import triton_rotary as rotary
from fuserl_kernels.compile_cases.case import ITEM_BYTES, NUM_ROWS, Case, arguments_of

_NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM = 32, 8, 128
_TYPES: dict[str, Any] = {
    "positions_ptr": "*i64:16",
    "num_tokens": "i32",
    "num_positions": "i32",
    "num_slots": "i32",
    "num_offsets": "i32",
    "part_tokens": "i32",
    "num_heads": "i32",
    "num_kv_heads": "i32",
    "eps": "fp32",
    "weight_offset": "fp32",
    "INTERLEAVED": False,
    "TURNS": True,
}
_NO_NORM: dict[str, Any] = {"q_weight_ptr": None, "k_weight_ptr": None}
_RETURNED: dict[str, Any] = {"slots_ptr": None, "offsets_ptr": None}
_WRITTEN: dict[str, Any] = {"slots_ptr": "*i64:16", "offsets_ptr": "*i64:16"}
_ONE_KEY: dict[str, Any] = {"num_kv_heads": 1}  # which Triton compiles for apart
_ODD = dict.fromkeys(
    "head_dim rotary_dim qkv_stride cos_stride sin_stride "
    "key_head_stride value_head_stride".split(),
    "i32",
)


def _case(
    op: str, variant: str, target: str, kernel: Any, dtype: str, head_dim: int, given: dict
) -> Case:
    names = "qkv q_weight k_weight query key value grad_query grad_key grad_value grad_qkv".split()
    tensors = dict.fromkeys((f"{name}_ptr" for name in names), f"*{dtype}:16")
    num_elements = NUM_ROWS * (_NUM_HEADS + 2 * _NUM_KV_HEADS) * _HEAD_DIM
    block_elements = rotary.BLOCK_ELEMENTS
    if op == "rotary_bwd":
        block_elements = rotary.BLOCK_ELEMENTS_BWD
    passes = 3 if given.get("partials_ptr") else 2  # where there is a norm qkv is read too
    return Case(
        op,
        f"{dtype} {variant}",
        target,
        kernel,
        rotary.configuration(head_dim, _NUM_HEADS, block_elements),
        arguments_of(kernel, _TYPES | tensors | given),
        12 if "odd" in variant else 16,
        0,
        passes * num_elements * ITEM_BYTES[dtype],
        load_bits=128 if variant == "" else 0,
    )


def cases(target: str) -> Iterator[Case]:
    kernel = rotary._rotary_kernel
    for op, dtype, variant, head_dim, given in (
        ("rotary", "bf16", "", 128, _NO_NORM | _RETURNED),
        ("rotary", "bf16", "normalised", 128, _RETURNED),
        ("rotary", "fp32", "normalised, odd head_dim", 80, _RETURNED | _ODD),
        ("rotary_kv_write", "bf16", "", 128, _NO_NORM | _WRITTEN),
        ("rotary_kv_write", "bf16", "normalised, 256, one key head", 256, _WRITTEN | _ONE_KEY),
        ("rotary_kv_write", "fp16", "interleaved", 64, _NO_NORM | _WRITTEN | {"INTERLEAVED": True}),
        ("rotary_kv_write", "bf16", "no rotation", 64, _NO_NORM | _WRITTEN | {"TURNS": False}),
    ):
        yield _case(op, variant, target, kernel, dtype, head_dim, given)
    kernel = rotary._rotary_bwd_kernel
    plain: dict[str, Any] = _NO_NORM | {"qkv_ptr": None, "partials_ptr": None}
    with_norm: dict[str, Any] = {"partials_ptr": "*fp32:16"}
    for dtype, variant, head_dim, given in (
        ("bf16", "", 128, plain),
        ("bf16", "interleaved", 64, plain | {"INTERLEAVED": True}),
        ("bf16", "normalised", 128, with_norm),
        ("fp32", "normalised, odd head_dim", 80, with_norm | _ODD),
        ("bf16", "normalised, one key head", 256, with_norm | _ONE_KEY | {"grad_query_ptr": None}),
    ):
        yield _case("rotary_bwd", variant, target, kernel, dtype, head_dim, given)
    yield Case(
        "rotary_bwd",
        "sums of the norms",
        target,
        rotary._weights_kernel,
        rotary.WEIGHTS_CONFIGURATION,
        arguments_of(
            rotary._weights_kernel,
            {"num_programs": "i32", "q_parts": "i32", "kv_parts": 1},
        ),
        16,
        0,
        rotary.MAX_PROGRAMS * 3 * _HEAD_DIM * 4,
    )

"""Cases of decode attention. Sizes of the floors: B = 256 rows of 32 heads over 8 kv heads, 1024
tokens each; the prefix of 512 tokens for 32 prompts."""

from collections.abc import Iterator
from typing import Any

from fuserl_kernels import triton_attention_plan as plan
from fuserl_kernels import triton_decode_attention as attention
from fuserl_kernels.compile_cases.case import ITEM_BYTES, Case, arguments_of
from fuserl_kernels.reference.attention_plan import prefix_tile

_NUM_ROWS, _NUM_HEADS, _NUM_KV_HEADS = 256, 32, 8
_NUM_TOKENS, _NUM_PREFIXES, _PREFIX_TOKENS = 1024, 32, 512
_NUMBERS = "num_rows num_slots capacity num_prefixes prefix_capacity window first_part num_parts"
_COUNTS = "num_heads num_kv_heads"
_NO_PREFIX: dict[str, Any] = {"prefix_ids_ptr": None, "prefix_lengths_ptr": None}
_TYPES: dict[str, Any] = {
    **dict.fromkeys(_NUMBERS.split(), "i32"),
    **dict.fromkeys(_COUNTS.split(), "i32"),
    **dict.fromkeys(
        ("lengths_ptr", "slots_ptr", "prefix_ids_ptr", "prefix_lengths_ptr"), "*i64:16"
    ),
    "members_ptr": "*i32:16",
    "scale": "fp32",
    "WINDOW": False,
    "SOFTCAP": False,
    "WHOLE": False,
}
_VARIED: dict[str, Any] = {"WINDOW": True, "SOFTCAP": True}


def _tile_types(dtype: str, head_dim: int) -> dict[str, Any]:
    block_d = attention.block_columns(head_dim)
    return {
        **{f"{name}_ptr": f"*{dtype}:16" for name in ("query", "key", "value", "out")},
        "BLOCK_D": block_d,
        "EVEN_D": head_dim == block_d,
    }


def _bytes(dtype: str, head_dim: int, num_items: int, num_tokens: int) -> int:
    return 2 * num_items * _NUM_KV_HEADS * num_tokens * head_dim * ITEM_BYTES[dtype]


def cases(target: str) -> Iterator[Case]:
    variants: list[tuple[str, int, dict[str, Any]]] = [
        ("bf16", 128, {}),
        ("bf16", 64, {"WHOLE": True, **_NO_PREFIX}),
        ("bf16", 256, _VARIED),
        ("fp16", 80, {}),
        ("fp32", 128, {}),
        ("fp32", 256, _VARIED),
    ]
    for dtype, head_dim, given in variants:
        types = _TYPES | _tile_types(dtype, head_dim) | given
        block_d = types["BLOCK_D"]
        narrow = ITEM_BYTES[dtype] == 2
        spill = 0 if narrow else 16  # on the vector units, whose operands fill the registers
        words = [dtype, f"head_dim {head_dim}"]
        words += ["window, softcap"] if given.get("WINDOW") else []
        words += ["one split"] if given.get("WHOLE") else []
        yield Case(
            "decode_attention",
            f"slots, {', '.join(words)}",
            target,
            attention._slot_kernel,
            attention.slot_configuration(ITEM_BYTES[dtype], block_d),
            arguments_of(attention._slot_kernel, types | {"BLOCK_G": attention.slot_tile(4)}),
            8,
            spill,
            _bytes(dtype, head_dim, _NUM_ROWS, _NUM_TOKENS),
            load_bits=128,
            tensor_cores="HMMA" if narrow else "",  # a group of heads is less than wgmma's 64 rows
        )
        if "WHOLE" in given:
            continue
        heads, rows = prefix_tile(4, ITEM_BYTES[dtype])
        yield Case(
            "decode_attention",
            f"prefix, {', '.join(words)}",
            target,
            attention._prefix_kernel,
            attention.prefix_configuration(ITEM_BYTES[dtype], block_d),
            arguments_of(attention._prefix_kernel, types | {"BLOCK_G": heads, "ROWS": rows}),
            8,
            spill,
            _bytes(dtype, head_dim, _NUM_PREFIXES, _PREFIX_TOKENS),
            tensor_cores="HGMMA" if narrow else "",
        )
    yield Case(
        "decode_attention",
        "plan",
        target,
        plan._plan_kernel,
        plan.PLAN_CONFIGURATION,
        arguments_of(plan._plan_kernel, _TYPES | {"ROWS": 16}),
        8,
        0,
        12 * _NUM_ROWS,
    )
    yield Case(
        "decode_attention",
        "merge, bf16, head_dim 128",
        target,
        attention._merge_kernel,
        attention.MERGE_CONFIGURATION,
        arguments_of(attention._merge_kernel, _TYPES | {"out_ptr": "*bf16:16", "BLOCK_D": 128}),
        8,
        0,
        _NUM_ROWS * _NUM_HEADS * (_NUM_TOKENS // attention._SPLIT_TOKENS) * 130 * 4,
    )

"""Cases of the norms."""

from collections.abc import Iterator
from typing import Any

from fuserl_kernels import triton_norms as norms
from fuserl_kernels.compile_cases.case import HIDDEN_SIZE, ITEM_BYTES, NUM_ROWS, Case, arguments_of

_PLAIN: dict[str, Any] = {
    "inner_rows": None,
    "outer_stride": "i32",
    "eps": "fp32",
    "weight_offset": "fp32",
}
_RMS: dict[str, Any] = _PLAIN | {"bias_ptr": None, "CENTERED": False}
_LAYER: dict[str, Any] = _PLAIN | {"CENTERED": True}
_FIRST: dict[str, Any] = {"residual_ptr": None, "grad_summed_ptr": None}
# A slice of heads; rows of odd sizes, which are read an element at a time; strides past 2^31.
_SLICE: dict[str, Any] = {"inner_rows": "i32", "outer_stride": "i32:16"}
_ODD: dict[str, Any] = {"inner_rows": "i32", "inner_stride": "i32", "hidden_size": "i32"}
_FAR: dict[str, Any] = {"inner_rows": "i32", "outer_stride": "i64", "inner_stride": "i64"}
_SINGLY = ("odd", "far", "one")  # words of the variants whose rows are read a number at a time
_TENSORS = (
    "x_ptr residual_ptr weight_ptr bias_ptr y_ptr summed_ptr rows_ptr grad_y_ptr grad_summed_ptr "
    "grad_x_ptr"
).split()
# Width, dtype of rows, and what differs from a plain call.
_VARIANTS: tuple[tuple[str, int, str, dict[str, Any]], ...] = (
    ("rms, residual", HIDDEN_SIZE, "bf16", _RMS),
    ("rms", HIDDEN_SIZE, "fp32", _RMS | _FIRST),
    ("rms, slice of heads", 128, "bf16", _RMS | _FIRST | _SLICE),
    ("layer, residual", 8192, "bf16", _LAYER),
    ("layer, far rows", 768, "fp16", _LAYER | _FAR),
    ("layer, odd rows", 1000, "bf16", _LAYER | _ODD),
    ("rms, one column", 1, "bf16", _RMS | {"hidden_size": 1, "inner_stride": 1}),
    ("layer, residual", 16384, "fp32", _LAYER),
    ("layer, walked", 20000, "bf16", _LAYER),
    ("rms, odd rows walked", 20000, "bf16", _RMS | _FIRST | _ODD),
)


def cases(target: str) -> Iterator[Case]:
    for name, width, dtype, options in _VARIANTS:
        pointers = dict.fromkeys(_TENSORS, f"*{dtype}:16")
        given = pointers | options
        moved = NUM_ROWS * width * ITEM_BYTES[dtype]
        alone = "residual_ptr" in options
        forward = (norms._fwd_walk_kernel, norms.WALK_CONFIGURATION)
        if width <= norms.MAX_WHOLE:
            forward = (norms._fwd_kernel, norms.fwd_configuration(width))
        backward = (norms._bwd_walk_kernel, norms.WALK_CONFIGURATION)
        if width <= norms.MAX_WHOLE_BWD:
            backward = (norms._bwd_kernel, norms.bwd_configuration(width))
        for op, (function, configuration), min_warps, num_bytes in (
            ("norm", forward, 16, (2 if alone else 4) * moved),
            ("norm_bwd", backward, 8, (3 if alone else 4) * moved),  # at most 16 are launched
        ):
            yield Case(
                op,
                f"{name}, {dtype} {width}",
                target,
                function,
                configuration,
                arguments_of(function, given),
                min_warps,
                16 if "odd" in name else 0,  # of an address for each element
                num_bytes,
                load_bits=0 if set(_SINGLY) & {*name.replace(",", "").split()} else 128,
            )
    for dtype in ("bf16", "fp32"):
        given = {"out_ptr": f"*{dtype}:16", "num_parts": "i32"}
        yield Case(
            "norm_bwd",
            f"merge, {dtype}",
            target,
            norms._merge_kernel,
            norms.MERGE_CONFIGURATION,
            arguments_of(norms._merge_kernel, given),
            16,
            0,
            4 * norms.MAX_PARTS * HIDDEN_SIZE,
        )

"""Cases of the gated activation. Size of the floors: I = 14336 (an 8B model's)."""

from collections.abc import Iterator
from typing import Any

from fuserl_kernels import triton_glu
from fuserl_kernels.compile_cases.case import ITEM_BYTES, NUM_ROWS, Case, arguments_of
from fuserl_kernels.reference.glu import ACTIVATIONS

_SIZE = 14336


def cases(target: str) -> Iterator[Case]:
    variants: list[tuple[str, str, str, dict[str, Any]]] = [
        (f"bf16 {activation}", "bf16", activation, {}) for activation in ACTIVATIONS
    ]
    odd = {"size": "i32", "row_stride": "i32", "grad_stride": "i32"}
    variants.append(("fp32 odd sizes", "fp32", "silu", odd))
    for variant, dtype, activation, given in variants:
        for op, backward in (("glu", False), ("glu_bwd", True)):
            pointer = f"*{dtype}:16"
            types = {
                "gate_up_ptr": pointer,
                "grad_ptr": pointer if backward else None,
                "out_ptr": pointer,
                "ACTIVATION": activation,
            }
            yield Case(
                op,
                variant,
                target,
                triton_glu._glu_kernel,
                triton_glu.CONFIGURATION,
                arguments_of(triton_glu._glu_kernel, types | given),
                32,
                0,
                (5 if backward else 3) * NUM_ROWS * _SIZE * ITEM_BYTES[dtype],
                load_bits=0 if given else 128,
            )

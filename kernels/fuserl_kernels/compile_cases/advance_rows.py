"""Cases of a decode step's bookkeeping. Size of the floors: B = 256 rows."""

from collections.abc import Iterator
from typing import Any

from fuserl_kernels import triton_advance_rows
from fuserl_kernels.compile_cases.case import Case, arguments_of

_NUM_ROWS = 256
_FLOATS = ("logprobs_ptr", "truncated_ptr", "logprob_rows_ptr", "truncated_rows_ptr")
_TABLES = ("is_stop_ptr", "is_flag_ptr")


def cases(target: str) -> Iterator[Case]:
    kernel = triton_advance_rows._advance_kernel
    types: dict[str, Any] = {name: "*i64:16" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= dict.fromkeys(_FLOATS, "*fp32:16") | dict.fromkeys(_TABLES, "*i1:16")
    types |= dict.fromkeys(("num_rows", "num_slots", "capacity", "num_positions"), "i32")
    for variant, given in (
        ("stops and flags", {}),
        ("limits alone", dict.fromkeys(_TABLES)),
    ):
        yield Case(
            "advance_rows",
            variant,
            target,
            kernel,
            triton_advance_rows.CONFIGURATION,
            arguments_of(kernel, types | given),
            16,
            0,
            154 * _NUM_ROWS,  # 58 bytes read, 96 written
        )

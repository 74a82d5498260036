"""What the compile gate compiles: one kernel, one configuration, and typical arguments.

A case's arguments are Triton's type names ("*bf16", "i32", "fp32"; with ":16" where a pointer or a
size is a multiple of 16, as it is in training), or values the compiler knows (None for an absent
tensor, a stride of 1, a constexpr). Sizes of the floors: N = 8192, V = 128256, D = 4096.
"""

from dataclasses import dataclass
from typing import Any

from fuserl_kernels.triton_runtime import Configuration

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
NUM_ROWS, VOCAB_SIZE, HIDDEN_SIZE = 8192, 128256, 4096
BYTES_A_SECOND = 4.3e12  # an H200's copy bandwidth, measured, reads and writes counted
MATRIX_FLOPS = 790e12  # its bf16 product rate, measured on random data
VECTOR_FLOPS = 67e12  # its float32 rate by the data sheet
ITEM_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
_NUMBERS = "temperature softcap clip_low clip_high dual_clip kl_coef entropy_coef".split()


@dataclass(frozen=True)
class Case:
    """One kernel with one configuration and one set of argument types, for one target.

    min_warps: resident warps a multiprocessor, at least, as the occupancy calculation gives them.
    max_spill_bytes: stack of a thread, at most.
    load_bits: the width of a thread's loads of global memory, but for a few scalars; 0: any.
    tensor_cores: the instruction that the products are, "HGMMA" or "HMMA"; "": any.
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
    load_bits: int = 0
    tensor_cores: str = ""

    def floor_ms(self) -> float:
        """Time at an H200's measured limits, in milliseconds."""
        return 1e3 * max(
            self.num_bytes / BYTES_A_SECOND,
            self.num_flops / self.flops_a_second,
        )


def arguments_of(function: Any, given: dict[str, Any]) -> dict[str, Any]:
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

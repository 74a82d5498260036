"""What the compile gate compiles: every Triton kernel, by family."""

from fuserl_kernels.compile_cases import (
    advance_rows,
    advantages,
    decode_attention,
    glu,
    logprobs,
    losses,
    norms,
    rotary,
    sampling,
)
from fuserl_kernels.compile_cases.case import TARGETS, Case

__all__ = ["TARGETS", "Case", "cases"]


def cases(target: str) -> list[Case]:
    """Every case for one of TARGETS."""
    families = (
        logprobs,
        advantages,
        losses,
        norms,
        sampling,
        rotary,
        glu,
        decode_attention,
        advance_rows,
    )
    return [case for family in families for case in family.cases(target)]

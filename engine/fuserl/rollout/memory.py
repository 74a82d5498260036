"""Telling that memory ran out from every other error."""

import torch

_MESSAGES = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Of errors that have no type of their own: torch's allocator on the CPU; the driver under Triton
and under a capture; cuBLAS."""


def is_out_of_memory(error: BaseException, handled: BaseException | None = None) -> bool:
    """Of the device or of the CPU. An error that came up while one of these was handled is one:
    ending a capture that ran out of memory may fail in turn. handled: what the caller was handling
    already, which says nothing of this error."""
    if error is handled:
        return False
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES):
        return True
    return error.__context__ is not None and is_out_of_memory(error.__context__, handled)

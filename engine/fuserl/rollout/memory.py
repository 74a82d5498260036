"""Telling that memory ran out from every other error."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device or of the CPU, whose allocator of torch's raises a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)

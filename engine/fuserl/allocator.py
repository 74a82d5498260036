"""How the process keeps memory that a step of training frees and the next one wants again."""

import ctypes

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed instead of giving it back to the system.

    A step frees its activations, tens of megabytes a tensor, and takes the same again: each time
    the system would hand out cleared pages anew, which costs a CPU up to a quarter of a step. The
    process holds its peak from then on. Returns whether there is such a setting: elsewhere (musl,
    macOS) nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, _NEVER) and mallopt(_M_MMAP_MAX, 0))

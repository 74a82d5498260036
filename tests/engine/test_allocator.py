"""Freed memory stays with the process: the same block again costs no page fault."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FAULTS = """
import ctypes, resource, sys
if sys.argv[1] == "keep":
    from fuserl.allocator import keep_freed_memory
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
size = 64 << 20
def take():
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
take()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    take()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_a_block_that_was_freed_is_there_again() -> None:
    def faults(mode: str) -> int:
        path = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels")])
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, mode],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        return int(done.stdout)

    assert faults("keep") < 50
    assert faults("plain") > 500, "without it every block is faulted in anew"

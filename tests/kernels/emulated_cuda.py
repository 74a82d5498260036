"""Kernels of csrc/cuda compiled as plain C++ and run on the CPU; cuda_emulation/ tells how."""

import ctypes
import functools
import os
import shutil
import subprocess
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent / "cuda_emulation"
_SOURCES = Path(__file__).parents[2] / "csrc"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # of csrc/cpu/dtype.h
_FLAGS = [
    "-std=c++20",
    "-O2",
    "-ffp-contract=off",  # as nvcc's -fmad=false
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",  # which takes a switch of fibers for a broken stack
    "-Wno-unknown-pragmas",
]


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build(folder: Path) -> ctypes.CDLL:
    """The GPU sampler as a library for the CPU."""
    library = folder / "sampling.so"
    done = subprocess.run(
        [
            *(compiler(), *_FLAGS, "-shared", "-fPIC", "-I", _FOLDER, "-I", _SOURCES),
            *(_FOLDER / "sampling.cpp", "-o", library),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def sampler(library: ctypes.CDLL, descending: bool = False):
    """`sample_native` on the emulated GPU; descending: the order of a block's threads."""
    return functools.partial(_sample, library, descending)


def _sample(
    library, descending, logits, temperature, top_k, top_p, min_p, seed, request_ids, positions
):
    assert logits.stride(1) == 1 or logits.shape[1] == 1
    num_rows, vocab_size = logits.shape
    token_ids = logits.new_empty(num_rows, dtype=torch.int64)
    logprobs = logits.new_empty(num_rows, dtype=torch.float32)
    truncated = torch.empty_like(logprobs)
    size, address, real = ctypes.c_int64, ctypes.c_void_p, ctypes.c_double
    library.sample_tokens(
        address(logits.data_ptr()),
        _DTYPES[logits.dtype],
        size(num_rows),
        size(vocab_size),
        size(logits.stride(0)),
        real(temperature),
        size(top_k),
        real(top_p),
        real(min_p),
        ctypes.c_uint64(seed),
        address(request_ids.data_ptr()),
        address(positions.data_ptr()),
        address(token_ids.data_ptr()),
        address(logprobs.data_ptr()),
        address(truncated.data_ptr()),
        ctypes.c_bool(descending),
    )
    return token_ids, logprobs, truncated


def row_sums(library: ctypes.CDLL, logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """The sums of exponentials of contiguous float32 rows, as the sampler takes them."""
    sums = logits.new_empty(len(logits))
    library.row_sums(
        ctypes.c_void_p(logits.data_ptr()),
        *logits.shape,
        ctypes.c_float(temperature),
        ctypes.c_void_p(sums.data_ptr()),
    )
    return sums

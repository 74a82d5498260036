"""Lets the kernel tests import kernel_testing.py beside them, whatever pytest's import mode, and
gives them each instruction set of the native kernels."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuserl_kernels import native

sys.path.insert(0, str(Path(__file__).parent))


def instruction_sets() -> list[str]:
    """The sets this machine has, the best first; "baseline" is always the last."""
    if native.why_absent() is not None:
        return ["none"]
    best = native.module().build_info()["instructions"]
    names = ["avx512", "avx2", "baseline"]
    return names[names.index(best) :]


@pytest.fixture(params=instruction_sets())
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    module = native.module()
    best = module.build_info()["instructions"]
    module.set_instruction_set(request.param)
    yield request.param
    module.set_instruction_set(best)

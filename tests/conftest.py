"""Fixtures every test shares: a fixed seed, and uninitialised memory that is visibly wrong. What
each test came to is written where it is asked for (outcome_report.py)."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import outcome_report

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter; it is asked for before anything imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# cuBLAS reads this when it starts; without it deterministic mode warns of each product on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_SMALL_BLOCKS, _SMALL_BYTES = 32, 1 << 20  # of the allocator's pool for tensors of up to 1 MiB
_LARGE_BYTES = 256 << 20


@pytest.fixture(autouse=True)
def _seed_and_poison(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed torch, and make memory that nobody wrote fail a comparison.

    On the CPU deterministic mode fills each torch.empty with NaN. On a GPU that would add launches
    to what a test counts, captures or waits for, and replace the library's kernels by slower ones:
    there the allocator is given blocks full of NaN to hand out instead. Tests marked `large` begin
    with nothing of this process on the device, and leave nothing there."""
    torch.manual_seed(0)
    if request.node.get_closest_marker("gpu") is None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        yield
        torch.use_deterministic_algorithms(False)
        return
    large = request.node.get_closest_marker("large") is not None
    if large:
        _free_device_memory()
    else:
        _leave_poison()
    yield
    _leave_if_device_is_lost()
    if large:
        _free_device_memory()


def _leave_poison() -> None:
    sizes = [*[_SMALL_BYTES] * _SMALL_BLOCKS, _LARGE_BYTES]
    blocks = [torch.full((size,), 255, dtype=torch.uint8, device="cuda") for size in sizes]
    del blocks  # bytes of 255 are NaN in every floating dtype, and -1 in every signed one


def _leave_if_device_is_lost() -> None:
    """After an illegal access every later call of this process fails, whichever op it is of. A
    worker of xdist then ends with the test that did it, and another one takes the rest."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        raise


def _free_device_memory() -> None:
    # What Python keeps of the last failure, for a debugger, holds that test's tensors.
    for name in ("last_exc", "last_type", "last_value", "last_traceback"):
        sys.__dict__.pop(name, None)
    gc.collect()
    torch.cuda.empty_cache()


def pytest_addoption(parser: pytest.Parser) -> None:
    outcome_report.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    outcome_report.register(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    outcome_report.select(config, items)
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        # Not by keyword: those hold the names of folders too.
        if item.get_closest_marker("gpu") is not None:
            item.user_properties.append(("ops", outcome_report.ops_of(item)))
            if not torch.cuda.is_available():
                item.add_marker(skip)

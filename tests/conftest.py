"""Fixtures every test shares: a fixed seed, and uninitialised memory that is visibly wrong."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter; it is asked for before anything imports Triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed_and_poison() -> Iterator[None]:
    """Seed torch; in deterministic mode torch.empty is filled with NaN, so that an output
    nobody wrote cannot pass a comparison."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        # Not by keyword: those hold the names of folders too.
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)

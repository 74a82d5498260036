"""Running a model on one sequence or some, for tests."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fuserl.model.packing import Packing


def run(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """What a model gives for sequences packed end to end: [N, ...]."""
    token_ids = torch.tensor([token for row in rows for token in row])
    return model(token_ids, Packing.of([len(row) for row in rows]))


def run_one(model: Any, row: Sequence[int]) -> Tensor:
    """What a model gives for one sequence alone: [len(row), ...]."""
    return run(model, [row])

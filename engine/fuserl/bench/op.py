"""What a benchmark knows of an op: its problem, its cost, ours, and the rivals."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fuserl.bench.case import PASSES, Case, Cost
from fuserl.bench.problem import Problem
from fuserl.bench.rivals import Make

BASELINE = "torch"
"""The first rival of each op, to which the others' times are compared."""


@dataclass(frozen=True, slots=True)
class Provider:
    """backend: the implementation of ours that runs inside, forward and backward."""

    name: str
    make: Make
    backend: str | None = None

    @property
    def is_ours(self) -> bool:
        return self.backend is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of a case; 0 for a dimension that the op does not have."""

    num_rows: int = 0
    vocab_size: int = 0
    hidden_size: int = 0
    num_sequences: int = 0
    num_slots: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    num_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """defaults, dtypes: by device. passes: what "all" times. options: fields of Case that the op
    takes, with what they are unless asked for."""

    problem: Callable[[Case], Problem]
    cost: Callable[[Case], Cost]
    ours: Make
    rivals: Mapping[str, Make]
    defaults: Mapping[str, Sizes]
    dtypes: Mapping[str, str] = field(default_factory=lambda: {"cpu": "fp32", "cuda": "bf16"})
    passes: tuple[str, ...] = PASSES
    has_gradient: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

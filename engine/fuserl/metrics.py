"""Metrics of a run: means without a sync, and metrics.jsonl, one line a step."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Metrics = Mapping[str, float | int | Tensor]


class MetricsLog:
    """Appends to a JSONL file. Lines after `first_step` of an earlier run are cut off, so that a
    resumed run leaves the same file as one that was never interrupted."""

    def __init__(self, path: Path, stage: str, first_step: int) -> None:
        self.path, self.stage = path, stage
        kept = [line for line in read_metrics(path) if first_step and line["step"] <= first_step]
        new = path.with_name(f".{path.name}.new")
        new.write_text("".join(json.dumps(line) + "\n" for line in kept))
        new.replace(path)

    def write(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Append one line and return its numbers. This is where 0-d tensors become floats."""
        numbers = {name: float(value) for name, value in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"stage": self.stage, "step": step, **numbers}) + "\n")
        return numbers


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, oldest first; none if it does not exist. A last line that a
    kill left unfinished is passed over."""
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


class WeightedMean:
    """Means of 0-d metrics over parts of unequal weight, without a sync."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        self._weights: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))

    def add(self, metrics: Mapping[str, Tensor], weight: Tensor | float) -> None:
        for name, value in metrics.items():
            self._sums[name] = self._sums[name].to(value.device) + weight * value
            self._weights[name] = self._weights[name].to(value.device) + weight

    def mean(self) -> dict[str, Tensor]:
        return {
            name: total / self._weights[name].clamp(min=1e-30) for name, total in self._sums.items()
        }

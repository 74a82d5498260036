"""Epochs of minibatches with accumulation: the loop under SFT and the reward model.

An objective says what a row weighs (its tokens, its pairs) and what the mean loss of some rows
is. The loop divides by the weight of the whole optimizer step, so cutting it into microbatches
changes memory and nothing else.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fuserl.config import TrainConfig
from fuserl.data.batching import epoch_batches
from fuserl.metrics import WeightedMean
from fuserl.optimizer import Optimizer
from fuserl.run import Run


class Objective(Protocol):
    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each row: rows of like length are batched together."""

    def weight(self, rows: Sequence[int]) -> int:
        """What these rows count in a mean over rows."""

    def loss(self, rows: Sequence[int]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Mean loss of these rows, 0-d, and metrics that are means too."""


@dataclass(frozen=True, slots=True)
class PlannedStep:
    objective: Objective
    rows: list[int]
    ends_epoch: bool


def plan_epochs(
    objectives: Sequence[Objective], batch_size: int, *, seed: int
) -> list[PlannedStep]:
    """Every optimizer step of a run, one epoch for each objective in turn."""
    plan = []
    for epoch, objective in enumerate(objectives):
        batches = epoch_batches(objective.lengths, batch_size, seed=seed, epoch=epoch)
        plan += [
            PlannedStep(objective, rows, ends_epoch=i == len(batches) - 1)
            for i, rows in enumerate(batches)
        ]
    return plan


def train_on(
    run: Run,
    plan: Sequence[PlannedStep],
    optimizer: Optimizer,
    config: TrainConfig,
    *,
    validate: Callable[[], Mapping[str, Tensor]],
    validate_every: int = 0,
    show: tuple[str, ...] = ("loss/train",),
) -> dict[str, float]:
    """Run the plan's remaining steps. Validates before the first step, after each epoch, and
    every `validate_every` steps; returns the last validation's numbers."""
    validation: dict[str, float] = {}
    for step in run.steps():
        if step == 0:
            run.log(-1, validate())
        planned = plan[step]
        began = time.perf_counter()
        metrics = _optimizer_step(planned, optimizer, config.microbatch_size)
        num_tokens = sum(planned.objective.lengths[row] for row in planned.rows)
        metrics["throughput/tokens_per_second"] = torch.tensor(
            num_tokens / (time.perf_counter() - began)
        )
        if planned.ends_epoch or (validate_every and (step + 1) % validate_every == 0):
            found = validate()
            metrics.update(found)
            validation = {name: float(value) for name, value in found.items()}
        run.log(step, metrics, show=show)
    return validation or {name: float(value) for name, value in validate().items()}


def _optimizer_step(
    planned: PlannedStep, optimizer: Optimizer, microbatch_size: int
) -> dict[str, Tensor]:
    objective, rows = planned.objective, planned.rows
    total = objective.weight(rows)
    means = WeightedMean()
    for first in range(0, len(rows), microbatch_size):
        part = rows[first : first + microbatch_size]
        weight = objective.weight(part)
        loss, metrics = objective.loss(part)
        (loss * (weight / total)).backward()
        means.add({"loss/train": loss.detach(), **metrics}, weight)
    return {**means.mean(), **optimizer.step()}


@torch.no_grad()
def evaluate_on(objective: Objective | None, batch_size: int) -> dict[str, Tensor]:
    """Mean loss and metrics over all rows, named validation/...; nothing for no objective."""
    if objective is None:
        return {}
    order = sorted(range(len(objective.lengths)), key=objective.lengths.__getitem__)
    means = WeightedMean()
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        loss, metrics = objective.loss(rows)
        means.add({"loss": loss, **metrics}, objective.weight(rows))
    return {f"validation/{name.split('/')[-1]}": value for name, value in means.mean().items()}

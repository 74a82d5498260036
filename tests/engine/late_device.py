"""A CPU that behaves as a CUDA device does towards a runner: steps run in captured sizes, several
in a row, and the host learns of them one look late."""

from collections.abc import Callable

import pytest
from torch import Tensor

from fuserl.model.cache import CacheShape
from fuserl.model.heads import LanguageModel
from fuserl.rollout import engine, module_runner
from fuserl.rollout.captured_step import bucket_of
from fuserl.rollout.live_rows import LiveRows
from fuserl.rollout.module_runner import ModuleRunner
from fuserl.rollout.runner import RunnerOptions


class Replays:
    """CapturedSteps without graphs: a replay is a call."""

    def __init__(self, rows: LiveRows) -> None:
        self._rows = rows
        self.sizes: list[tuple[int, int, int]] = []  # rows, those of the graph, steps
        self.prepared: list[int] = []  # for how many rows

    @property
    def num_steps(self) -> int:
        return sum(steps for _, _, steps in self.sizes)

    def prepare(self, step: Callable[[int], None], num_rows: int) -> None:
        self.prepared.append(num_rows)

    def replay(self, step: Callable[[int], None], num_rows: int, num_steps: int) -> None:
        size = bucket_of(num_rows, len(self._rows.slots))
        self.sizes.append((num_rows, size, num_steps))
        self._rows.slots[num_rows:size] = -1
        for _ in range(num_steps):
            step(size)


class LatePoll:
    """Poll as it is on CUDA."""

    def __init__(self, counts: Tensor) -> None:
        self._counts = counts
        self.restart()

    def restart(self) -> None:
        self._pending = [0] * len(self._counts)

    def look(self) -> list[int]:
        before, self._pending = self._pending, self._counts.tolist()
        return before


class LateRunner(ModuleRunner):
    graphs: Replays  # type: ignore[assignment]

    def __init__(self, model: LanguageModel, shape: CacheShape, options: RunnerOptions) -> None:
        super().__init__(model, shape, options)
        self.graphs = Replays(self.rows)


def use_late_device(monkeypatch: pytest.MonkeyPatch) -> list[LateRunner]:
    """From here on rollouts run so; the runners are listed as they are made."""
    made: list[LateRunner] = []

    def make(model: LanguageModel, shape: CacheShape, options: RunnerOptions) -> LateRunner:
        made.append(LateRunner(model, shape, options))
        return made[-1]

    monkeypatch.setattr(engine, "make_runner", lambda model: make)
    monkeypatch.setattr(module_runner, "Poll", LatePoll)
    monkeypatch.setattr(engine, "STEPS_BETWEEN_CALLS", engine.STEPS_BETWEEN_CALLS_ON_CUDA)
    return made

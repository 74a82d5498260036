"""Poll: what a look answers, and that no copy is read while it may be written. The device is
simulated: what was asked of it happens when an event is waited for."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fuserl.rollout import polling
from fuserl.rollout.polling import Poll


def test_a_cpu_is_asked_at_once() -> None:
    counts = torch.tensor([0, 0])
    poll = Poll(counts)
    assert poll.look() == [0, 0]
    counts += torch.tensor([3, 1])
    assert poll.look() == [3, 1]


class Device:
    """A queue of copies, which an event runs up to where it was recorded."""

    def __init__(self) -> None:
        self.values = [0, 0]
        self.queue: list[Any] = []
        self.done = 0
        self.num_pinned = self.num_waits = 0

    def counts(self) -> Any:
        return SimpleNamespace(device=torch.device("cuda"), device_of=self)

    def pinned(self, _: Any) -> "Copy":
        self.num_pinned += 1
        return Copy(self)

    def event(self) -> "Event":
        return Event(self)


class Copy:
    def __init__(self, device: Device) -> None:
        self.device, self.held, self.is_pending = device, [-1, -1], False

    def __len__(self) -> int:
        return len(self.held)

    def copy_(self, counts: Any, non_blocking: bool) -> None:
        assert non_blocking
        assert counts.device_of is self.device
        assert not self.is_pending, "a second copy on its way into the same memory"
        values = list(self.device.values)
        self.is_pending = True
        self.device.queue.append(lambda: self.__dict__.update(held=values, is_pending=False))

    def tolist(self) -> list[int]:
        assert not self.is_pending, "read before it arrived"
        return self.held


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, 0

    def record(self, stream: str) -> None:
        assert stream == "current"
        self.at = len(self.device.queue)

    def synchronize(self) -> None:
        self.device.num_waits += 1
        for run in self.device.queue[self.device.done : self.at]:
            run()
        self.device.done = max(self.device.done, self.at)


def test_a_device_is_asked_one_look_late(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(polling, "_pinned_like", device.pinned)
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: "current")
    poll = Poll(device.counts())
    for run in range(3):
        poll.restart()
        seen = []
        for value in range(1, 6):
            device.values = [10 * run + value, value]
            seen.append(poll.look())
        assert seen == [[0, 0], *([10 * run + value, value] for value in range(1, 5))]
        for copy in device.queue[device.done :]:  # the run's end waits for the device
            copy()
        device.done = len(device.queue)
    assert device.num_pinned == 2, "allocated once, for all runs"
    assert device.num_waits == 3 * 4

"""Ctrl-C and SIGTERM as a question the loops ask, so that a run stops where nothing is lost."""

import signal
import threading
from types import FrameType, TracebackType

EXIT_CODE = 130
"""Of a command that was interrupted and saved: 128 + SIGINT, as shells count."""


class Interrupted(Exception):
    """The run was asked to stop. The message says what was saved and how to go on."""


class InterruptFlag:
    """While entered, the first SIGINT or SIGTERM sets a flag and the second one kills.

    Signals reach only the main thread; elsewhere the flag stays down and Python's own handling
    is left alone.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.requested:
            raise Interrupted("interrupted")

    def __enter__(self) -> "InterruptFlag":
        if threading.current_thread() is threading.main_thread():
            for number in self._SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

"""Ctrl-C and SIGTERM as requests: a run notices them at the next step, saves, and ends."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TypeVar

Result = TypeVar("Result")
# The terminal and torchrun may both pass on one Ctrl-C, within milliseconds.
_SAME_REQUEST_S = 1.0


class _WorkAborted(BaseException):
    """Raised in the middle of work that may be given up."""


class StopSignal:
    """``with StopSignal() as stop``: while it lasts, signals set ``stop.asked``.

    A second Ctrl-C, not at once, raises KeyboardInterrupt as usual. In another thread than the main one, where Python
    allows no handlers, signals are left alone.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._abortable = False
        self._previous: dict[signal.Signals, object] = {}

    @property
    def asked(self) -> bool:
        return self._asked_at is not None

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                self._previous[name] = signal.signal(name, self._handle)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for name, handler in self._previous.items():
            signal.signal(name, handler)  # pyright: ignore[reportArgumentType]

    def unless_asked(self, work: Callable[[], Result]) -> Result | None:
        """Does the work, which must change nothing, and gives it up (None) once a signal comes."""
        try:
            try:
                self._abortable = True
                return None if self.asked else work()
            finally:
                self._abortable = False
        except _WorkAborted:  # also if the signal came between the work's end and the line above
            return None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        elif number == signal.SIGINT and now - self._asked_at > _SAME_REQUEST_S:
            raise KeyboardInterrupt
        if self._abortable:
            self._abortable = False
            raise _WorkAborted

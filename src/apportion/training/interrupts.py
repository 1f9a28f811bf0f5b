"""Ctrl-C and SIGTERM wait for the end of a step, where the run can be saved exactly."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class Interrupts:
    """Whether somebody asked this run to stop."""

    def __init__(self) -> None:
        self.requested = False

    def request(self, _signal: int, _frame: FrameType | None) -> None:
        """Signal handler: the first signal asks, a second one stops at once."""
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@contextlib.contextmanager
def held_interrupts() -> Iterator[Interrupts]:
    """Within the block SIGINT and SIGTERM only set ``requested``; a second one raises KeyboardInterrupt.

    Signals that the process ignores (``nohup``, background jobs) stay ignored. Outside the main thread, where Python
    delivers no signals, nothing changes.
    """
    interrupts = Interrupts()
    previous: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # None: a handler that was not set from Python, which could not be put back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, interrupts.request)
    try:
        yield interrupts
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

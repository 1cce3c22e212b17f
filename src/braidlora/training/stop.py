"""SIGTERM and Ctrl-C: finish the step, save, and leave with the signal's own exit code."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from braidlora.errors import Interrupted


class StopRequest:
    """Records a signal. While `deferred`, the work continues to its next safe point; otherwise it ends at once."""

    def __init__(self) -> None:
        self.signal_number = 0
        self.deferred = False

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        # Schedulers, and process pools after one of their workers has ended, send SIGTERM more than once; a person
        # who presses Ctrl-C twice does not want to wait for a save.
        hurried = self.signal_number != 0 and number == signal.SIGINT
        self.signal_number = number
        if not self.deferred or hurried:
            raise self.interrupted("stopped at once")

    def interrupted(self, what: str) -> Interrupted:
        name = signal.Signals(self.signal_number).name
        return Interrupted(f"{what} by {name}; --resume auto continues.", self.signal_number)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Catch SIGTERM and SIGINT in this block; outside the main thread Python cannot, and nothing is caught."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

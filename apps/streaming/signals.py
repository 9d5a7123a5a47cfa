"""The signals that a running stream hears."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["stream_signals"]


@contextmanager
def stream_signals(request_stop: Callable[[str], None], hang_up: Callable[[], None]) -> Iterator[None]:
    """SIGHUP asks for a reload; the first SIGINT or SIGTERM for a clean end, the second ends the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = False

    def handle(number: int, _: object) -> None:
        nonlocal seen
        if number == signal.SIGHUP:
            hang_up()
            return
        if seen:
            os._exit(128 + number)
        seen = True
        request_stop(signal.Signals(number).name)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

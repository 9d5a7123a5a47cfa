"""Waiting for what another thread or process does, as long as a busy machine may need.

A limit costs nothing where the thing happens, so it is far above what a quiet machine takes. Where a test is about a
promised time, the promise stands in the test, and `SLACK_S` is what the machine may add to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

__all__ = ["PATIENCE_S", "SLACK_S", "eventually"]

PATIENCE_S = 60.0
"""For what takes a second or two on a machine of its own."""

SLACK_S = 10.0
"""On top of a promised time, where the promise broken would be without end, or half a minute."""

_POLL_S = 0.01


def eventually(
    condition: Callable[[], Any], timeout_s: float = PATIENCE_S, shown: Callable[[], object] = lambda: ""
) -> None:
    """Returns once `condition` holds; fails after `timeout_s`, and says what `shown` gives."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s {shown()}".rstrip()
        time.sleep(_POLL_S)

"""``/healthz`` and ``/readyz``: what a service manager or an orchestrator acts on.

*Healthy* is about the process alone: its loop turns. A supervisor restarts what is not healthy, and a
restart mends no camera, so the sources do not count.

*Ready* means that the app does its work: at least one source has a young frame, and the engine has
answered for a young frame. One of eight cameras being away does not make the app unready, since the
other seven are served; which camera is away stands in the answer, and `edgefold_source_state` is what to
alert on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apps.streaming.contracts import SourceState, SourceView, StreamView

__all__ = ["HEARTBEAT_LIMIT_S", "READY_LIMIT_S", "Verdict", "health", "readiness"]

HEARTBEAT_LIMIT_S = 10.0
"""The loop turns ten times a second; it stands while the engine of a busy machine takes its time."""
READY_LIMIT_S = 5.0
"""As old as a frame gets before its capture is restarted, see `CaptureLimits.stall_s`."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Yes or no, with the reasons."""

    ok: bool
    reasons: tuple[str, ...]
    """Why not; of readiness also what is wrong but tolerated."""
    sources: dict[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """The body of the answer."""
        body: dict[str, Any] = {"ok": self.ok, "reasons": list(self.reasons)}
        if self.sources is not None:
            body["sources"] = self.sources
        return body


def health(heartbeat_age_s: float) -> Verdict:
    """Whether the runtime's loop turns."""
    if heartbeat_age_s <= HEARTBEAT_LIMIT_S:
        return Verdict(True, ())
    return Verdict(
        False,
        (
            f"the runtime has given no sign of life for {heartbeat_age_s:.0f} s (limit {HEARTBEAT_LIMIT_S:.0f} s)",
        ),
    )


def readiness(view: StreamView, now_ns: int) -> Verdict:
    """Whether frames come and are answered.

    Args:
        view: the app.
        now_ns: monotonic.
    """
    sources = {source.status.source_id: _frame_state(source, now_ns) for source in view.sources}
    waiting = {name: reason for name, reason in sources.items() if reason != "ready"}
    reasons = [f"{name}: {reason}" for name, reason in waiting.items()]
    answered_ns = [source.latest.timestamp_ns for source in view.sources if source.latest is not None]
    answered = bool(answered_ns) and now_ns - max(answered_ns) <= READY_LIMIT_S * 1e9
    if not answered_ns:
        reasons.append("engine: it has not answered yet")
    elif not answered:
        age_s = (now_ns - max(answered_ns)) / 1e9
        reasons.append(
            f"engine: its last answer is for a frame {age_s:.1f} s old (limit {READY_LIMIT_S:.0f} s)"
        )
    return Verdict(answered and len(waiting) < len(sources), tuple(reasons), sources)


def _frame_state(source: SourceView, now_ns: int) -> str:
    status = source.status
    because = f": {status.reason}" if status.reason else ""
    if status.state is SourceState.ENDED:
        return "ended"
    if status.last_frame_ns is None:
        return f"no frame yet, {status.state.value}{because}"
    age_s = (now_ns - status.last_frame_ns) / 1e9
    if age_s > READY_LIMIT_S:
        return f"last frame {age_s:.1f} s ago (limit {READY_LIMIT_S:.0f} s), {status.state.value}{because}"
    return "ready"

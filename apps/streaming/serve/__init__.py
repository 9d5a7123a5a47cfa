"""The page of the camera app: live video, states and latencies; ``/metrics``, ``/healthz``, ``/readyz``.

::

    runtime ─publish─▶ hub ─one JPEG a picture─▶ video clients      (a slot a source, newest wins)
    session ─StreamView─▶ /api/events, /api/view, /metrics, /readyz  (asked for, never pushed)

Everything runs in a thread of its own with its own event loop; what the runtime calls (`hub`, `beat`,
`events`) takes a lock for the length of an assignment and never waits for a client.

Importing this package costs nothing: aiohttp and prometheus-client are imported when a `PageServer` is made.
"""

from apps.streaming.serve.credentials import make_token
from apps.streaming.serve.recent import RecentEvents
from apps.streaming.serve.server import PageServer

__all__ = ["PageServer", "RecentEvents", "make_token"]

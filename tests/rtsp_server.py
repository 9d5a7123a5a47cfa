"""A real RTSP server on loopback, for tests: GStreamer's, run by the system's Python.

    with rtsp_server(password="secret") as server:
        parse_source(server.url("/video"))

It serves ``/video`` (H.264, `size_wh`, the test picture) and ``/audio`` (PCM, no video), both without
end; every client has an encoder of its own, so that none meets another's tear-down. Needs Debian's ``python3-gi gir1.2-gst-rtsp-server-1.0 gstreamer1.0-plugins-base
gstreamer1.0-plugins-good gstreamer1.0-plugins-ugly``; `missing` says what is not there.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

__all__ = ["RtspServer", "missing", "rtsp_server"]

_SYSTEM_PYTHON = "/usr/bin/python3"
_START_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class RtspServer:
    """A running server. `pid` may be stopped and continued, to play a camera that hangs."""

    port: int
    pid: int
    scheme: str = "rtsp"

    def url(self, path: str = "/video", userinfo: str = "") -> str:
        """Of one of its streams; `userinfo` is ``user:password``, percent-encoded."""
        return f"{self.scheme}://{userinfo}{'@' if userinfo else ''}127.0.0.1:{self.port}{path}"


@cache
def missing() -> str | None:
    """What this machine lacks to run the server; for `pytest.mark.skipif`."""
    check = (
        "import gi; gi.require_version('GstRtspServer', '1.0'); from gi.repository import Gst, GstRtspServer; "
        "Gst.init(None); "
        "print([n for n in ('x264enc', 'rtph264pay', 'alawenc', 'rtppcmapay') if not Gst.ElementFactory.find(n)])"
    )
    try:
        done = subprocess.run(
            [_SYSTEM_PYTHON, "-c", check], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no {_SYSTEM_PYTHON} with GstRtspServer: {error}"
    if done.returncode or done.stdout.strip() != "[]":
        return f"no GstRtspServer, or elements missing: {done.stdout.strip() or done.stderr.strip()[-200:]}"
    return None


@contextlib.contextmanager
def rtsp_server(
    *,
    port: int = 0,
    user: str = "camera",
    password: str | None = None,
    auth: Literal["basic", "digest"] = "digest",
    size_wh: tuple[int, int] = (320, 240),
    fps: int = 25,
    certificate: Path | None = None,
) -> Iterator[RtspServer]:
    """Starts the server and ends it.

    With a `password` it asks every client for it; with a `certificate` (PEM, its key in the same file) it
    speaks TLS, so that its URLs begin with ``rtsps``.
    """
    arguments = [str(port), user, password or "", auth, str(size_wh[0]), str(size_wh[1]), str(fps)]
    arguments.append("" if certificate is None else str(certificate))
    process = subprocess.Popen(
        [_SYSTEM_PYTHON, __file__, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTHON")},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("port "):
            raise RuntimeError(f"the RTSP server did not start: {line!r}")
        yield RtspServer(int(line.split()[1]), process.pid, "rtsp" if certificate is None else "rtsps")
    finally:
        process.kill()
        process.wait(_START_TIMEOUT_S)
        if process.stdout is not None:
            process.stdout.close()


def _serve(
    port: str, user: str, password: str, auth: str, width: str, height: str, fps: str, certificate: str
) -> None:
    """Runs in the system's Python until it is killed."""
    import gi

    gi.require_version("Gst", "1.0")
    gi.require_version("GstRtsp", "1.0")
    gi.require_version("GstRtspServer", "1.0")
    from gi.repository import Gio, GLib, Gst, GstRtsp, GstRtspServer

    Gst.init(None)
    server = GstRtspServer.RTSPServer.new()
    server.set_address("127.0.0.1")
    server.set_service(port)
    launches = {
        "/video": f"( videotestsrc is-live=true ! video/x-raw,width={width},height={height},framerate={fps}/1 "
        "! x264enc tune=zerolatency speed-preset=ultrafast key-int-max=10 ! rtph264pay name=pay0 pt=96 )",
        "/audio": "( audiotestsrc is-live=true ! audio/x-raw,rate=8000,channels=1 ! alawenc ! rtppcmapay name=pay0 pt=8 )",
    }
    for path, launch in launches.items():
        factory = GstRtspServer.RTSPMediaFactory.new()
        factory.set_launch(launch)
        if password or certificate:
            permissions = GstRtspServer.RTSPPermissions.new()
            permissions.add_permission_for_role("viewer", "media.factory.access", True)
            permissions.add_permission_for_role("viewer", "media.factory.construct", True)
            factory.set_permissions(permissions)
        server.get_mount_points().add_factory(path, factory)
    if password or certificate:
        checker = GstRtspServer.RTSPAuth.new()
        token = GstRtspServer.RTSPToken.new()
        token.set_string("media.factory.role", "viewer")
        if not password:
            checker.set_default_token(token)
        elif auth == "digest":
            checker.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
            checker.add_digest(user, password, token)
        else:
            checker.add_basic(GstRtspServer.RTSPAuth.make_basic(user, password), token)
        if certificate:
            checker.set_tls_certificate(Gio.TlsCertificate.new_from_file(certificate))
        server.set_auth(checker)
    if server.attach(None) == 0:
        raise SystemExit(f"port {port} cannot be listened on")
    print("port", server.get_bound_port(), flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    _serve(*sys.argv[1:])

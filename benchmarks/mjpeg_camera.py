"""A camera on loopback that can be told to misbehave: MJPEG over HTTP, as cheap cameras serve it.

The soak and the tests of faults look at it with the real command.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import socket
import threading
import time
from typing import Literal

import numpy as np
from PIL import Image

__all__ = ["Behaviour", "MjpegCamera"]

Behaviour = Literal[
    "well",
    "stalls",
    "closes",
    "401",
    "404",
    "503",
    "audio",
    "corrupt",
    "one column",
    "gray",
    "other size",
    "frozen",
]
_REFUSALS = {
    "401": 'HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm="camera"\r\n',
    "404": "HTTP/1.1 404 Not Found\r\n",
    "503": "HTTP/1.1 503 Service Unavailable\r\n",
    "audio": "HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\n",
}
_N_PICTURES = 16
Rgb = tuple[int, int, int]


class MjpegCamera:
    """Serves ``/video`` to any number of clients; `behaviour` may be changed while it runs.

    Args:
        fps: pictures a second.
        size_wh: of them; twice as large where it behaves as ``other size``.
        rgb: what they show, with a little texture; any colours where it is not given.
        other_rgb: what they show in the other size.
    """

    def __init__(
        self,
        fps: float = 10.0,
        size_wh: tuple[int, int] = (320, 240),
        rgb: Rgb | None = None,
        other_rgb: Rgb | None = None,
    ) -> None:
        self.behaviour: Behaviour = "well"
        self.n_sent = 0
        """Pictures, to all clients."""
        self.n_clients = 0
        """Connections so far."""
        self._counting = threading.Lock()
        self._period_s = 1.0 / fps
        width, height = size_wh
        self._well = [_jpeg(_texture(seed, rgb), size_wh) for seed in range(_N_PICTURES)]
        self._others = [
            _jpeg(_texture(seed, other_rgb), (2 * width, 2 * height)) for seed in range(_N_PICTURES)
        ]
        self._gray = [_jpeg(_texture(seed, rgb).convert("L"), size_wh) for seed in range(_N_PICTURES)]
        self._columns = [_jpeg(_texture(seed, rgb), (1, height)) for seed in range(_N_PICTURES)]
        self._server = socket.create_server(("127.0.0.1", 0))
        self._closed = threading.Event()
        threading.Thread(target=self._accept, name="mjpeg-camera", daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.getsockname()[1])

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}/video"

    def close(self) -> None:
        """Stops serving."""
        self._closed.set()
        # A thread in accept() keeps a closed socket listening; this ends it.
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            self.n_clients += 1
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.settimeout(5.0)
            client.recv(65536)
            if self.behaviour in _REFUSALS:
                head = _REFUSALS[self.behaviour]
                client.sendall(f"{head}Content-Length: 0\r\nConnection: close\r\n\r\n".encode())
                return
            client.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n"
            )
            for index in itertools.count():
                if self._closed.is_set() or self.behaviour == "closes" or self.behaviour in _REFUSALS:
                    return
                if self.behaviour != "stalls":
                    picture = self._picture(index % _N_PICTURES)
                    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
                    client.sendall(head.encode() + picture + b"\r\n")
                    with self._counting:
                        self.n_sent += 1
                time.sleep(self._period_s)

    def _picture(self, index: int) -> bytes:
        if self.behaviour == "corrupt":
            return self._well[index][:200] + bytes(100)
        if self.behaviour == "frozen":
            return self._well[0]
        shown = {"other size": self._others, "gray": self._gray, "one column": self._columns}
        return shown.get(self.behaviour, self._well)[index]


def _texture(seed: int, rgb: Rgb | None) -> Image.Image:
    """Six rows of eight colours: any, or those within 20 levels of `rgb`."""
    rng = np.random.default_rng(seed)
    if rgb is None:
        return Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    near = np.asarray(rgb) + rng.integers(-20, 21, (6, 8, 3))
    return Image.fromarray(np.clip(near, 0, 255).astype(np.uint8))


def _jpeg(texture: Image.Image, size_wh: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    texture.resize(size_wh, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()

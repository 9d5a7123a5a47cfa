"""A camera on loopback that can be told to misbehave: MJPEG over HTTP, as cheap cameras serve it."""

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

Behaviour = Literal["well", "stalls", "closes", "404", "corrupt", "other size", "frozen"]


class MjpegCamera:
    """Serves ``/video`` to any number of clients; `behaviour` may be changed while it runs."""

    def __init__(self, fps: float = 10.0, size_wh: tuple[int, int] = (320, 240)) -> None:
        self.behaviour: Behaviour = "well"
        self._period_s = 1.0 / fps
        self._pictures = [_jpeg(size_wh, seed) for seed in range(16)]
        self._others = [_jpeg((size_wh[0] * 2, size_wh[1] * 2), seed) for seed in range(16)]
        self._server = socket.create_server(("127.0.0.1", 0))
        self._closed = threading.Event()
        threading.Thread(target=self._accept, name="mjpeg-camera", daemon=True).start()

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._server.getsockname()[1]}/video"

    def close(self) -> None:
        """Stops serving."""
        self._closed.set()
        self._server.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            client.settimeout(5.0)
            client.recv(65536)
            if self.behaviour == "404":
                client.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            client.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n"
            )
            for index in itertools.count():
                if self._closed.is_set() or self.behaviour in ("closes", "404"):
                    return
                if self.behaviour != "stalls":
                    picture = self._picture(index)
                    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
                    client.sendall(head.encode() + picture + b"\r\n")
                time.sleep(self._period_s)

    def _picture(self, index: int) -> bytes:
        if self.behaviour == "corrupt":
            return self._pictures[index % 16][:200] + bytes(100)
        if self.behaviour == "other size":
            return self._others[index % 16]
        return self._pictures[0 if self.behaviour == "frozen" else index % 16]


def _jpeg(size_wh: tuple[int, int], seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size_wh, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()

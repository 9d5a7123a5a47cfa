"""Asks an RTSP server what it would send, before a decoder is let near it.

One DESCRIBE, again with credentials where it is refused without. The answer tells a wrong password
from a wrong path from a camera that sends sound only, and names the codec that a GStreamer pipeline
needs. No session is set up, so a camera that serves one client at a time is not occupied.

Sources: RFC 2326 sections 6, 7, 10.2 (RTSP 1.0, which cameras speak); RFC 8866 (SDP); RFC 3551
table 5 (static payload types).
"""

from __future__ import annotations

import re
import socket
import time
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from apps.streaming.sources.http_auth import Credentials, authorization
from apps.streaming.sources.network import connect, credentials_of, lost, not_answered, status_error
from apps.streaming.uris import SourceUri

__all__ = ["probe_rtsp", "video_codec"]

_PORTS = {"rtsp": 554, "rtsps": 322}
_MAX_HEADER_BYTES = 64 << 10
_MAX_BODY_BYTES = 1 << 20
_MAX_REDIRECTS = 3
_STATIC_CODECS = {26: "JPEG", 31: "H261", 32: "MPV", 33: "MP2T", 34: "H263"}


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    reason: str
    headers: tuple[tuple[str, str], ...]
    body: str

    def all(self, name: str) -> list[str]:
        """Values of every header of a name, in lower case."""
        return [value for key, value in self.headers if key == name]


def probe_rtsp(uri: SourceUri) -> str:
    """Asks for the description of a stream, within the source's time-out.

    Returns:
        The encoding name of its first video, such as ``H264``.

    Raises:
        SourceLostError: not reached, refused, not found, or without video.
    """
    deadline_s = time.monotonic() + uri.options.timeout_s
    address, credentials = uri.address, credentials_of(uri.address)
    for _ in range(_MAX_REDIRECTS + 1):
        answer, authenticated = _describe(uri, address, credentials, deadline_s)
        target = answer.all("location")
        if answer.status not in (301, 302, 303, 305) or not target:
            break
        there = urlsplit(urljoin(address, target[0]))
        if there.scheme not in _PORTS:
            raise lost(uri, f"redirects to what is not RTSP ({there.scheme})", "seldom")
        if there.hostname != urlsplit(address).hostname:
            credentials = None  # meant for another
        address = there.geturl()
    if answer.status != 200:
        raise status_error(uri, answer.status, answer.reason, authenticated)
    codec = video_codec(answer.body)
    if codec is None:
        kinds = re.findall(r"^m=(\w+)", answer.body, re.MULTILINE)
        if "audio" in kinds:
            raise lost(uri, "sends audio only, no video", "never")
        raise lost(uri, f"describes no video (media: {', '.join(kinds) or 'none'})", "never")
    return codec


def video_codec(sdp: str) -> str | None:
    """The encoding name of the first video in a session description; ``None`` without video."""
    for section in re.split(r"^(?=m=)", sdp, flags=re.MULTILINE):
        media = re.match(r"m=video\s+\S+\s+\S+\s+(\d+)", section)
        if media:
            mapped = re.search(rf"^a=rtpmap:{media[1]}\s+([\w.+-]+)/", section, re.MULTILINE)
            return mapped[1].upper() if mapped else _STATIC_CODECS.get(int(media[1]), f"payload {media[1]}")
    return None


def _describe(
    uri: SourceUri, address: str, credentials: Credentials | None, deadline_s: float
) -> tuple[_Answer, bool]:
    """The last answer, and whether credentials were sent for it."""
    parts = urlsplit(address)
    host, port = parts.hostname or "", parts.port or _PORTS[parts.scheme]
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    with connect(uri, host, port, parts.scheme == "rtsps", deadline_s) as connection:
        try:
            answer = _ask(uri, connection, bare, 1, None, deadline_s)
            if answer.status != 401 or credentials is None:
                return answer, False
            header = authorization(answer.all("www-authenticate"), credentials, "DESCRIBE", bare)
            if header is None:
                offered = ", ".join(
                    value.split()[0] for value in answer.all("www-authenticate") if value.strip()
                )
                raise lost(
                    uri, f"wants to be authenticated in an unknown way ({offered or 'none named'})", "seldom"
                )
            return _ask(uri, connection, bare, 2, header, deadline_s), True
        except OSError as error:
            raise not_answered(uri, f"{host}:{port}", error) from error


def _ask(
    uri: SourceUri, connection: socket.socket, url: str, number: int, header: str | None, deadline_s: float
) -> _Answer:
    lines = [f"DESCRIBE {url} RTSP/1.0", f"CSeq: {number}", "Accept: application/sdp", "User-Agent: edgefold"]
    if header is not None:
        lines.append(f"Authorization: {header}")
    connection.settimeout(_left_s(deadline_s))
    connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    data = b""
    while b"\r\n\r\n" not in data:
        data += _receive(uri, connection, deadline_s)
        if len(data) > _MAX_HEADER_BYTES:
            raise lost(uri, f"answers with headers of more than {_MAX_HEADER_BYTES} bytes", "seldom")
    head, _, body = data.partition(b"\r\n\r\n")
    first, *rest = head.decode("utf-8", "replace").split("\r\n")
    status = re.match(r"RTSP/\d\.\d\s+(\d{3})\s*(.*)", first)
    if status is None:
        raise lost(uri, f"does not speak RTSP: it answered {first[:60]!r}", "seldom")
    headers = tuple(
        (name.strip().lower(), value.strip()) for name, _, value in (line.partition(":") for line in rest)
    )
    answer = _Answer(int(status[1]), status[2], headers, "")
    lengths = answer.all("content-length")
    length = int(lengths[0]) if lengths and re.fullmatch(r"\d{1,9}", lengths[0]) else 0
    if length > _MAX_BODY_BYTES:
        raise lost(uri, f"announces a description of {length} bytes (limit {_MAX_BODY_BYTES})", "seldom")
    while len(body) < length:
        body += _receive(uri, connection, deadline_s)
    return _Answer(answer.status, answer.reason, headers, body[:length].decode("utf-8", "replace"))


def _receive(uri: SourceUri, connection: socket.socket, deadline_s: float) -> bytes:
    connection.settimeout(_left_s(deadline_s))
    data = connection.recv(4096)
    if not data:
        raise lost(uri, "closed the connection without an answer", "soon")
    return data


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s

"""Asks an HTTP server for a stream, and tells from the head of its answer what it is."""

from __future__ import annotations

import http.client
import re
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from apps.streaming.sources.http_auth import Credentials, authorization
from apps.streaming.sources.network import credentials_of, lost, not_answered, status_error, tls_context
from apps.streaming.uris import SourceUri
from pipeline.errors import SourceLostError

__all__ = ["Exchange", "ask_http"]

_MAX_REDIRECTS = 5


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request that was answered; its body waits to be read."""

    connection: http.client.HTTPConnection
    answer: http.client.HTTPResponse

    @property
    def content_type(self) -> str:
        """Without parameters, in lower case; empty where the server names none."""
        return (self.answer.getheader("Content-Type") or "").partition(";")[0].strip().lower()

    @property
    def boundary(self) -> str | None:
        """Of a multipart body."""
        return self.answer.headers.get_boundary()

    def close(self) -> None:
        """Hangs up; the body need not have an end."""
        self.answer.close()
        self.connection.close()


def ask_http(uri: SourceUri) -> Exchange:
    """Sends a GET, with credentials where it is refused without, and follows redirects.

    Raises:
        SourceLostError: not reached, refused, not found, or no video.
    """
    address, credentials = uri.address, credentials_of(uri.address)
    for _ in range(_MAX_REDIRECTS + 1):
        exchange, authenticated = _get(uri, address, credentials)
        location = exchange.answer.getheader("Location")
        if exchange.answer.status not in (301, 302, 303, 307, 308) or location is None:
            break
        exchange.close()
        target = urljoin(address, location)
        if urlsplit(target).scheme not in ("http", "https"):
            raise lost(uri, f"redirects to what is not HTTP ({urlsplit(target).scheme})", "seldom")
        if urlsplit(target).hostname != urlsplit(address).hostname:
            credentials = None
        address = target
    error = _defect(uri, exchange, authenticated)
    if error is not None:
        exchange.close()
        raise error
    return exchange


def _defect(uri: SourceUri, exchange: Exchange, authenticated: bool) -> SourceLostError | None:
    status, content = exchange.answer.status, exchange.content_type
    if status not in (200, 206):
        return status_error(uri, status, exchange.answer.reason, authenticated)
    if content.startswith("audio/"):
        return lost(uri, f"sends audio only, no video ({content})", "never")
    if content.startswith("text/html"):
        return lost(uri, f"is a page, no video ({content}): give the address of the stream itself", "seldom")
    return None


def _get(uri: SourceUri, address: str, credentials: Credentials | None) -> tuple[Exchange, bool]:
    """The last answer, and whether credentials were sent for it."""
    parts = urlsplit(address)
    target = parts._replace(scheme="", netloc="", fragment="", path=parts.path or "/").geturl()
    exchange = _once(uri, address, target, None)
    if exchange.answer.status != 401 or credentials is None:
        return exchange, False
    exchange.close()
    challenges = exchange.answer.headers.get_all("WWW-Authenticate") or []
    header = authorization(challenges, credentials, "GET", target)
    if header is None:
        offered = ", ".join(re.findall(r"^\s*(\S+)", "\n".join(challenges), re.MULTILINE))
        raise lost(uri, f"wants to be authenticated in an unknown way ({offered or 'none named'})", "seldom")
    return _once(uri, address, target, header), True


def _once(uri: SourceUri, address: str, target: str, header: str | None) -> Exchange:
    parts = urlsplit(address)
    host, timeout_s = parts.hostname or "", uri.options.timeout_s
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(
            host, parts.port, timeout=timeout_s, context=tls_context(uri)
        )
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=timeout_s)
    headers = {"User-Agent": "edgefold", "Accept": "*/*", "Connection": "close"}
    if header is not None:
        headers["Authorization"] = header
    try:
        connection.request("GET", target, headers=headers)
        return Exchange(connection, connection.getresponse())
    except OSError as error:
        connection.close()
        raise not_answered(uri, f"{host}:{connection.port}", error) from error
    except http.client.HTTPException as error:
        connection.close()
        raise lost(
            uri, f"does not speak HTTP at {host}:{connection.port} ({type(error).__name__})", "seldom"
        ) from error

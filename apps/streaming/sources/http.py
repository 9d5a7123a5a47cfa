"""Asks an HTTP server what it would send, before a decoder is let near it."""

from __future__ import annotations

import http.client
import re
from urllib.parse import urljoin, urlsplit

from apps.streaming.sources.http_auth import Credentials, authorization
from apps.streaming.sources.network import credentials_of, lost, not_answered, status_error, tls_context
from apps.streaming.uris import SourceUri

__all__ = ["probe_http"]

_MAX_REDIRECTS = 5


def probe_http(uri: SourceUri) -> str:
    """Sends one GET, reads the head of the answer and hangs up.

    Returns:
        The content type, without its parameters, in lower case.

    Raises:
        SourceLostError: not reached, refused, not found, or no video.
    """
    address, credentials = uri.address, credentials_of(uri.address)
    for _ in range(_MAX_REDIRECTS + 1):
        answer, authenticated = _get(uri, address, credentials)
        location = answer.getheader("Location")
        if answer.status not in (301, 302, 303, 307, 308) or location is None:
            break
        target = urljoin(address, location)
        if urlsplit(target).scheme not in ("http", "https"):
            raise lost(uri, f"redirects to what is not HTTP ({urlsplit(target).scheme})", "seldom")
        if urlsplit(target).hostname != urlsplit(address).hostname:
            credentials = None
        address = target
    if answer.status not in (200, 206):
        raise status_error(uri, answer.status, answer.reason, authenticated)
    content = (answer.getheader("Content-Type") or "").partition(";")[0].strip().lower()
    if content.startswith("audio/"):
        raise lost(uri, f"sends audio only, no video ({content})", "never")
    if content.startswith("text/html"):
        raise lost(uri, f"is a page, no video ({content}): give the address of the stream itself", "seldom")
    return content


def _get(
    uri: SourceUri, address: str, credentials: Credentials | None
) -> tuple[http.client.HTTPResponse, bool]:
    """The last answer, its connection closed, and whether credentials were sent for it."""
    parts = urlsplit(address)
    target = parts._replace(scheme="", netloc="", fragment="", path=parts.path or "/").geturl()
    answer = _once(uri, address, target, None)
    if answer.status != 401 or credentials is None:
        return answer, False
    challenges = answer.headers.get_all("WWW-Authenticate") or []
    header = authorization(challenges, credentials, "GET", target)
    if header is None:
        offered = ", ".join(re.findall(r"^\s*(\S+)", "\n".join(challenges), re.MULTILINE))
        raise lost(uri, f"wants to be authenticated in an unknown way ({offered or 'none named'})", "seldom")
    return _once(uri, address, target, header), True


def _once(uri: SourceUri, address: str, target: str, header: str | None) -> http.client.HTTPResponse:
    parts = urlsplit(address)
    host, timeout_s = parts.hostname or "", uri.options.timeout_s
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(
            host, parts.port, timeout=timeout_s, context=tls_context(uri)
        )
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=timeout_s)
    headers = {"User-Agent": "edgefold", "Accept": "*/*"}
    if header is not None:
        headers["Authorization"] = header
    try:
        connection.request("GET", target, headers=headers)
        answer = connection.getresponse()
        answer.close()  # the body may have no end
        return answer
    except OSError as error:
        raise not_answered(uri, f"{host}:{connection.port}", error) from error
    except http.client.HTTPException as error:
        raise lost(
            uri, f"does not speak HTTP at {host}:{connection.port} ({type(error).__name__})", "seldom"
        ) from error
    finally:
        connection.close()

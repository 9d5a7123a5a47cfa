"""Reaching a network source, and what each way of not reaching it is called.

OpenCV says of all of them that the capture "is not opened". So a source is asked first, over a
connection of its own, and what goes wrong is told apart here: who must do something about it, and
whether trying again soon can help.
"""

from __future__ import annotations

import socket
import ssl
import time
from urllib.parse import unquote, urlsplit

from apps.streaming.sources.http_auth import Credentials
from apps.streaming.uris import SourceUri
from pipeline.errors import Retry, SourceLostError

__all__ = ["connect", "credentials_of", "lost", "not_answered", "status_error", "tls_context"]


def lost(uri: SourceUri, what: str, retry: Retry) -> SourceLostError:
    """The error, with nothing in it that `uri` keeps secret."""
    return SourceLostError(f"{uri.shown} {uri.redact(what)}", retry)


def credentials_of(address: str) -> Credentials | None:
    """The user and password of a URL."""
    userinfo, at, _ = urlsplit(address).netloc.rpartition("@")
    if not at:
        return None
    user, _, password = userinfo.partition(":")
    return Credentials(unquote(user), unquote(password))


def tls_context(uri: SourceUri) -> ssl.SSLContext:
    """Checks the certificate, unless ``tls=unverified``."""
    context = ssl.create_default_context()
    if uri.options.tls == "unverified":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def connect(uri: SourceUri, host: str, port: int, tls: bool, deadline_s: float) -> socket.socket:
    """A connection, in TLS where asked for.

    Args:
        uri: for messages and the choice of TLS checks.
        host: name or address.
        port: TCP.
        tls: whether to shake hands.
        deadline_s: on the monotonic clock.

    Raises:
        SourceLostError: one reason each.
    """
    try:
        plain = socket.create_connection((host, port), timeout=max(0.01, deadline_s - time.monotonic()))
        if not tls:
            return plain
        try:
            plain.settimeout(max(0.01, deadline_s - time.monotonic()))
            return tls_context(uri).wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise
    except OSError as error:
        raise not_answered(uri, f"{host}:{port}", error) from error


def not_answered(uri: SourceUri, where: str, error: OSError) -> SourceLostError:
    """What an error of the socket means."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return lost(
            uri,
            f"has a certificate that is not trusted ({error.verify_message}): install its authority's "
            "certificate on this machine, or, for a camera that made its own, add #tls=unverified",
            "seldom",
        )
    if isinstance(error, ssl.SSLError):
        return lost(uri, f"does not speak TLS at {where} ({error.reason or error})", "seldom")
    if isinstance(error, socket.gaierror):
        return lost(uri, f"has a host name that cannot be resolved here ({error.strerror})", "soon")
    if isinstance(error, ConnectionRefusedError):
        return lost(uri, f"is refused at {where}: nothing listens there (is the camera starting up?)", "soon")
    if isinstance(error, TimeoutError):  # socket.timeout is the same class from Python 3.10 on
        return lost(
            uri,
            f"did not answer within {uri.options.timeout_s:g} s at {where}; is the camera alive? "
            "#timeout=SECONDS gives it longer",
            "soon",
        )
    return lost(uri, f"cannot be reached at {where}: {error.strerror or error}", "soon")


def status_error(uri: SourceUri, status: int, reason: str, authenticated: bool) -> SourceLostError:
    """What a status of RTSP or HTTP means that is no success."""
    said = f"({status} {reason[:80]})"
    if status == 401 and not authenticated:
        return lost(
            uri,
            f"asks for a user and a password {said}: write USER:${{VARIABLE}} and an @ before the host, with "
            "the password in that environment variable",
            "seldom",
        )
    if status == 401:
        return lost(uri, f"does not accept the user and password {said}", "seldom")
    if status == 403:
        return lost(uri, f"forbids this user to see the stream {said}", "seldom")
    if status in (404, 410):
        return lost(uri, f"has no such stream {said}: check the path, and the query", "seldom")
    if status in (453, 503):
        return lost(uri, f"is too busy {said}: does it limit its clients?", "soon")
    return lost(uri, f"answered {said}", "soon" if status >= 500 else "seldom")

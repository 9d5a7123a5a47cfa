"""Who may ask the page for what.

* With a token, every request shows it: ``Authorization: Bearer TOKEN``, or once ``?token=TOKEN``, which
  sets a cookie. The cookie holds a value derived from the token, since browsers send the cookies of a host
  to all its ports.
* Without one, the server listens on loopback only, and a request must name a loopback host. Otherwise a
  web site whose name is made to resolve to 127.0.0.1 (DNS rebinding) could read the camera through the
  visitor's browser.
* What changes something (``POST``) carries the header ``X-Edgefold``, which a form or a script of another
  site cannot send without being asked for permission first, and comes from this page where it says whence.
* No answer may be embedded by another site (``Cross-Origin-Resource-Policy``), scripts and styles are
  the server's own files, and nothing is fetched from elsewhere.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable

from aiohttp import web

from apps.streaming.serve.credentials import is_loopback

__all__ = ["COMMAND_HEADER", "Access"]

COMMAND_HEADER = "X-Edgefold"
"""Any value; its presence is what a cross-site request cannot bring about."""

_COOKIE_MAX_AGE_S = 30 * 24 * 3600

_SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Access:
    """Decides on every request, and puts the security headers on every answer.

    Args:
        token: what a client must show; ``None`` only where the server is bound to loopback.
        port: names the cookie, so that two servers on one host do not take each other's.
    """

    def __init__(self, token: str | None, port: int) -> None:
        self.by_token = token is not None
        self._token = (token or "").encode()
        self._cookie_name = f"edgefold_{port}"
        self._cookie_value = hmac.new(self._token, b"edgefold page cookie", hashlib.sha256).hexdigest()

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuses, or passes on and sets the cookie."""
        if not self.by_token:
            self._require_loopback_name(request)
        elif not self._shows_token(request):
            raise web.HTTPUnauthorized(
                text="401: this page asks for a token. Open the address that was printed when the stream was "
                "started (it ends in ?token=...), or send 'Authorization: Bearer TOKEN'.\n",
                headers={"WWW-Authenticate": 'Bearer realm="edgefold"'},
            )
        if request.method not in ("GET", "HEAD"):
            self._require_own_page(request)
        return await handler(request)

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """For ``on_response_prepare``: streams are answered before their handler returns."""
        for name, value in _SECURITY_HEADERS.items():
            response.headers.setdefault(name, value)
        response.headers.setdefault("Cache-Control", "no-store")
        if self.by_token and self._is_token(request.query.get("token", "")):
            # No redirect to the address without the token: behind a link from elsewhere a browser counts
            # it as cross-site and holds a strict cookie back. The page takes the token out of the address.
            # The header itself: at this point aiohttp has written down the response's cookies already.
            response.headers.add(
                "Set-Cookie",
                f"{self._cookie_name}={self._cookie_value}; Max-Age={_COOKIE_MAX_AGE_S}; Path=/; HttpOnly; "
                "SameSite=Strict",
            )

    def _is_token(self, candidate: str) -> bool:
        return hmac.compare_digest(candidate.encode(errors="surrogateescape"), self._token)

    def _shows_token(self, request: web.Request) -> bool:
        scheme, _, credentials = request.headers.get("Authorization", "").partition(" ")
        cookie = request.cookies.get(self._cookie_name, "").encode(errors="surrogateescape")
        # All three, always: what is missing must not show in the time.
        return any(
            [
                scheme.lower() == "bearer" and self._is_token(credentials.strip()),
                self._is_token(request.query.get("token", "")),
                hmac.compare_digest(cookie, self._cookie_value.encode()),
            ]
        )

    def _require_loopback_name(self, request: web.Request) -> None:
        name = _host_name(request.headers.get("Host", ""))
        if not is_loopback(name):
            raise web.HTTPForbidden(
                text=f"403: this page is for this machine alone, and was asked for as {name!r}. Use localhost "
                "or 127.0.0.1; for a name of its own (a proxy), start the stream with --token.\n"
            )

    def _require_own_page(self, request: web.Request) -> None:
        if COMMAND_HEADER not in request.headers:
            raise web.HTTPForbidden(
                text=f"403: a command needs the header '{COMMAND_HEADER}: 1', so that no other web site can "
                "give it through a visitor's browser.\n"
            )
        origin = request.headers.get("Origin")
        if origin is not None and origin.partition("://")[2] != request.headers.get("Host"):
            raise web.HTTPForbidden(text=f"403: a command from {origin!r}, which is not this page.\n")


def _host_name(host: str) -> str:
    """``[::1]:8080`` → ``::1``, ``localhost:8080`` → ``localhost``."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()

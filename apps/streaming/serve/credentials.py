"""The token of the page: where one is needed, what it looks like, how one is made."""

from __future__ import annotations

import ipaddress
import re
import secrets

from apps.streaming.config import ServeConfig
from pipeline.errors import UsageError

__all__ = ["check_token", "is_loopback", "make_token"]

_MIN_LENGTH = 16
_TOKEN = re.compile(r"[A-Za-z0-9._~-]+")


def make_token() -> str:
    """A token nobody guesses: 24 random bytes, in letters that need no escaping in an address."""
    return secrets.token_urlsafe(24)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_token(config: ServeConfig) -> None:
    """Looks at the token before anything listens.

    Raises:
        UsageError: the server is not bound to loopback and has no token, or the token is unfit.
    """
    token = config.token
    if token is None and not is_loopback(config.host):
        raise UsageError(
            f"the page on {config.host} can be reached from other machines and has no token; give one, or "
            "bind it to 127.0.0.1"
        )
    if token is not None and (len(token) < _MIN_LENGTH or not _TOKEN.fullmatch(token)):
        raise UsageError(
            f"the token of the page has {len(token)} characters; it needs at least {_MIN_LENGTH}, all of them "
            "of A-Z a-z 0-9 . _ ~ -"
        )

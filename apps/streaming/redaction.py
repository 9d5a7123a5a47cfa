"""Takes credentials out of text before a person, a log or a metric sees it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from urllib.parse import quote, unquote, urlsplit

__all__ = ["redact_urls", "secrets_of", "without_secrets"]

HIDDEN = "***"
_SHORT = 4

_USERINFO = re.compile(r"(?<=://)[^/?#\s]*@")
# A password with an unescaped slash: what stands before it is no host and port, and an @ comes later.
_BROKEN_USERINFO = re.compile(r"(?<=://)[^/?#\s@]*:(?!\d{1,5}[/?#])[^\s@:]*[/?#]\S*@")
_SECRET_NAME = r"[^\s=&?;#]*(?:pass|pwd|token|secret|key|auth|credential|signature|sig)[^\s=&?;#]*"
_QUERY = re.compile(rf"([?&;]{_SECRET_NAME}=)[^&#\s]*", re.IGNORECASE)
_PROPERTY = re.compile(r"(\b(?:user-id|user-pw)\s*=\s*)(\"[^\"]*\"|\S+)")


def redact_urls(text: str) -> str:
    """Hides the userinfo of every URL in `text`, and the values of what is called like a secret.

    Those are query parameters (``?token=…``) and GStreamer's ``user-id`` and ``user-pw``.
    """
    text = _BROKEN_USERINFO.sub(f"{HIDDEN}@", text)
    text = _USERINFO.sub(f"{HIDDEN}@", text)
    text = _QUERY.sub(rf"\g<1>{HIDDEN}", text)
    return _PROPERTY.sub(rf"\g<1>{HIDDEN}", text)


def secrets_of(url: str) -> tuple[str, ...]:
    """The strings in a URL that must not be shown, in each form in which they may turn up, longest first.

    The password and the secret query values, percent-encoded and not, and HTTP's Basic token.
    """
    secrets: set[str] = set()
    userinfo, at, _ = urlsplit(url).netloc.rpartition("@")
    if at:
        user, _, password = userinfo.partition(":")
        pair = f"{unquote(user)}:{unquote(password)}"
        secrets |= {userinfo, base64.b64encode(pair.encode()).decode()}
        secrets |= {password, unquote(password), quote(unquote(password), safe="")}
    for match in _QUERY.finditer(url):
        value = match[0][len(match[1]) :]
        secrets |= {value, unquote(value)}
    for match in _PROPERTY.finditer(url):
        secrets |= {match[2], match[2].strip('"')}
    return tuple(sorted(filter(None, secrets), key=len, reverse=True))


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """Hides `secrets`, longest first, and whatever `redact_urls` finds besides."""
    text = redact_urls(text)
    for secret in secrets:
        # A short one would be found within other words, and hide them all.
        exact = re.escape(secret)
        text = re.sub(exact if len(secret) >= _SHORT else rf"(?<!\w){exact}(?!\w)", HIDDEN, text)
    return text

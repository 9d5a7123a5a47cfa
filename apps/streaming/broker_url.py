"""Which MQTT broker, and who to be there: ``mqtt://[user[:password]@]host[:port]``, ``mqtts://…`` for TLS.

``${NAME}`` in user and password stands for an environment variable, so that a configuration file need not
hold a secret; everything else there is percent-decoded. No message, and no representation of the value,
shows user or password: a malformed URL is not quoted at all, since a secret may stand anywhere in it.
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from pipeline.errors import UsageError

__all__ = ["BrokerUrl", "parse_broker_url"]

_DEFAULT_PORTS = {"mqtt": 1883, "mqtts": 8883}
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_FORM = "mqtt://[user:password@]host[:1883] or mqtts://[user:password@]host[:8883]"


@dataclass(frozen=True, slots=True)
class BrokerUrl:
    """A parsed URL; variables are expanded."""

    host: str
    port: int
    tls: bool
    username: str | None = field(default=None, repr=False)
    password: str | None = field(default=None, repr=False)

    @property
    def shown(self) -> str:
        """The URL without user and password, for messages."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether nothing leaves this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def parse_broker_url(url: str) -> BrokerUrl:
    """Checks and expands a broker's URL.

    Raises:
        UsageError: malformed, or an environment variable that is not set.
    """
    # Malformed parts raise ValueError with the offending text, which may be the password.
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise _malformed("host or port cannot be read") from None
    if parts.scheme not in _DEFAULT_PORTS:
        raise _malformed(
            "its scheme is not mqtt or mqtts"
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*", parts.scheme)
            else f"its scheme is {parts.scheme!r}"
        )
    if not host:
        raise _malformed("it names no host")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise _malformed("something follows host and port; the topic is an option of its own")
    userinfo = parts.netloc.rpartition("@")[0]
    username, password = (_expand(part) for part in (userinfo.partition(":")[0], userinfo.partition(":")[2]))
    if password and not username:
        raise _malformed("it has a password without a user")
    return BrokerUrl(
        host=host,
        port=port or _DEFAULT_PORTS[parts.scheme],
        tls=parts.scheme == "mqtts",
        username=username or None,
        password=password or None,
    )


def _malformed(reason: str) -> UsageError:
    return UsageError(
        f"mqtt: the broker's URL is malformed ({reason}; it is not shown, for it may hold a password). Write "
        f"{_FORM}; in user and password write @ as %40, / as %2F, : as %3A, # as %23, ? as %3F and % as %25"
    )


def _expand(part: str) -> str:
    """Percent-decodes the text and puts in the variables, which are taken as they are."""
    expanded, end = "", 0
    for found in _VARIABLE.finditer(part):
        value = os.environ.get(found[1])
        if value is None:
            raise UsageError(
                f"mqtt: the broker's URL refers to the environment variable {found[1]!r}, which is not set"
            )
        expanded += unquote(part[end : found.start()]) + value
        end = found.end()
    return expanded + unquote(part[end:])

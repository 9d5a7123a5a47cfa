"""The answer to a 401: Basic and Digest, of HTTP and of RTSP, which took both over.

Sources: RFC 7617 (Basic), RFC 7616 (Digest; MD5 and SHA-256, with ``qop=auth`` or in RFC 2069's form without
``qop``), RFC 2326 section 14 and RFC 7826 section 19.1 (RTSP).
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Credentials", "authorization"]

_HASHES = {"SHA-256": hashlib.sha256, "MD5": hashlib.md5}
_PARAMETER = re.compile(r'([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')


@dataclass(frozen=True, slots=True)
class Credentials:
    """User and password, not percent-encoded."""

    user: str
    password: str = field(repr=False)


def authorization(
    challenges: Sequence[str], credentials: Credentials, method: str, uri: str, cnonce: str | None = None
) -> str | None:
    """The ``Authorization`` header for the strongest scheme that the server offers.

    Args:
        challenges: values of all ``WWW-Authenticate`` headers.
        credentials: of the user.
        method: ``DESCRIBE``, ``GET``.
        uri: as in the request line.
        cnonce: the client's nonce; drawn where left out.

    Returns:
        The header's value; ``None`` where no scheme is one of ours.
    """
    digests = [c for c in challenges if c.strip().lower().startswith("digest ")]
    for algorithm in _HASHES:
        for challenge in digests:
            parameters = _parameters(challenge)
            if parameters.get("algorithm", "MD5").upper() == algorithm and "nonce" in parameters:
                return _digest(
                    parameters, algorithm, credentials, method, uri, cnonce or secrets.token_hex(8)
                )
    if any(c.strip().lower().startswith("basic") for c in challenges):
        pair = f"{credentials.user}:{credentials.password}".encode()
        return f"Basic {base64.b64encode(pair).decode('ascii')}"
    return None


def _parameters(challenge: str) -> dict[str, str]:
    return {
        match[1].lower(): match[3] if match[2] is None else re.sub(r"\\(.)", r"\1", match[2])
        for match in _PARAMETER.finditer(challenge.strip()[len("digest ") :])
    }


def _digest(
    parameters: dict[str, str], algorithm: str, credentials: Credentials, method: str, uri: str, cnonce: str
) -> str:
    def h(text: str) -> str:
        return _HASHES[algorithm](text.encode()).hexdigest()

    realm, nonce = parameters.get("realm", ""), parameters["nonce"]
    a1 = h(f"{credentials.user}:{realm}:{credentials.password}")
    a2 = h(f"{method}:{uri}")
    fields = {"username": credentials.user, "realm": realm, "nonce": nonce, "uri": uri}
    bare = {}
    if "auth" in re.split(r"\s*,\s*", parameters.get("qop", "")):
        count = "00000001"
        fields |= {"response": h(f"{a1}:{nonce}:{count}:{cnonce}:auth:{a2}"), "cnonce": cnonce}
        bare = {"qop": "auth", "nc": count}
    else:
        fields["response"] = h(f"{a1}:{nonce}:{a2}")
    if "opaque" in parameters:
        fields["opaque"] = parameters["opaque"]
    if "algorithm" in parameters:
        bare["algorithm"] = parameters["algorithm"]
    quoted = [f'{name}="{_escaped(value)}"' for name, value in fields.items()]
    return "Digest " + ", ".join([*quoted, *(f"{name}={value}" for name, value in bare.items())])


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"')

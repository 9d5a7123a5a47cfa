"""A source's name where only plain words may stand: a file name, a level of an MQTT topic."""

from __future__ import annotations

import re

__all__ = ["plain_name"]

_MAX_BYTES = 120
"""A file name has 255 bytes, and carries a time and two suffixes besides."""


def plain_name(source_id: str) -> str:
    """Letters, digits, ``.``, ``-`` and ``_``: ``rtsp://10.0.0.5:554/door`` is ``rtsp_10.0.0.5_554_door``.

    Different sources can get the same name; whoever uses it must check.
    """
    plain = re.sub(r"[^\w.-]+", "_", source_id).strip("_.")
    return plain.encode()[:_MAX_BYTES].decode(errors="ignore") or "source"

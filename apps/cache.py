"""Where this user's caches lie."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_dir"]


def cache_dir(kind: str) -> Path:
    """``$EDGEFOLD_CACHE``, else ``$XDG_CACHE_HOME/edgefold``, else ``~/.cache/edgefold``, then `kind`."""
    own = os.environ.get("EDGEFOLD_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgefold"
    return base.expanduser() / kind

"""Compiled blobs kept on disk: a cache that may lose anything, and never gives back what was not put in.

An engine's own importer accepts a blob with a flipped weight bit without a word (measured with
OpenVINO 2026.4), so every entry carries its SHA-256 in front and is checked before it is handed out.
That guards against truncation, bit rot and mix-ups, not against someone who may write to the
folder: it is created private to the user.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.artifacts import Fingerprint
from pipeline.whole_files import whole_file

__all__ = ["MAX_CACHE_BYTES", "BlobCache", "blob_key"]

MAX_CACHE_BYTES = 2 << 30
"""Least recently used entries go when the folder holds more; a large int8 network takes 60 MB."""

_DIGEST_BYTES = 32
_SUFFIX = ".blob"
_TEMPORARY_SUFFIX = ".blob.tmp"
_STALE_S = 3600.0
_log = logging.getLogger(__name__)


def blob_key(model_sha256: str, fingerprint: Fingerprint, options: Mapping[str, Any]) -> str:
    """A file name that changes with the model's bytes, the engine, the device and how it was compiled."""
    identity = {"model": model_sha256, "fingerprint": asdict(fingerprint), "options": dict(options)}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class BlobCache:
    """Blobs by key in one folder, safe against corruption and against other processes.

    A folder that cannot be read or written costs a warning, never the engine.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_CACHE_BYTES) -> None:
        """Use `folder`, created at the first `put`, for at most `max_bytes`."""
        self._folder = folder
        self._max_bytes = max_bytes

    def get(self, key: str) -> bytes | None:
        """The blob stored under `key`, or ``None``; one that was damaged is deleted."""
        path = self._folder / (key + _SUFFIX)
        try:
            entry = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _log.warning("engine cache %s cannot be read (%s); compiling", path, error)
            return None
        digest, blob = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
        if hashlib.sha256(blob).digest() != digest:
            _log.warning("engine cache %s is damaged; deleting it and compiling", path)
            self.discard(key)
            return None
        with contextlib.suppress(OSError):  # a read-only folder only loses the order of use
            os.utime(path)
        return blob

    def put(self, key: str, blob: bytes) -> None:
        """Store `blob` in one step: a reader sees the whole entry or none."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with whole_file(self._folder / (key + _SUFFIX), suffix=_TEMPORARY_SUFFIX) as file:
                file.write(hashlib.sha256(blob).digest())
                file.write(blob)
            self._trim()
        except OSError as error:
            _log.warning(
                "engine cache %s cannot be written (%s); it will be compiled again", self._folder, error
            )

    def discard(self, key: str) -> None:
        """Forget what is stored under `key`."""
        try:
            (self._folder / (key + _SUFFIX)).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("engine cache entry %s cannot be deleted (%s)", key, error)

    def _trim(self) -> None:
        entries = sorted(
            (
                (path.stat().st_mtime_ns, path.stat().st_size, path)
                for path in self._folder.glob("*" + _SUFFIX)
            ),
            reverse=True,
        )
        total = 0
        for index, (_, size, path) in enumerate(entries):
            total += size
            if index and total > self._max_bytes:  # the newest stays whatever its size
                path.unlink(missing_ok=True)
        for path in self._folder.glob("*" + _TEMPORARY_SUFFIX):  # of processes killed while writing
            if time.time() - path.stat().st_mtime > _STALE_S:
                path.unlink(missing_ok=True)

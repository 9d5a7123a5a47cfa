"""A judgement that goes on where it was broken off: sums on disk, and what they are the sums of.

Fifty thousand images in 144 crops take a night. The sums so far are written every few seconds, whole or
not at all, beside a key: digests of the images, of every graph and of the preprocessing. Sums of anything
else are refused by name, since added to these they would be a figure of nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import EdgefoldError, IntegrityError
from pipeline.whole_files import whole_file

__all__ = ["Progressed", "ResumeFile"]

_SCHEMA_VERSION = 1
_SAVE_EVERY_S = 10.0
"""Work lost at worst; writing takes a few milliseconds."""

_Tally = TypeVar("_Tally")


@dataclass(frozen=True, slots=True)
class Progressed(Generic[_Tally]):
    """What a state file holds."""

    tally: _Tally
    skipped: tuple[tuple[str, str], ...]
    """``(key, reason)`` of the images that could not be used up to there."""


class ResumeFile:
    """Where the sums of one judgement are kept until it is done.

    Args:
        path: the file; written when there is something to keep.
        save_every_s: seconds between two writes.
        key: what is judged, by content: a name a person knows to a digest. Whoever judges adds to it.
    """

    def __init__(
        self,
        path: Path,
        save_every_s: float = _SAVE_EVERY_S,
        key: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self._key = dict(key or {})
        self._save_every_s = save_every_s
        self._saved_s = time.monotonic()

    def with_key(self, more: Mapping[str, str]) -> ResumeFile:
        """The same file for a longer key."""
        return ResumeFile(self.path, self._save_every_s, {**self._key, **more})

    def load(self, tally_type: type[_Tally]) -> Progressed[_Tally] | None:
        """What was kept, ``None`` where there is nothing yet.

        Raises:
            IntegrityError: the file is of another judgement, and of which; or it is damaged.
            EdgefoldError: the file cannot be read.
        """
        try:
            tree = json.loads(self.path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise EdgefoldError(f"cannot read {str(self.path)!r}: {error.strerror or error}") from error
        except ValueError as error:
            raise self._damaged(str(error)) from error
        if not isinstance(tree, dict) or tree.get("schema_version") != _SCHEMA_VERSION:
            raise self._damaged(f"no state of schema {_SCHEMA_VERSION}")
        self._check_key(tree.get("key"))
        try:
            tally = TypeAdapter(tally_type).validate_python(tree.get("tally"))
            skipped = TypeAdapter(tuple[tuple[str, str], ...]).validate_python(tree.get("skipped"))
        except ValidationError as error:
            raise self._damaged(str(error.errors()[0]["msg"])) from error
        return Progressed(tally, skipped)

    def save_if_due(self, tally: object, skipped: Sequence[tuple[str, str]]) -> None:
        """Write, if the last time is long enough ago."""
        if time.monotonic() - self._saved_s >= self._save_every_s:
            self.save(tally, skipped)

    def save(self, tally: object, skipped: Sequence[tuple[str, str]]) -> None:
        """Write, replacing what was there in one step.

        Raises:
            EdgefoldError: the file cannot be written.
        """
        tree: dict[str, Any] = {
            "schema_version": _SCHEMA_VERSION,
            "key": self._key,
            "skipped": list(skipped),
            "tally": TypeAdapter(type(tally)).dump_python(tally, mode="json"),
        }
        try:
            with whole_file(self.path, durable=True) as file:
                file.write(json.dumps(tree).encode())
        except OSError as error:
            raise EdgefoldError(
                f"cannot write {str(self.path)!r}: {error.strerror or error}; give another --resume"
            ) from error
        self._saved_s = time.monotonic()

    def remove(self) -> None:
        """The result is out: nothing is left to go on with."""
        self.path.unlink(missing_ok=True)

    def _check_key(self, found: object) -> None:
        theirs = found if isinstance(found, dict) else {}
        different = [name for name in {**self._key, **theirs} if self._key.get(name) != theirs.get(name)]
        if different:
            name = different[0]
            others = f", and other {', '.join(different[1:])}" if different[1:] else ""
            raise IntegrityError(
                f"{str(self.path)!r} keeps a judgement of other {name} ({theirs.get(name, 'none')}; here "
                f"{self._key.get(name, 'none')}){others}: remove it to start afresh, or give another --resume"
            )

    def _damaged(self, why: str) -> IntegrityError:
        return IntegrityError(
            f"{str(self.path)!r} is no state of a judgement ({why}); remove it to start afresh"
        )

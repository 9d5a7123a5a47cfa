"""On which line of a TOML file a key stands: the parser does not say, and a person looks for it by the line."""

from __future__ import annotations

import re

__all__ = ["line_of"]

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\]\[]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(
    r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*="""
)
_MULTILINE = ('"""', "'''")

Loc = tuple[str | int, ...]


def line_of(text: str, loc: Loc) -> int | None:
    """The line (from 1) of the key at `loc`, else that of the closest table or key above it.

    Args:
        text: valid TOML.
        loc: keys, and indices where a table is one of an array: ``("source", 1, "uri")``.
    """
    lines = _lines(text)
    for length in range(len(loc), 0, -1):
        if loc[:length] in lines:
            return lines[loc[:length]]
    return None


def _lines(text: str) -> dict[Loc, int]:
    lines: dict[Loc, int] = {}
    counts: dict[Loc, int] = {}
    table: Loc = ()
    quote: str | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if quote is not None:
            quote = None if line.count(quote) % 2 else quote
            continue
        header = _HEADER.match(line)
        if header:
            table = _place(_parts(header[2]), counts, new=header[1] == "[[")
            lines.setdefault(table, number)
            continue
        key = _KEY.match(line)
        if key:
            place = (*table, *_parts(key[1]))
            for length in range(len(table) + 1, len(place) + 1):
                lines.setdefault(place[:length], number)
        quote = next((mark for mark in _MULTILINE if line.count(mark) % 2), None)
    return lines


def _place(parts: list[str], counts: dict[Loc, int], *, new: bool) -> Loc:
    """A header's place, with the index of every array of tables on the way; `new` starts its next table."""
    place: Loc = ()
    for position, part in enumerate(parts):
        place = (*place, part)
        if new and position == len(parts) - 1:
            counts[place] = counts.get(place, -1) + 1
        if place in counts:
            place = (*place, counts[place])
    return place


def _parts(dotted: str) -> list[str]:
    return [part.strip().strip("\"'") for part in re.findall(r""""[^"]*"|'[^']*'|[^.]+""", dotted)]

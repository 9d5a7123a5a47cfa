"""Which images stand for all of them: the same ones on every machine."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

__all__ = ["stratified_subset"]


def stratified_subset(
    keys: Sequence[str], labels: Sequence[int | None], limit: int | None, seed: int
) -> list[int]:
    """Positions of at most `limit` of the items, in their order.

    Classes take turns, so that their counts differ by one at most where they have enough. Within a
    class the order is a hash of seed and key: it depends on no random generator's stream, and an item
    added to the data displaces at most one other.
    """
    if limit is None or limit >= len(keys):
        return list(range(len(keys)))
    ranks = [hashlib.sha256(f"{seed}:{key}".encode()).digest() for key in keys]
    taken: Counter[int | None] = Counter()
    order: list[tuple[int, bytes, int]] = []
    for position in sorted(range(len(keys)), key=ranks.__getitem__):
        label = labels[position]
        order.append((taken[label], ranks[position], position))
        taken[label] += 1
    return sorted(position for _, _, position in sorted(order)[:limit])

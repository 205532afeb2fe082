"""What several trainings on one dataset need not make twice: the arm beside a run, or the trials of a search.

Everything is found by fingerprints of all that went into it, so that sharing changes no result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import numpy as np

from shortlist.cascade.lessons import Lessons
from shortlist.models.base import System

MOST_BYTES = 2 << 30
"""Memory at most for systems that only count, kept at several moments; and again for what rankers learn from."""
_T = TypeVar("_T")


class Kept(Generic[_T]):
    """Things by key while there is room; the one not asked for longest goes first, the newest always stays."""

    def __init__(self, size_of: Callable[[_T], int], most_bytes: int = MOST_BYTES) -> None:
        self.size_of, self.most_bytes = size_of, most_bytes
        self._things: dict[Hashable, _T] = {}

    def __len__(self) -> int:
        return len(self._things)

    def get(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """What is kept under the key, else what `make` gives."""
        thing = self._things.pop(key) if key in self._things else make()
        self._things[key] = thing
        while len(self._things) > 1 and sum(map(self.size_of, self._things.values())) > self.most_bytes:
            del self._things[next(iter(self._things))]
        return thing


class Shared:
    """Give one object to all trainings on one dataset; see `train_cascade`. What it holds is only read."""

    def __init__(self) -> None:
        self.counted: Kept[System] = Kept(num_bytes)
        """Systems that learn no weights, by fingerprint and moment."""
        self.lessons: Kept[Lessons] = Kept(lessons_bytes)
        """What later stages learn from and are stopped on, by everything before them."""
        self.scores: dict[Hashable, float] = {}
        """Validation NDCG@k of retrievers that learn no weights, by fingerprint."""


def num_bytes(system: System) -> int:
    """Memory of its parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*system.parameters(), *system.buffers()))


def lessons_bytes(lessons: Lessons) -> int:
    """Memory of its candidates."""
    tensors = (lessons.rows.values, lessons.rows.offsets, lessons.label, lessons.worth, *lessons.pair.values())
    return sum(tensor.nbytes for tensor in tensors)


def fingerprint(*parts: Any) -> str:
    """Twelve hexadecimal digits that change with any part: arrays by content, the rest as JSON."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:12]

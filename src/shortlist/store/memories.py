"""What systems remember of users between requests: in this process, within a bound, least recently used first out.

Behind it may stand a shelf, where memories outlast the process (shelf.py): everything is written through, and it is asked for users who
are not remembered here. A shelf that other servers write to stands in place of this process's own, which could be older. Behind a
system's memories may stand a backing, such as a file of summaries made near-line: it is asked last. What a shelf keeps of such a system
is kept under the backing's generation, so that it does not outlive the file that it was made from.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from shortlist.errors import ConfigError
from shortlist.models.base import Memory
from shortlist.store.shelf import Shelf, ShelfStatus, owned

ENTRY_BYTES = 1_024
"""Counted for every entry on top of its tensors: keys, names and tensor objects."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryStatus:
    """What is kept and how often it was of use."""

    num_entries: int
    num_bytes: int
    max_bytes: int
    num_hits: int
    num_misses: int
    num_read: int
    """Hits that a backing gave."""
    num_shelved: int
    """Hits that the shelf gave."""
    shelf: ShelfStatus | None
    """None without a shelf."""


class Backing(Protocol):
    """Where memories are read that are not at hand."""

    def get(self, keys: Sequence[str]) -> list[Memory | None]:
        """Per user what is there, None where there is nothing."""

    def forget(self, key: str) -> bool:
        """Wipe what it holds of a user; whether there was anything."""

    def generation(self) -> str:
        """Name of what it holds now: another one when that changes."""

    def renewed(self) -> bool:
        """Whether what it holds has changed since the last call, so that what was read before is to be read again."""


class Memories:
    """Memories of one snapshot's systems, by system and user; safe to use from many threads.

    Args:
        max_bytes: bound of all memories together; one that alone exceeds it is not kept.
        backings: by system, read through where nothing is kept of a user; they stand outside the bound.
        shelf: where memories outlast the process, within a bound of its own; stays the caller's to close.
        snapshot: version under which they stand on the shelf.

    Raises ConfigError for a bound below 0.
    """

    def __init__(
        self,
        max_bytes: int = 256 << 20,
        backings: Mapping[str, Backing] | None = None,
        *,
        shelf: Shelf | None = None,
        snapshot: str = "",
    ) -> None:
        if max_bytes < 0:
            raise ConfigError(f"memories need a bound of 0 bytes or more, got {max_bytes}")
        self.max_bytes = max_bytes
        self.backings = dict(backings or {})
        self._shelf, self._snapshot = shelf, snapshot
        self._kept: OrderedDict[tuple[str, str], tuple[Memory, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._num_bytes = self._num_hits = self._num_misses = self._num_read = self._num_shelved = 0

    @property
    def problem(self) -> str | None:
        """Why the shelf could not be used when it was last asked; None where it could, or there is none."""
        return None if self._shelf is None else self._shelf.problem

    def get(self, system: str, keys: Sequence[str]) -> list[Memory | None]:
        """Per user what the system kept last, here or on the shelf, else what its backing has, None where there is nothing."""
        backing = self.backings.get(system)
        renewed = backing is not None and backing.renewed()
        with self._lock:
            if renewed:
                for old in [old for old in self._kept if old[0] == system]:
                    self._drop(old)
            found: list[Memory | None] = []
            for key in keys:
                entry = self._kept.get((system, key))
                if entry is not None:
                    self._kept.move_to_end((system, key))
                found.append(None if entry is None else entry[0])
        num_shelved = num_read = 0
        if self._shelf is not None:
            shelf, snapshot, name = self._shelf, self._snapshot, self._shelved(system)
            num_shelved = _fill(found, keys, lambda missing: shelf.get(snapshot, name, missing))
        if backing is not None:
            num_read = _fill(found, keys, backing.get)
        with self._lock:
            num_misses = sum(memory is None for memory in found)
            self._num_shelved += num_shelved
            self._num_hits += len(keys) - num_misses
            self._num_misses += num_misses
            self._num_read += num_read
        return found

    def put(self, system: str, keys: Sequence[str], memories: Sequence[Memory | None]) -> None:
        """Keep what a system gave, in place of what it gave before; None forgets."""
        if self._shelf is not None:
            self._shelf.put(self._snapshot, self._shelved(system), keys, memories)
            if self._shelf.is_shared:
                return
        with self._lock:
            for key, memory in zip(keys, memories, strict=True):
                self._drop((system, key))
                if memory is None:
                    continue
                memory = owned(memory)
                size = ENTRY_BYTES + sum(tensor.numel() * tensor.element_size() for tensor in memory.values())
                self._kept[system, key] = (memory, size)
                self._num_bytes += size
            while self._num_bytes > self.max_bytes:
                self._drop(next(iter(self._kept)))

    def forget(self, key: str) -> bool:
        """Drop all that any system kept of a user; False where the shelf could not be told."""
        with self._lock:
            for entry in [entry for entry in self._kept if entry[1] == key]:
                self._drop(entry)
        return self._shelf is None or self._shelf.forget(key)

    def forget_where(self, is_gone: Callable[[str], bool]) -> None:
        """Drop what this process remembers of users that another one has forgotten; a shelf is told by the one that was asked to."""
        with self._lock:
            for entry in [entry for entry in self._kept if is_gone(entry[1])]:
                self._drop(entry)

    def status(self) -> MemoryStatus:
        """Sizes and counts up to now."""
        shelf = None if self._shelf is None else self._shelf.status()
        with self._lock:
            return MemoryStatus(
                num_entries=len(self._kept),
                num_bytes=self._num_bytes,
                max_bytes=self.max_bytes,
                num_hits=self._num_hits,
                num_misses=self._num_misses,
                num_read=self._num_read,
                num_shelved=self._num_shelved,
                shelf=shelf,
            )

    def _shelved(self, system: str) -> str:
        """Name of a system's memories on the shelf."""
        backing = self.backings.get(system)
        return system if backing is None else f"{system}@{backing.generation()}"

    def _drop(self, entry: tuple[str, str]) -> None:
        _, size = self._kept.pop(entry, (None, 0))
        self._num_bytes -= size


def _fill(found: list[Memory | None], keys: Sequence[str], ask: Callable[[list[str]], Sequence[Memory | None]]) -> int:
    """Ask for what is missing, in place; how much there was."""
    missing = [place for place, memory in enumerate(found) if memory is None]
    if not missing:
        return 0
    for place, memory in zip(missing, ask([keys[place] for place in missing]), strict=True):
        found[place] = memory
    return sum(found[place] is not None for place in missing)

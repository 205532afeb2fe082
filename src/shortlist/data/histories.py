"""Every user's events as contiguous arrays, cut by offsets (CSR), and the requests that are asked of them.

    user      1        2     3
    offsets 0 0        3     5
    item      7 2 2    4 1          user row 0 is unknown and has no events

Events of a user stand in time order, oldest first, ties in file order. Events that share a `group` (one basket, or one user and
moment) happened together: nothing may predict one of them from another. N events, U users, R requests.
Arrays may be memory maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shortlist.data.schema import FieldTable, Space
from shortlist.errors import DataError, SnapshotError

Int = NDArray[np.int64]
Float = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Histories:
    """Events by user, oldest first."""

    offsets: Int
    """[U + 2]: events of user row u are offsets[u] .. offsets[u + 1]; row 0 is empty."""
    item: Int
    """[N] catalogue rows."""
    time: Int
    """[N] seconds since 1970 UTC; a position in the user's order where the log has no clock."""
    group: Int
    """[N] group number, rising with time within a user."""
    action: Int
    """[N] action ids 1.., 0 unknown."""
    value: Float
    """[N] money or another worth of the event; 1.0 where the log has none."""

    def __post_init__(self) -> None:
        for name in ("time", "group", "action", "value"):
            if len(getattr(self, name)) != len(self.item):
                raise DataError(f"histories: {name} has {len(getattr(self, name))} entries, item has {len(self.item)}")
        if len(self.offsets) < 2 or self.offsets[-1] != len(self.item):
            raise DataError(f"histories: offsets must run from 0 to the number of events {len(self.item)}")

    @property
    def num_users(self) -> int:
        """U: users without the unknown row."""
        return len(self.offsets) - 2

    @property
    def num_events(self) -> int:
        """N."""
        return len(self.item)

    @property
    def user_of_event(self) -> Int:
        """[N] user row of each event."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def keep(self, mask_N: NDArray[np.bool_]) -> Histories:
        """Only the events where the mask [N] is True; the users stay."""
        counts = np.concatenate([[0], np.cumsum(mask_N)])
        kept = {f.name: getattr(self, f.name)[mask_N] for f in fields(self) if f.name != "offsets"}
        return Histories(offsets=counts[self.offsets].astype(np.int64), **kept)

    def save(self, folder: Path) -> None:
        """One .npy file per array in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        for f in fields(self):
            np.save(folder / f"{f.name}.npy", getattr(self, f.name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Histories:
        """Memory-mapped from `folder`; SnapshotError names a missing or damaged file."""
        arrays = {}
        for f in fields(cls):
            path = folder / f"{f.name}.npy"
            arrays[f.name] = mapped(path, np.float32 if f.name == "value" else np.int64)
        return cls(**arrays)

    @classmethod
    def empty(cls, num_users: int = 0) -> Histories:
        """No events."""
        none = np.zeros(0, dtype=np.int64)
        offsets = np.zeros(num_users + 2, dtype=np.int64)
        return cls(offsets=offsets, item=none, time=none, group=none, action=none, value=np.zeros(0, dtype=np.float32))


@dataclass(frozen=True, kw_only=True, slots=True)
class Requests:
    """Questions asked of histories: who, when, what was known before, and (offline) what was then chosen.

    The history of request r is events start[r] .. end[r] of `Histories`; all of them belong to groups before the request's.
    """

    user: Int
    """[R] user rows."""
    time: Int
    """[R] seconds."""
    start: Int
    """[R] first event of the history."""
    end: Int
    """[R] one past its last event."""
    target_offsets: Int
    """[R + 1]: targets of request r are target_offsets[r] .. [r + 1]; a request at serving has none."""
    target: Int
    """[total] distinct catalogue rows that were chosen, all of one group."""
    target_value: Float
    """[total] their worth, summed over the lines of the group."""
    context: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    """Context columns [R], encoded as the schema says."""

    def __len__(self) -> int:
        return len(self.user)

    def select(self, index: Int) -> Requests:
        """Requests `index` [n], in the given order."""
        where, offsets = np.zeros(0, dtype=np.int64), np.zeros(len(index) + 1, dtype=np.int64)
        if len(self.target):
            where, lengths = ranges(self.target_offsets[index], self.target_offsets[index + 1])
            np.cumsum(lengths, out=offsets[1:])
        return replace(
            self,
            user=self.user[index],
            time=self.time[index],
            start=self.start[index],
            end=self.end[index],
            target_offsets=offsets,
            target=self.target[where],
            target_value=self.target_value[where],
            context={name: column[index] for name, column in self.context.items()},
        )

    def without_targets(self) -> Requests:
        """The same without what was chosen, for those who bring candidates of their own."""
        none = np.zeros(0, dtype=np.int64)
        offsets = np.zeros_like(self.target_offsets)
        return replace(self, target_offsets=offsets, target=none, target_value=none.astype(np.float32))

    @classmethod
    def joined(cls, parts: Sequence[Requests]) -> Requests:
        """Requests of the same histories end to end; at least one part."""
        counts = [np.diff(part.target_offsets) for part in parts]
        return cls(
            user=np.concatenate([part.user for part in parts]),
            time=np.concatenate([part.time for part in parts]),
            start=np.concatenate([part.start for part in parts]),
            end=np.concatenate([part.end for part in parts]),
            target_offsets=np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64),
            target=np.concatenate([part.target for part in parts]),
            target_value=np.concatenate([part.target_value for part in parts]),
            context={name: np.concatenate([part.context[name] for part in parts]) for name in parts[0].context},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What training may see: events up to a moment, and the space fitted on them. `prepare(view)` gets this and nothing else."""

    histories: Histories
    """Training-time events only."""
    space: Space
    users: FieldTable
    """User fields for rows 0..num_users."""
    now: int
    """Seconds: the cut. No event in `histories` is later, unless the protocol cuts per user."""
    repeats: bool = True
    """True where items already seen may be shown again on this surface."""


def mapped(path: Path, dtype: type[np.generic]) -> NDArray[Any]:
    """An array [n] of the type, memory-mapped from a .npy; SnapshotError names the file where it is missing or holds anything else."""
    try:
        found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SnapshotError(f"{path} is missing or damaged ({error}); restore the snapshot or train again") from error
    if found.dtype != dtype or found.ndim != 1:
        raise SnapshotError(
            f"{path} is damaged: it holds {found.dtype} of shape {found.shape} where a row of {np.dtype(dtype)} belongs; "
            "restore the snapshot or train again"
        )
    return found


def ranges(start: Int, end: Int) -> tuple[Int, Int]:
    """Indices start[i] .. end[i] of all rows end to end, and the lengths [B]; a row that ends before it starts is empty."""
    lengths = np.maximum(end - start, 0)
    ends = lengths.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + (start - ends + lengths).repeat(lengths), lengths

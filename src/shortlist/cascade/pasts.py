"""What is known of users at the moment of a request: the snapshot's events, then those that came in since.

    snapshot   user 7:  a  b b                memory-mapped arrays
    since      user 7:           c  a         from the event store, or sent with the request
    past       user 1:  a  b b   c  a         sorted and grouped by the code that sorts them for training

B users of a request, N newer events.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shortlist.data.encode import sort_events
from shortlist.data.histories import Histories, Int, ranges
from shortlist.data.vocabulary import Id, Vocabulary
from shortlist.errors import DataError
from shortlist.store.events import EventStore

MS = 1000
SPACING_S = 60
"""Seconds between sent events that carry no time: one sitting that ends at the moment of the request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PastEvent:
    """One thing a user did, as a request tells it."""

    item: Id
    timestamp: float | None = None
    """Seconds since 1970 UTC; given for all events of a history or for none."""
    action: str | None = None
    """None = the log's first action."""
    value: float | None = None
    """None = 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Newer:
    """Events the snapshot may not hold."""

    user: Int
    """[N] place of the user in the request, 0..B-1."""
    item: Int
    """[N] catalogue rows; 0 where the catalogue has no such item."""
    time_ms: Int
    """[N] milliseconds since 1970 UTC."""
    action: Int
    """[N] action ids."""
    value: NDArray[np.float32]
    """[N]."""

    def keep(self, mask_N: NDArray[np.bool_]) -> Newer:
        """Only some of them."""
        return Newer(
            user=self.user[mask_N],
            item=self.item[mask_N],
            time_ms=self.time_ms[mask_N],
            action=self.action[mask_N],
            value=self.value[mask_N],
        )


class Numbers:
    """Rows of ids, remembered: looking one id up in a large vocabulary takes longer than everything else a request needs of it."""

    def __init__(self, vocabulary: Vocabulary, max_remembered: int = 200_000) -> None:
        self._vocabulary, self._max = vocabulary, max_remembered
        self._row_of: dict[Id | None, int] = {}
        self._hidden: Callable[[Id], bool] | None = None
        self._changing = threading.Lock()

    def __call__(self, ids: Sequence[Id | None]) -> Int:
        """int64 [n], 0 where unknown; as Vocabulary.encode."""
        row_of = remembered = self._row_of
        missing = [value for value in ids if value not in row_of]
        if missing:
            found = dict(zip(missing, self._vocabulary.encode(missing).tolist()))
            if self._hidden is not None:
                found = {value: 0 if self.is_hidden(value) else row for value, row in found.items()}
            row_of = {**found, **{value: row_of[value] for value in ids if value in row_of}}
            with self._changing:
                if self._row_of is remembered:  # else what was found may not hold any more
                    if len(remembered) + len(found) > self._max:
                        self._row_of = {}  # a fresh one, since other threads may be reading the old
                    self._row_of.update(found)
        return np.array([row_of[value] for value in ids], dtype=np.int64)

    def hide(self, is_hidden: Callable[[Id], bool]) -> None:
        """Ids for which it is true are unknown from now on."""
        with self._changing:
            self._hidden, self._row_of = is_hidden, {}

    @property
    def hides(self) -> bool:
        """Whether any ids may be hidden."""
        return self._hidden is not None

    def is_hidden(self, value: Id | None) -> bool:
        """Whether the id is unknown whatever the vocabulary says."""
        return value is not None and self._hidden is not None and self._hidden(value)


def pasts(log: Histories, rows: Int, newer: Newer | None, *, has_clock: bool, newest: int | None = None) -> Histories:
    """Histories of B users: user row i + 1 = what the log says of user `rows[i]`, then their newer events.

    Events that the log holds already (same user, item and second) are not counted twice, so a snapshot trained on stored events and the
    store that still has them go together. Late ones find their place by time. Items without a row are left out.

    Args:
        newest: events of the log that are read per user, so that a request takes no longer for a long history; newer events that would
            stand before them are left out too. None = all, as always without a clock, where times are places in the whole.
    """
    ends = np.asarray(log.offsets)  # indexing a memory map as such takes ten times as long
    first, stop = ends[rows], ends[rows + 1]
    start = first if newest is None or not has_clock else np.maximum(first, stop - newest)
    index, lengths = ranges(start, stop)
    item, time = np.asarray(log.item)[index], np.asarray(log.time)[index]
    owner = np.zeros(0, dtype=np.int64) if newer is None else np.repeat(np.arange(len(rows)), lengths)
    if newer is not None and len(newer.item):
        newer = newer.keep(newer.item > 0)
        if has_clock:
            if bool(np.any(start > first)):
                oldest = np.where(start > first, log.time[np.minimum(start, log.num_events - 1)], -1)
                newer = newer.keep(newer.time_ms // MS > oldest[newer.user])
            newer = newer.keep(~_same(newer.user, newer.item, newer.time_ms // MS, owner, item, time))
    if newer is None or not len(newer.item):
        offsets = np.zeros(len(rows) + 2, dtype=np.int64)
        np.cumsum(lengths, out=offsets[2:])
        columns = {name: np.asarray(getattr(log, name))[index] for name in ("group", "action", "value")}
        return Histories(offsets=offsets, item=item, time=time, **columns)
    group = _runs(owner, log.group[index])
    first_new = int(group.max(initial=-1)) + 1
    # Without a clock the log's times are places; what came in since stands behind them.
    shift = 0 if has_clock else int(time.max(initial=0)) + 1
    merged, _ = sort_events(
        np.concatenate([owner, newer.user]) + 1,
        np.concatenate([item, newer.item]),
        np.concatenate([time * MS if has_clock else time, newer.time_ms + shift]),
        group=np.concatenate([group, first_new + _numbers(newer.user, newer.time_ms)]),
        action=np.concatenate([log.action[index], newer.action]),
        value=np.concatenate([log.value[index], newer.value]),
        num_users=len(rows),
        time_unit=MS if has_clock else None,
    )
    return merged


def sent_history(history: Sequence[Id | tuple[Id, float] | PastEvent]) -> list[PastEvent]:
    """A request's own history in one form, oldest first; DataError when only some events have a time."""
    events = [
        given
        if isinstance(given, PastEvent)
        else PastEvent(item=given[0], timestamp=given[1])
        if isinstance(given, tuple)
        else PastEvent(item=given)
        for given in history
    ]
    timed = [event for event in events if event.timestamp is not None]
    if timed and len(timed) < len(events):
        raise DataError(
            f"history: {len(timed)} of {len(events)} events have a timestamp; give one for all of them or for none"
        )
    return events


def newer_of(events: Sequence[PastEvent], items: Numbers, action_ids: Int, at: float) -> Newer:
    """A request's own history, of its only user, as newer events; those without times end at `at` (seconds), a minute apart."""
    assumed = [at - SPACING_S * (len(events) - 1 - place) for place in range(len(events))]
    times = [event.timestamp if event.timestamp is not None else then for event, then in zip(events, assumed)]
    return Newer(
        user=np.zeros(len(events), dtype=np.int64),
        item=items([event.item for event in events]),
        time_ms=np.array([round(time * MS) for time in times], dtype=np.int64),
        action=action_ids,
        value=np.array([1.0 if event.value is None else event.value for event in events], dtype=np.float32),
    )


def newer_stored(
    events: EventStore, users: Sequence[Id | None], items: Numbers, action_ids: Callable[[list[str | None]], Int]
) -> Newer | None:
    """What an event store has of the users; None where it has nothing. StoreUnavailable when it can not be read."""
    stored = events.history(["" if user is None else str(user) for user in users])
    if not len(stored):
        return None
    return Newer(
        user=stored.user,
        item=items(stored.item),
        time_ms=stored.time_ms,
        action=action_ids(list(stored.action)),
        value=stored.value,
    )


def _same(user: Int, item: Int, time: Int, others_user: Int, others_item: Int, others_time: Int) -> NDArray[np.bool_]:
    """bool [N]: whether an event is among the others."""
    if not len(others_item):
        return np.zeros(len(item), dtype=bool)
    kind = np.dtype([("user", np.int64), ("item", np.int64), ("time", np.int64)])
    mine, others = np.empty(len(item), kind), np.empty(len(others_item), kind)
    mine["user"], mine["item"], mine["time"] = user, item, time
    others["user"], others["item"], others["time"] = others_user, others_item, others_time
    return np.isin(mine, others)


def _runs(*columns: Int) -> Int:
    """0, 0, 1, 2, ...: rises by one wherever any of the columns [n] changes."""
    n = len(columns[0])
    fresh = np.zeros(n, dtype=bool)
    for column in columns:
        fresh[1:] |= column[1:] != column[:-1]
    return np.cumsum(fresh)


def _numbers(user: Int, time_ms: Int) -> Int:
    """One number per user and moment, rising with both: events of one moment happened together."""
    order = np.lexsort((time_ms, user))
    numbers = np.empty(len(order), dtype=np.int64)
    numbers[order] = _runs(user[order], time_ms[order])
    return numbers

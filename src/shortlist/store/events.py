"""Events as they happen: kept for good before they are acknowledged, read back per user for the next answer.

    append([Event(user="u7", item="b2", timestamp=1_700_000_000.5)])     returns when the event can no longer be lost
    history(["u7", "u9"])                                                their newest events, oldest first

One SQLite file in WAL mode, or a PostgreSQL database. In the file an acknowledged event survives the death of the process (kill -9) with
either setting of `sync`; with "full" each append waits for the disk, so it survives a power cut too, as far as the disk tells the truth;
with "normal" a power cut may take the last moments before it, never the file. Several processes may share the file on one machine.
PostgreSQL is for servers on several machines: each append waits for its disk, and an event that one server acknowledged is read by all
others at once. Appends take turns there too, so that numbers of events grow in the order in which the events can be read.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    ARRAY,
    BigInteger,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    MetaData,
    Select,
    String,
    Table,
    bindparam,
    delete,
    func,
    select,
    true,
)
from sqlalchemy.dialects import postgresql, sqlite

from shortlist.data.histories import Int
from shortlist.errors import DataError
from shortlist.store.databases import LOCK_SPACE, PATIENCE_S, Database
from shortlist.store.databases import StoreUnavailable as StoreUnavailable
from shortlist.store.databases import available as available
from shortlist.store.databases import sqlite_engine as sqlite_engine

MAX_TIMESTAMP = 1e11
"""Seconds; the year 5138. A larger number is milliseconds sent by mistake."""
MAX_ID_CHARS = 512
_USERS_PER_QUERY = 500

_METADATA = MetaData()
EVENTS = Table(
    "events",
    _METADATA,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("user_id", String, nullable=False),
    Column("item_id", String, nullable=False),
    Column("time_ms", BigInteger, nullable=False),
    Column("action", String),
    Column("value", Double),
    Column("event_id", String, unique=True),
    Index("events_by_user", "user_id", "time_ms"),
    sqlite_autoincrement=True,  # a number is never used twice, so "newer than event 17" stays true after deletions
)
_GIVEN = {name: EVENTS.c[name].type for name in ("user_id", "item_id", "time_ms", "action", "value", "event_id")}
_APPEND_ROWS = sqlite.insert(EVENTS).on_conflict_do_nothing(index_elements=["event_id"])
_COLUMNS = func.unnest(*(bindparam(name, type_=ARRAY(kind)) for name, kind in _GIVEN.items()))
_ROWS = _COLUMNS.table_valued(*_GIVEN).render_derived("given")
_TURN = select(func.pg_advisory_xact_lock(LOCK_SPACE, 1)).cte("turn")
# One statement for the whole batch: a column is one parameter, and no row gets its number before its append has its turn.
_APPEND_COLUMNS = (
    postgresql.insert(EVENTS)
    .from_select(list(_GIVEN), select(*(_ROWS.c[name] for name in _GIVEN)).select_from(_TURN.join(_ROWS, true())))
    .on_conflict_do_nothing(index_elements=["event_id"])
    .execution_options(preserve_rowcount=True)
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One thing a user did."""

    user: str
    """Any id, known or not."""
    item: str
    """Any id, known or not."""
    timestamp: float
    """Seconds since 1970 UTC; kept to the millisecond."""
    action: str | None = None
    """Name of the action; None = the log's first one."""
    value: float | None = None
    """Money or another worth; None = 1."""
    event_id: str | None = None
    """The sender's own number for it: an event sent again under the same number is kept once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UserEvents:
    """Events of some users, each user's oldest first; N events."""

    user: Int
    """[N] place of the user in the question, not falling."""
    item: list[str]
    """[N] item ids."""
    time_ms: Int
    """[N] milliseconds since 1970 UTC."""
    action: list[str | None]
    """[N] action names; None where none was given."""
    value: NDArray[np.float32]
    """[N] worth, 1 where none was given."""

    def __len__(self) -> int:
        return len(self.item)


class EventStore:
    """Appends and reads events; safe to use from many threads.

    Args:
        where: path of a SQLite file, made when missing, or postgresql://user:password@host:port/name with the extra `postgres`.
        sync: on SQLite, "full" survives a power cut, "normal" only the death of the process, and is quicker.
        max_per_user: newest events of a user that `history` gives; older ones stay in the store.
        patience_s: on PostgreSQL, seconds for one statement; more than a request has is for work that reads everything.

    Raises:
        DataError: the folder is missing, or the file is something else than an event store, or the server can not be used.
        ConfigError: a URL of something else, or the extra is missing.
    """

    def __init__(
        self,
        where: Path | str,
        *,
        sync: Literal["full", "normal"] = "full",
        max_per_user: int = 1_000,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.max_per_user = max_per_user
        self._database = Database(where, sync=sync, what="an event store", patience_s=patience_s)
        self._database.prepare(EVENTS)
        self._writing = threading.Lock()
        self._one_user, self._many_users = _newest_of_one(max_per_user), _newest_of_many(max_per_user)

    @property
    def database(self) -> Database:
        """What it lives in, for stores beside it; it goes with this one."""
        return self._database

    @property
    def name(self) -> str:
        """What the store is called in messages: its path, or its URL without user and password."""
        return self._database.name

    @property
    def path(self) -> Path | None:
        """The SQLite file; None on PostgreSQL."""
        return self._database.path

    def append(self, events: Sequence[Event]) -> int:
        """Keep events; when this returns they are durable. Gives how many were new: an `event_id` that is there already is passed over.

        All of them are kept, or none.

        Raises:
            DataError: an id is empty or too long, a time or value is no finite number; names the event's place in the list.
            StoreUnavailable: the store can not be written. Where its server died just then, the events may be there all the same:
                only an `event_id` makes it harmless to send them again.
        """
        rows = [_row(place, e) for place, e in enumerate(events)]
        if not rows:
            return 0
        with self._writing:
            return self._database.write(lambda connection: self._append(connection, rows))

    def _append(self, connection: Connection, rows: list[dict[str, Any]]) -> int:
        if not self._database.is_server:
            return connection.execute(_APPEND_ROWS, rows).rowcount
        return connection.execute(_APPEND_COLUMNS, {name: [row[name] for row in rows] for name in _GIVEN}).rowcount

    def history(self, users: Sequence[str]) -> UserEvents:
        """The newest `max_per_user` events of each of the given users; StoreUnavailable when the store can not be read."""
        if len(users) == 1:
            rows = self._database.read(lambda c: c.execute(self._one_user, {"user": users[0]}).all())[::-1]
            return _user_events(np.zeros(len(rows), dtype=np.int64), rows)
        chunks = list(_chunks(list(dict.fromkeys(users)), _USERS_PER_QUERY))
        found = self._database.read(
            lambda c: [row for chunk in chunks for row in c.execute(self._many_users, {"users": chunk})]
        )
        return _in_order_of(users, found)

    def users(self) -> list[str]:
        """Everyone with an event, in the order of their first one kept."""
        wanted = select(EVENTS.c.user_id).group_by(EVENTS.c.user_id).order_by(func.min(EVENTS.c.id))
        return self._database.read(lambda connection: list(connection.scalars(wanted)))

    def last_number(self) -> int:
        """Of the newest event, 0 where there is none. Numbers rise as events are kept and are never used twice."""
        return int(self._database.read(lambda connection: connection.scalar(select(func.max(EVENTS.c.id)))) or 0)

    def numbered(self, after: int, upto: int, *, chunk: int = 50_000) -> Iterator[Sequence[Any]]:
        """Events with numbers above `after` and up to `upto`, in that order, in parts: rows of user_id, item_id, time_ms, action, value."""
        columns = (EVENTS.c.user_id, EVENTS.c.item_id, EVENTS.c.time_ms, EVENTS.c.action, EVENTS.c.value)
        wanted = select(EVENTS.c.id, *columns).where(EVENTS.c.id > bindparam("after"), EVENTS.c.id <= upto)
        wanted = wanted.order_by(EVENTS.c.id).limit(chunk)

        def part(after: int) -> Sequence[Any]:
            return self._database.read(lambda connection: connection.execute(wanted, {"after": after}).all())

        while rows := part(after):
            after = rows[-1].id
            yield [row[1:] for row in rows]

    def forget(self, user: str) -> tuple[int, bool]:
        """Wipe a user's events: how many there were, and whether the file was written anew; see store/erasing.py.

        PostgreSQL writes nothing anew: the bytes go when it next vacuums the table.
        """
        wanted = delete(EVENTS).where(EVENTS.c.user_id == user)
        with self._writing:
            if self.path is None:
                return self._database.write(lambda connection: connection.execute(wanted).rowcount), False
            return self._database.erase(wanted)

    def __len__(self) -> int:
        """Events kept."""
        wanted = select(func.count()).select_from(EVENTS)
        return int(self._database.read(lambda connection: connection.scalar(wanted)) or 0)

    def close(self) -> None:
        """Let go of the database; every acknowledged event is in it already."""
        self._database.close()


def _row(place: int, e: Event) -> dict[str, Any]:
    for name, given in (("user", e.user), ("item", e.item), ("action", e.action), ("event_id", e.event_id)):
        if given is None and name in ("action", "event_id"):
            continue
        if not isinstance(given, str) or not 0 < len(given) <= MAX_ID_CHARS:
            raise DataError(f"event {place}: {name} must be 1 to {MAX_ID_CHARS} characters of text, got {given!r:.80}")
        if (not given.isascii() and _is_broken(given)) or "\0" in given:
            raise DataError(f"event {place}: {name} holds what is no character of text: {given!r:.80}")
    if not 0 <= e.timestamp < MAX_TIMESTAMP:
        raise DataError(f"event {place}: timestamp must be seconds since 1970, got {e.timestamp!r}")
    if e.value is not None and not math.isfinite(e.value):
        raise DataError(f"event {place}: value must be a finite number, got {e.value!r}")
    return {
        "user_id": e.user,
        "item_id": e.item,
        "time_ms": round(e.timestamp * 1000),
        "action": e.action,
        "value": e.value,
        "event_id": e.event_id,
    }


def _is_broken(given: str) -> bool:
    """Whether text holds half a character (a lone surrogate), which no database takes."""
    return any("\ud800" <= char <= "\udfff" for char in given)


_READ = (EVENTS.c.item_id, EVENTS.c.time_ms, EVENTS.c.action, EVENTS.c.value)


def _newest_of_one(limit: int) -> Select[Any]:
    """Newest first."""
    mine = select(*_READ).where(EVENTS.c.user_id == bindparam("user"))
    return mine.order_by(EVENTS.c.time_ms.desc(), EVENTS.c.id.desc()).limit(limit)


def _newest_of_many(limit: int) -> Select[Any]:
    """Oldest first within a user, users in any order."""
    newest_first = (EVENTS.c.time_ms.desc(), EVENTS.c.id.desc())
    place = func.row_number().over(partition_by=EVENTS.c.user_id, order_by=newest_first).label("place")
    wanted = EVENTS.c.user_id.in_(bindparam("users", expanding=True))
    inner = select(*_READ, EVENTS.c.user_id, place).where(wanted).subquery()
    columns = (inner.c.item_id, inner.c.time_ms, inner.c.action, inner.c.value, inner.c.user_id)
    return select(*columns).where(inner.c.place <= limit).order_by(inner.c.user_id, inner.c.place.desc())


def _in_order_of(users: Sequence[str], found: list[Any]) -> UserEvents:
    """Sort by the user's place in the question; a user asked for twice gets the events twice."""
    place_of: dict[str, list[int]] = {}
    for place, user in enumerate(users):
        place_of.setdefault(user, []).append(place)
    owned = [(place, row) for row in found for place in place_of[row.user_id]]
    owned.sort(key=lambda pair: pair[0])
    return _user_events(np.array([place for place, _ in owned], dtype=np.int64), [row for _, row in owned])


def _user_events(user: Int, rows: Sequence[Any]) -> UserEvents:
    """From rows in the column order of _READ."""
    return UserEvents(
        user=user,
        item=[row[0] for row in rows],
        time_ms=np.array([row[1] for row in rows], dtype=np.int64),
        action=[row[2] for row in rows],
        value=np.array([1.0 if row[3] is None else row[3] for row in rows], dtype=np.float32),
    )


def _chunks(users: list[str], size: int) -> Iterator[list[str]]:
    return (users[start : start + size] for start in range(0, len(users), size))

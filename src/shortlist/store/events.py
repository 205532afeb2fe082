"""Events as they happen: kept for good before they are acknowledged, read back per user for the next answer.

    append([Event(user="u7", item="b2", timestamp=1_700_000_000.5)])     returns when the event can no longer be lost
    history(["u7", "u9"])                                                their newest events, oldest first

One SQLite file in WAL mode. An acknowledged event survives the death of the process (kill -9) with either setting of `sync`; with "full"
each append waits for the disk, so it survives a power cut too, as far as the disk tells the truth; with "normal" a power cut may take
the last moments before it, never the file. Several processes may share the file on one machine.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    Engine,
    Index,
    Integer,
    MetaData,
    Select,
    String,
    Table,
    bindparam,
    create_engine,
    event,
    func,
    select,
)
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import SQLAlchemyError

from shortlist.data.histories import Int
from shortlist.errors import DataError

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
_SQLITE_HEAD = b"SQLite format 3\0"
_APPEND = insert(EVENTS).on_conflict_do_nothing(index_elements=["event_id"])


class StoreUnavailable(RuntimeError):
    """The event store can not be read or written now: disk full, file locked or gone. Nothing was acknowledged."""


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
        path: SQLite file, made when missing.
        sync: "full" survives a power cut, "normal" only the death of the process, and is quicker.
        max_per_user: newest events of a user that `history` gives; older ones stay in the file.

    Raises:
        DataError: the folder is missing, or the file is something else than an event store.
    """

    def __init__(self, path: Path, *, sync: Literal["full", "normal"] = "full", max_per_user: int = 1_000) -> None:
        self.path = Path(path)
        self.max_per_user = max_per_user
        if not self.path.parent.is_dir():
            raise DataError(f"{self.path.parent} is not a folder, so no event store can be made in it; create it first")
        self._engine = sqlite_engine(self.path, sync=sync, what="an event store")
        self._writing = threading.Lock()
        try:
            _METADATA.create_all(self._engine)
        except SQLAlchemyError as error:
            self._engine.dispose()
            raise DataError(f"{self.path} can not be used as an event store: {_cause(error)}") from error
        self._one_user, self._many_users = _newest_of_one(max_per_user), _newest_of_many(max_per_user)

    def append(self, events: Sequence[Event]) -> int:
        """Keep events; when this returns they are durable. Gives how many were new: an `event_id` that is there already is passed over.

        All of them are kept, or none.

        Raises:
            DataError: an id is empty or too long, a time or value is no finite number; names the event's place in the list.
            StoreUnavailable: the file can not be written.
        """
        rows = [_row(place, e) for place, e in enumerate(events)]
        if not rows:
            return 0
        with self._writing, available(self.path), self._engine.begin() as connection:
            return connection.execute(_APPEND, rows).rowcount

    def history(self, users: Sequence[str]) -> UserEvents:
        """The newest `max_per_user` events of each of the given users; StoreUnavailable when the file can not be read."""
        with available(self.path), self._engine.connect() as connection:
            if len(users) == 1:
                found = list(connection.execute(self._one_user, {"user": users[0]}))[::-1]
                return _user_events(np.zeros(len(found), dtype=np.int64), found)
            found = []
            for chunk in _chunks(list(dict.fromkeys(users)), _USERS_PER_QUERY):
                found += connection.execute(self._many_users, {"users": chunk})
        return _in_order_of(users, found)

    def users(self) -> list[str]:
        """Everyone with an event, in the order of their first one kept."""
        wanted = select(EVENTS.c.user_id).group_by(EVENTS.c.user_id).order_by(func.min(EVENTS.c.id))
        with available(self.path), self._engine.connect() as connection:
            return list(connection.scalars(wanted))

    def __len__(self) -> int:
        """Events kept."""
        with available(self.path), self._engine.connect() as connection:
            return int(connection.scalar(select(func.count()).select_from(EVENTS)) or 0)

    def close(self) -> None:
        """Let go of the file; every acknowledged event is in it already."""
        self._engine.dispose()


def sqlite_engine(path: Path, *, sync: Literal["full", "normal", "off"], what: str) -> Engine:
    """A SQLite file in WAL mode whose connections wait for each other up to five seconds.

    DataError, which calls the file `what`, where it holds something else: SQLite itself would write over a very short one.
    """
    if path.is_file():
        with path.open("rb") as file:
            head = file.read(len(_SQLITE_HEAD))
        if head and head != _SQLITE_HEAD:
            raise DataError(f"{path} can not be used as {what}: file is not a database; choose another")
    engine = create_engine(f"sqlite:///{path}", pool_size=8, max_overflow=56)

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _: Any) -> None:
        for pragma in ("busy_timeout = 5000", "journal_mode = WAL", f"synchronous = {sync}"):
            connection.execute(f"PRAGMA {pragma}").close()

    return engine


@contextmanager
def available(path: Path) -> Iterator[None]:
    """Turns errors of the database into StoreUnavailable with the file's name."""
    try:
        yield
    except SQLAlchemyError as error:
        raise StoreUnavailable(f"{path} can not be used: {_cause(error)}") from error


def _cause(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error)


def _row(place: int, e: Event) -> dict[str, Any]:
    for name, text in (("user", e.user), ("item", e.item)):
        if not isinstance(text, str) or not 0 < len(text) <= MAX_ID_CHARS:
            raise DataError(f"event {place}: {name} must be 1 to {MAX_ID_CHARS} characters of text, got {text!r:.80}")
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

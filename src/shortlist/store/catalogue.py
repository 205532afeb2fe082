"""What is known of items and users since a snapshot was made: titles, attributes, what is not available, and who asked to be forgotten.

    upsert_items([ItemUpdate(item="b2", title="Mug", attributes={"price": 7})])      durable when it returns
    remove_items(["c3"])                                                             not available from now on
    forget_user("u7")                                                                attributes gone, a tombstone in their place

Tables in the database of the event store. Every change gets a number that rises, so that several processes over one file can ask what
is new. A tombstone holds a digest of the user's id and not the id; an id that can be guessed can be found again by it.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    delete,
    func,
    insert,
    select,
    text,
)

from shortlist.errors import DataError
from shortlist.store.databases import LOCK_SPACE, Database
from shortlist.store.events import MAX_ID_CHARS

MAX_ATTRIBUTES = 200
MAX_TEXT_BYTES = 64 * 1024
"""Of one item's or user's attributes as JSON."""
_CHUNK = 500
_METADATA = MetaData()
ITEMS = Table(
    "items_since",
    _METADATA,
    Column("change", Integer, primary_key=True),
    Column("item_id", String, nullable=False, unique=True),
    Column("title", String),
    Column("attributes", String, nullable=False),
    Column("available", Boolean, nullable=False),
    sqlite_autoincrement=True,
)
USERS = Table(
    "users_since",
    _METADATA,
    Column("change", Integer, primary_key=True),
    Column("user_id", String, nullable=False, unique=True),
    Column("attributes", String, nullable=False),
    sqlite_autoincrement=True,
)
GONE = Table(
    "users_gone",
    _METADATA,
    Column("change", Integer, primary_key=True),
    Column("digest", LargeBinary, nullable=False, unique=True),
    Column("at_ms", BigInteger, nullable=False),
    sqlite_autoincrement=True,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemUpdate:
    """What is new about an item; what is left out stays as it was."""

    item: str
    """Any id, known or not."""
    title: str | None = None
    """Text to show it by; None = as before."""
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Values by column of the items table: text, number, boolean, list of texts or numbers; None = missing from now on."""
    available: bool = True
    """Whether it may be shown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemNow:
    """All that is known of an item since."""

    item: str
    title: str | None
    attributes: Mapping[str, Any]
    available: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """What happened after a point."""

    items: Sequence[ItemNow]
    gone: Sequence[bytes]
    """Digests of users."""
    mark: tuple[int, int]
    """The point after it."""
    any_users: bool
    """Whether any user has attributes."""


class CatalogueStore:
    """Keeps changes of items and users; safe to use from many threads and several processes.

    Args:
        where: path of a SQLite file, made when missing, or the URL of a PostgreSQL database; that of the event store.

    Raises:
        DataError: the folder is missing, or the file holds something else, or the server can not be used.
        ConfigError: a URL of something else, or the extra is missing.
    """

    def __init__(self, where: Path | str) -> None:
        self._database = Database(where, sync="full", what="a store of items and users")
        self._database.prepare(ITEMS)
        self._writing = threading.Lock()

    def upsert_items(self, updates: Sequence[ItemUpdate]) -> None:
        """Keep what is new about items; all or nothing. DataError names what is wrong, StoreUnavailable a store that can not be written."""
        for update in updates:
            _check(update.item, update.attributes, "item", title=update.title)

        def write(connection: Connection) -> None:
            known = _items(connection, [update.item for update in updates])
            for update in updates:
                old = known.get(update.item)
                known[update.item] = ItemNow(
                    item=update.item,
                    title=update.title if update.title is not None or old is None else old.title,
                    attributes={**(old.attributes if old else {}), **update.attributes},
                    available=update.available,
                )
            _write_items(connection, list(known.values()))

        self._write(write)

    def remove_items(self, items: Sequence[str]) -> None:
        """These may not be shown from now on; an upsert brings one back."""
        for item in items:
            _check(item, {}, "item")

        def write(connection: Connection) -> None:
            nothing = {item: ItemNow(item=item, title=None, attributes={}, available=False) for item in items}
            known = {**nothing, **_items(connection, list(nothing))}
            _write_items(connection, [replace(item, available=False) for item in known.values()])

        self._write(write)

    def upsert_users(self, attributes: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep values by user and column; columns that are not named stay as they were."""
        for user, values in attributes.items():
            _check(user, values, "user")

        def write(connection: Connection) -> None:
            known = _users(connection, list(attributes))
            rows = [
                {"user_id": user, "attributes": json.dumps({**known.get(user, {}), **values}, ensure_ascii=False)}
                for user, values in attributes.items()
            ]
            _replace(connection, USERS.c.user_id, rows)

        self._write(write)

    def users(self, users: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Attributes by user, of those that have any; StoreUnavailable where they can not be read."""
        return self._database.read(lambda connection: _users(connection, users))

    def items(self) -> list[ItemNow]:
        """Everything that is known of items since, in the order of their last change: what the next training adds to its table."""
        return list(self.changes().items)

    def forget_user(self, user: str) -> bool:
        """Wipe a user's attributes and put up a tombstone; whether the file was written anew. See `erase`."""
        _check(user, {}, "user")
        row = {"digest": digest(user), "at_ms": round(time.time() * 1000)}
        wanted = delete(USERS).where(USERS.c.user_id == user)
        self._write(lambda connection: _replace(connection, GONE.c.digest, [row]))
        if self._database.path is None:
            self._write(lambda connection: connection.execute(wanted))
            return False
        with self._writing:
            return self._database.erase(wanted)[1]

    def changes(self, since: tuple[int, int] = (0, 0)) -> Changes:
        """What is new after a point; StoreUnavailable where it can not be read."""
        return self._database.read(lambda connection: _changes(connection, since))

    def close(self) -> None:
        """Let go of the database; every change is in it already."""
        self._database.close()

    def _write(self, work: Callable[[Connection], Any]) -> None:
        """In turn, so that numbers of changes grow in the order in which they can be read."""

        def in_turn(connection: Connection) -> None:
            if self._database.is_server:
                connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK_SPACE}, 2)"))
            work(connection)

        with self._writing:
            self._database.write(in_turn)


def _changes(connection: Connection, since: tuple[int, int]) -> Changes:
    last_item, last_gone, last_user = connection.execute(_MARK).one()
    items: list[ItemNow] = []
    gone: list[bytes] = []
    if last_item > since[0]:
        wanted = select(ITEMS).where(ITEMS.c.change > since[0], ITEMS.c.change <= last_item)
        items = [_item(row) for row in connection.execute(wanted.order_by(ITEMS.c.change))]
    if last_gone > since[1]:
        wanted_gone = select(GONE.c.digest).where(GONE.c.change > since[1], GONE.c.change <= last_gone)
        gone = [bytes(row.digest) for row in connection.execute(wanted_gone)]
    return Changes(items=items, gone=gone, mark=(last_item, last_gone), any_users=bool(last_user))


def _items(connection: Connection, items: Sequence[str]) -> dict[str, ItemNow]:
    found = {}
    for start in range(0, len(items), _CHUNK):
        wanted = select(ITEMS).where(ITEMS.c.item_id.in_(items[start : start + _CHUNK]))
        found.update({row.item_id: _item(row) for row in connection.execute(wanted)})
    return found


def _users(connection: Connection, users: Sequence[str]) -> dict[str, dict[str, Any]]:
    found = {}
    for start in range(0, len(users), _CHUNK):
        wanted = select(USERS).where(USERS.c.user_id.in_(users[start : start + _CHUNK]))
        found.update({row.user_id: json.loads(row.attributes) for row in connection.execute(wanted)})
    return found


def _write_items(connection: Connection, items: Sequence[ItemNow]) -> None:
    rows = [
        {
            "item_id": item.item,
            "title": item.title,
            "attributes": json.dumps(dict(item.attributes), ensure_ascii=False),
            "available": item.available,
        }
        for item in items
    ]
    _replace(connection, ITEMS.c.item_id, rows)


def _replace(connection: Connection, key: Column[Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows in place of those with the same key, so that each has a new number of change."""
    table = key.table
    for start in range(0, len(rows), _CHUNK):
        part = rows[start : start + _CHUNK]
        connection.execute(delete(table).where(key.in_([row[key.name] for row in part])))
        connection.execute(insert(table), part)


def digest(user: str) -> bytes:
    """What a tombstone keeps of an id."""
    return hashlib.blake2b(user.encode(), digest_size=16).digest()


_MARK = select(
    func.coalesce(select(func.max(ITEMS.c.change)).scalar_subquery(), 0),
    func.coalesce(select(func.max(GONE.c.change)).scalar_subquery(), 0),
    func.coalesce(select(func.max(USERS.c.change)).scalar_subquery(), 0),
)


def _item(row: Any) -> ItemNow:
    return ItemNow(
        item=row.item_id, title=row.title, attributes=json.loads(row.attributes), available=bool(row.available)
    )


def _check(name: str, attributes: Mapping[str, Any], what: str, *, title: str | None = None) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_ID_CHARS:
        raise DataError(f"{what} must be 1 to {MAX_ID_CHARS} characters of text, got {name!r:.80}")
    if len(attributes) > MAX_ATTRIBUTES:
        raise DataError(f"{what} {name!r:.80} has {len(attributes):,} attributes; at most {MAX_ATTRIBUTES} are kept")
    try:
        plain = json.dumps([name, title, dict(attributes)], allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{what} {name!r:.80} has text that is not Unicode ({error.reason})") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{what} {name!r:.80}: attributes must be plain values ({error})") from error
    if len(plain) > MAX_TEXT_BYTES:
        raise DataError(f"{what} {name!r:.80}: attributes are longer than {MAX_TEXT_BYTES:,} bytes")

"""The database behind a store: a SQLite file, or a PostgreSQL server; how each is opened, and what happens when it is gone.

    Database("events.db", sync="full", what="an event store")                a file in WAL mode, made when missing
    Database("postgresql://user@host/name", ...)                             needs the extra `postgres`

A connection that turns out to be dead before anything was decided is replaced and the work done again, once. A server that can not be
reached is StoreUnavailable at once for a moment, so that requests do not wait for it one after the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import URL, Connection, Delete, Engine, Table, create_engine, event, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError

from shortlist.errors import ConfigError, DataError
from shortlist.extras import library
from shortlist.store.breaker import Breaker
from shortlist.store.erasing import erase

T = TypeVar("T")
Sync = Literal["full", "normal", "off"]
REST_S = 0.5
"""Seconds for which a server that could not be reached is left alone."""
TRIES = 2
PREPARE_S = 5.0
LOCK_SPACE = 0x53484F52
"""First number of our advisory locks on PostgreSQL, so that they meet no other program's."""
_SMALLEST = 512
"""Bytes of the smallest SQLite file that holds anything."""
PATIENCE_S = 3.0
_REACH = {"connect_timeout": 2, "keepalives_idle": 10, "tcp_user_timeout": 3_000, "application_name": "shortlist"}
"""Seconds, and milliseconds, after which a server that says nothing counts as gone."""


class StoreUnavailable(RuntimeError):
    """The store can not be read or written now: disk full, file locked, server gone. Nothing was acknowledged."""


class Database:
    """One database that a store lives in; safe to use from many threads.

    Args:
        where: path of a SQLite file, or a URL, postgresql://user:password@host:port/name.
        sync: whether a commit waits for the disk, on SQLite; PostgreSQL always waits ("full").
        what: the store, for messages.
        patience_s: PostgreSQL: seconds for one statement, and of silence after which the server counts as gone.

    Raises:
        ConfigError: a URL of another kind, or the extra `postgres` is not installed.
        DataError: the file's folder is missing, or the file is something else.
    """

    def __init__(self, where: Path | str, *, sync: Sync, what: str, patience_s: float = PATIENCE_S) -> None:
        place = place_of(where, what)
        self.what = what
        self._file: tuple[int, int] | None = None
        """Device and number of the SQLite file that was prepared."""
        self.path = place if isinstance(place, Path) else None
        """The SQLite file; None on PostgreSQL."""
        if isinstance(place, Path):
            self.name = str(place)
            if not place.parent.is_dir():
                wanted = what.removeprefix("an ").removeprefix("a ")
                raise DataError(f"{place.parent} is not a folder, so no {wanted} can be made in it; create it first")
            self.engine = sqlite_engine(place, sync=sync, what=what)
            self._breaker = Breaker(0.0)
        else:
            self.name = f"postgresql://{place.host or 'localhost'}:{place.port or 5432}/{place.database or ''}"
            self.engine = _postgres_engine(place, what, patience_s)
            self._breaker = Breaker(REST_S)

    @property
    def is_server(self) -> bool:
        """Whether it is PostgreSQL."""
        return self.path is None

    def prepare(self, table: Table) -> None:
        """Make the table where it is missing; DataError where that can not be, or another one has its name, and as `require`."""
        self.require()
        deadline = time.monotonic() + PREPARE_S
        while True:
            try:
                self._make(table)
                self._file = self._found()
                return
            except SQLAlchemyError as error:
                # Two processes that make one new file at once do not wait for each other, though SQLite's connections else do.
                met = any(word in cause(error) for word in ("locked", "already exists"))
                if met and not self.is_server and time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                self.close()
                raise DataError(f"{self.name} can not be used as {self.what}: {cause(error)}") from error

    def _make(self, table: Table) -> None:
        with self.engine.begin() as connection:
            if self.is_server:  # two servers that start together would both make it
                connection.execute(text(f"SELECT pg_advisory_xact_lock({LOCK_SPACE}, 0)"))
            table.metadata.create_all(connection)
        with self.engine.connect() as connection:
            connection.execute(select(table).limit(0))

    def read(self, work: Callable[[Connection], T]) -> T:
        """The result of `work`, which changes nothing; StoreUnavailable where the database can not be used."""
        return self._do(work, writes=False)

    def write(self, work: Callable[[Connection], T]) -> T:
        """The result of `work` once it is committed, all of it or nothing.

        Raises StoreUnavailable where it is not known to be. Work whose commit went unanswered is not done again: it may be there.
        """
        return self._do(work, writes=True)

    def erase(self, *deletions: Delete) -> tuple[int, bool]:
        """Wipe rows of the SQLite file: how many there were, and whether the file was written anew; see `erasing.py`.

        Raises StoreUnavailable as `write` does.
        """
        assert self.path is not None, "a database server wipes its rows itself"
        self.require()
        with available(self.path):
            return erase(self.engine, self.path, deletions)

    def require(self) -> None:
        """StoreUnavailable where the SQLite file is not the one that was opened: open connections would write to the old one, which nobody
        finds again, and new ones would make an empty one in its place."""
        if self._file is not None and self._found() != self._file:
            raise StoreUnavailable(
                f"{self.name} can not be used: the file was removed or replaced while it was in use; "
                "put it back, or start again with what is there"
            )

    def _found(self) -> tuple[int, int] | None:
        """Which file stands at the path now."""
        try:
            about = None if self.path is None else self.path.stat()
        except OSError:
            return None
        return None if about is None else (about.st_dev, about.st_ino)

    def close(self) -> None:
        """Let go of all connections."""
        self.engine.dispose()

    def _do(self, work: Callable[[Connection], T], *, writes: bool) -> T:
        self.require()
        resting = self._breaker.refusal() if self.is_server else None
        if resting is not None:
            raise StoreUnavailable(f"{self.name} can not be used: {resting}")
        for _ in range(TRIES):
            committing = False
            try:
                with self.engine.connect() as connection:
                    result = work(connection)
                    if writes:
                        committing = True
                        connection.commit()
            except SQLAlchemyError as error:
                problem, is_lost = error, isinstance(error, DBAPIError) and error.connection_invalidated
                if is_lost and not committing:
                    continue
                break
            self._breaker.worked()
            return result
        reason = cause(problem)
        if self.is_server and isinstance(problem, OperationalError):
            self._breaker.failed(reason)
        raise StoreUnavailable(f"{self.name} can not be used: {reason}") from problem


def place_of(where: Path | str, what: str) -> Path | URL:
    """A path as it is, a database's URL taken apart; ConfigError for a URL that no store can use. Shows no password."""
    if isinstance(where, Path) or "://" not in where:
        return Path(where)
    try:
        url = make_url(where)
    except (ArgumentError, ValueError):
        raise ConfigError(
            f"the database URL of {what} can not be read; write postgresql://user:password@host:5432/name"
        ) from None
    kind = url.get_backend_name()
    if kind == "sqlite" and url.database:
        return Path(url.database)
    if kind not in ("postgresql", "postgres"):
        raise ConfigError(f"{what} is a SQLite file (a path) or on PostgreSQL (postgresql://...), not on {kind!r}")
    return url.set(drivername="postgresql+psycopg")


def sqlite_engine(path: Path, *, sync: Sync, what: str) -> Engine:
    """A SQLite file in WAL mode whose connections wait for each other up to five seconds.

    DataError, which calls the file `what`, where it is too short to be one: SQLite itself would write over it. Any other file that is none
    SQLite refuses at the first use. The file is not opened here to look into it: when a process closes a file, it loses all locks that it
    has on that file (POSIX), also those of its other connections; the next process to close the file would then believe to be the last
    one and remove the log that holds acknowledged events.
    """
    if path.is_file() and 0 < path.stat().st_size < _SMALLEST:
        raise DataError(f"{path} can not be used as {what}: file is not a database; choose another")
    engine = create_engine(f"sqlite:///{path}", pool_size=8, max_overflow=56)

    @event.listens_for(engine, "connect")
    def _pragmas(connection: Any, _: Any) -> None:
        for pragma in ("busy_timeout = 5000", "journal_mode = WAL", f"synchronous = {sync}"):
            connection.execute(f"PRAGMA {pragma}").close()

    return engine


def cause(error: SQLAlchemyError) -> str:
    """What the database said, in one line."""
    return " ".join(str(getattr(error, "orig", None) or error).split())


def _postgres_engine(url: URL, what: str, patience_s: float) -> Engine:
    psycopg = library("psycopg", extra="postgres", user=f"{what} on PostgreSQL")
    given, limit_ms = url.query.get("options", ""), round(patience_s * 1_000)
    own = f"-c synchronous_commit=on -c statement_timeout={limit_ms} -c lock_timeout={limit_ms}"
    engine = create_engine(
        url,
        pool_size=8,
        max_overflow=8,
        pool_timeout=5,
        pool_pre_ping=True,
        isolation_level="READ COMMITTED",
        connect_args={**_REACH, "options": " ".join([*([given] if isinstance(given, str) else given), own])},
    )

    class Connected(psycopg.Connection):  # type: ignore[misc, name-defined, unused-ignore]
        """A connection that does not wait for ever: the server's own limits are of no use where the server hangs."""

        def wait(self, work: Any, *told: Any, **named: Any) -> Any:
            """The result of one exchange; the connection is closed where the server falls silent in it."""
            try:
                return super().wait(_within(work, patience_s + 1.0), *told, **named)
            except TimeoutError:
                self.close()
                raise psycopg.OperationalError(f"no answer for {patience_s + 1.0:g} seconds") from None

    @event.listens_for(engine, "do_connect")
    def _connect(_dialect: Any, _record: Any, told: Any, named: Any) -> Any:
        return Connected.connect(*told, **named)

    return engine


def _within(work: Any, silence_s: float) -> Any:
    """A generator that waits for a socket, with TimeoutError where nothing comes for so long; psycopg looks every 0.1 seconds."""
    until = time.monotonic() + silence_s
    try:
        wanted = next(work)
        while True:
            ready = yield wanted
            if ready:
                until = time.monotonic() + silence_s
            elif time.monotonic() > until:
                raise TimeoutError
            wanted = work.send(ready)
    except StopIteration as done:
        return done.value


@contextmanager
def available(name: Path | str) -> Iterator[None]:
    """Turns errors of the database into StoreUnavailable with the store's name."""
    try:
        yield
    except SQLAlchemyError as error:
        raise StoreUnavailable(f"{name} can not be used: {cause(error)}") from error

"""The last requests and what every stage did with them, for replay, explanation and off-policy estimates.

A request only puts its record into a bounded queue; one thread writes them to a SQLite file, newest `max_rows` kept. When the queue is
full the record is dropped and counted: an answer never waits for its log line. The writer works in bursts, and on arrays and not on
single numbers, since while it runs Python the requests do not.
"""

from __future__ import annotations

import json
import math
import queue
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import (
    BigInteger,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    delete,
    func,
    insert,
    select,
)
from sqlalchemy.exc import SQLAlchemyError

from shortlist.cascade.exposures import METADATA as OF_EXPERIMENTS
from shortlist.cascade.exposures import Exposure, forgetting, write_exposures
from shortlist.cascade.meter import StageReport
from shortlist.data.histories import Float, Int
from shortlist.data.vocabulary import Id
from shortlist.errors import ConfigError, DataError
from shortlist.store.erasing import erase
from shortlist.store.events import available, sqlite_engine

_BATCH = 256
_LINGER_S = 0.1
"""Time between bursts, so that most requests meet no writer at all."""
_METADATA = MetaData()
REQUESTS = Table(
    "requests",
    _METADATA,
    Column("id", Integer, primary_key=True),
    Column("request_id", String, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("user_id", String),
    Column("chain", String, nullable=False),
    Column("snapshot_version", String, nullable=False),
    Column("propensity", Double, nullable=False),
    Column("degraded", String),
    Column("details", LargeBinary, nullable=False),
    Column("scores", LargeBinary, nullable=False),
    Index("requests_by_request_id", "request_id"),
    sqlite_autoincrement=True,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedStage:
    """Candidates as a stage left them, best first."""

    name: str
    rows: Int
    """[C] catalogue rows."""
    scores: Float
    """[C]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedRequest:
    """One answered request."""

    request_id: str
    at_ms: int
    """When it was answered: milliseconds since 1970 UTC."""
    user: str | None
    k: int
    chain: str
    snapshot_version: str
    page: Sequence[Id]
    """Item ids as shown."""
    stages: Sequence[LoggedStage]
    reports: Sequence[StageReport]
    removed: Mapping[str, int] = field(default_factory=dict)
    arranged: Mapping[str, int] = field(default_factory=dict)
    degraded: str | None = None
    propensity: float = 1.0
    """Chance with which this page was chosen; 1 where nothing is drawn."""
    reason: str = "default"
    """Why this chain; see `Allotted`."""
    moment: int | None = None
    """Asked about, seconds since 1970 UTC: later events were not read."""
    num_history: int | None = None
    """Events that were known of the user."""
    asked: Mapping[str, Any] | None = None
    """What else the request brought, as plain values; see `repeating.py`."""
    candidates: Int | None = None
    """[C] catalogue rows that the request brought; None = it chose from the catalogue."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """What a request log holds."""

    num_kept: int
    num_gone: int
    """Older requests that had to make room, and those of deleted users."""
    oldest_ms: int | None
    """Of the oldest that is left; None where there is none."""
    newest_ms: int | None


class RequestLog:
    """Bounded log with its own writer thread; `add` may be called from any thread.

    Args:
        path: SQLite file, made when missing.
        max_rows: newest requests kept.
        max_waiting: records that may wait for the writer; beyond that they are dropped and counted.

    Raises:
        DataError: the file is something else than a request log, or can not be made.
        ConfigError: a bound below 1.
    """

    def __init__(self, path: Path, *, max_rows: int = 100_000, max_waiting: int = 2_000) -> None:
        if max_rows < 1 or max_waiting < 1:
            raise ConfigError(f"max_rows and max_waiting must be at least 1, got {max_rows} and {max_waiting}")
        self.path = Path(path)
        self.max_rows = max_rows
        if not self.path.parent.is_dir():
            raise DataError(f"{self.path.parent} is not a folder, so no request log can be made in it; create it first")
        # A lost log line after a power cut harms nobody, so nothing waits for the disk.
        self._engine = sqlite_engine(self.path, sync="off", what="a request log")
        try:
            _METADATA.create_all(self._engine)
            OF_EXPERIMENTS.create_all(self._engine)
        except SQLAlchemyError as error:
            self._engine.dispose()
            raise DataError(f"{self.path} can not be used as a request log: {getattr(error, 'orig', error)}") from error
        self._dropped = 0
        self._counting = threading.Lock()
        self._hurry = threading.Event()
        self._waiting: queue.Queue[_Waiting | None] = queue.Queue(max_waiting)
        self._writer = threading.Thread(target=self._write_all, name="request-log", daemon=True)
        self._writer.start()

    def add(self, request: LoggedRequest, ids_of: Callable[[Int], list[Id | None]]) -> bool:
        """Hand a record to the writer; False when it was dropped. `ids_of` turns rows into item ids, in the writer's thread."""
        return self._hand_over((request, ids_of))

    def expose(self, exposures: Sequence[Exposure]) -> bool:
        """Hand over who saw which variant; False when it was dropped."""
        return self._hand_over(list(exposures))

    def _hand_over(self, waiting: _Waiting) -> bool:
        try:
            self._waiting.put_nowait(waiting)
        except queue.Full:
            self._drop(1)
            return False
        return True

    @property
    def dropped(self) -> int:
        """Records lost since the start: the queue was full, or the file could not be written."""
        return self._dropped

    def find(self, request_id: str) -> dict[str, Any] | None:
        """What is known of a request, as plain values; None when it is not, or no longer, in the log.

        Keys: request_id, at_ms, user, chain, snapshot_version, propensity, degraded, k, page, removed, reports, reason, moment,
        num_history, asked, and of each of the stages its name, items and scores. Records of earlier versions lack reason to asked.

        Raises StoreUnavailable where the file can not be read.
        """
        self.flush()
        with available(self.path), self._engine.connect() as connection:
            row = connection.execute(select(REQUESTS).where(REQUESTS.c.request_id == request_id)).first()
        return None if row is None else _plain(row)

    def read(
        self, *, since_ms: int | None = None, until_ms: int | None = None, newest: int | None = None
    ) -> Iterator[dict[str, Any]]:
        """Requests in the order in which they were written, each as `find` gives it; read in pieces, while others may be added.

        Args:
            since_ms: from this moment on (included).
            until_ms: before this moment.
            newest: so many at most, the newest of them.

        Raises DataError when the file can not be read.
        """
        self.flush()
        within = [REQUESTS.c.at_ms >= since_ms] if since_ms is not None else []
        within += [REQUESTS.c.at_ms < until_ms] if until_ms is not None else []
        wanted = select(REQUESTS.c.id).where(*within).order_by(REQUESTS.c.id.desc()).limit(newest)
        try:
            with self._engine.connect() as connection:
                ids = list(connection.scalars(wanted))[::-1]
            for start in range(0, len(ids), _BATCH):
                part = ids[start : start + _BATCH]
                with self._engine.connect() as connection:
                    rows = connection.execute(select(REQUESTS).where(REQUESTS.c.id.in_(part)).order_by(REQUESTS.c.id))
                    found = [_plain(row) for row in rows]
                yield from found
        except SQLAlchemyError as error:
            raise DataError(f"{self.path} can not be read: {getattr(error, 'orig', error)}") from error

    def span(self) -> Span:
        """What is in the file, and how much has gone to make room."""
        self.flush()
        c = REQUESTS.c
        with self._engine.connect() as connection:
            count, last, oldest, newest = connection.execute(
                select(func.count(), func.max(c.id), func.min(c.at_ms), func.max(c.at_ms))
            ).one()
        return Span(num_kept=count, num_gone=(last or 0) - count, oldest_ms=oldest, newest_ms=newest)

    def __len__(self) -> int:
        """Requests in the file."""
        self.flush()
        with self._engine.connect() as connection:
            return int(connection.scalar(select(func.count()).select_from(REQUESTS)) or 0)

    def forget(self, user: str) -> tuple[int, bool]:
        """Wipe a user's answers: how many there were, and whether the file was written anew; see store/erasing.py.

        Raises StoreUnavailable where the file can not be written.
        """
        self.flush()
        with available(self.path):
            return erase(
                self._engine, self.path, [delete(REQUESTS).where(REQUESTS.c.user_id == user), forgetting(user)]
            )

    def flush(self) -> None:
        """Wait until everything that was added so far is written."""
        if self._writer.is_alive():
            self._hurry.set()
            self._waiting.join()
            self._hurry.clear()

    def close(self) -> None:
        """Write what waits and let go of the file."""
        if self._writer.is_alive():
            self._hurry.set()
            self._waiting.put(None)
            self._writer.join()
        self._engine.dispose()

    def _write_all(self) -> None:
        """The writer: takes what waits, up to a batch, and writes it in one transaction."""
        running = True
        while running:
            taken = [self._waiting.get()]
            if taken[0] is not None:
                self._hurry.wait(_LINGER_S)
            while len(taken) < _BATCH and not self._waiting.empty():
                taken.append(self._waiting.get_nowait())
            records = [record for record in taken if record is not None]
            running = len(records) == len(taken)
            try:
                self._write(records)
            except Exception:  # the log must never take the server down; what is lost is counted
                self._drop(len(records))
            for _ in taken:
                self._waiting.task_done()

    def _write(self, records: Sequence[_Waiting]) -> None:
        if not records:
            return
        rows = [_row(*record) for record in records if not isinstance(record, list)]
        with self._engine.begin() as connection:
            if rows:
                connection.execute(insert(REQUESTS), rows)
                newest = select(func.max(REQUESTS.c.id)).scalar_subquery()
                connection.execute(delete(REQUESTS).where(REQUESTS.c.id <= newest - self.max_rows))
            write_exposures(
                connection, [exposure for record in records if isinstance(record, list) for exposure in record]
            )

    def _drop(self, count: int) -> None:
        with self._counting:
            self._dropped += count


_Waiting = tuple[LoggedRequest, Callable[[Int], list[Id | None]]] | list[Exposure]


def _plain(row: Any) -> dict[str, Any]:
    """A row of the table as plain values."""
    details = json.loads(zlib.decompress(row.details))
    scores = np.frombuffer(zlib.decompress(row.scores), dtype=np.float32)
    ends = np.cumsum([len(stage["items"]) for stage in details["stages"]])
    for stage, mine in zip(details["stages"], np.split(scores, ends)):
        stage["scores"] = [value if math.isfinite(value) else None for value in mine.tolist()]
    return {
        "request_id": row.request_id,
        "at_ms": row.at_ms,
        "user": row.user_id,
        "chain": row.chain,
        "snapshot_version": row.snapshot_version,
        "propensity": row.propensity,
        "degraded": row.degraded,
        **details,
    }


def _row(request: LoggedRequest, ids_of: Callable[[Int], list[Id | None]]) -> dict[str, Any]:
    ids = ids_of(np.concatenate([stage.rows for stage in request.stages]))
    ends = np.cumsum([len(stage.rows) for stage in request.stages]).tolist()
    details: dict[str, Any] = {
        "k": request.k,
        "page": list(request.page),
        "stages": [
            {"name": stage.name, "items": ids[end - len(stage.rows) : end]} for stage, end in zip(request.stages, ends)
        ],
        "reports": [asdict(report) for report in request.reports],
        "removed": dict(request.removed),
        "arranged": dict(request.arranged),
        "reason": request.reason,
        "moment": request.moment,
        "num_history": request.num_history,
        "asked": None if request.asked is None else dict(request.asked),
    }
    if request.candidates is not None:
        details["asked"] = {**(details["asked"] or {}), "candidates": ids_of(request.candidates)}
    scores = np.concatenate([stage.scores for stage in request.stages]).astype(np.float32)
    return {
        "request_id": request.request_id,
        "at_ms": request.at_ms,
        "user_id": request.user,
        "chain": request.chain,
        "snapshot_version": request.snapshot_version,
        "propensity": request.propensity,
        "degraded": request.degraded,
        "details": zlib.compress(json.dumps(details, default=_simple).encode(), level=1),
        "scores": zlib.compress(scores.tobytes(), level=1),
    }


def _simple(value: Any) -> Any:
    """A value of a context column that JSON does not know: a number of numpy as a number, anything else as text."""
    return value.item() if isinstance(value, np.generic) else str(value)

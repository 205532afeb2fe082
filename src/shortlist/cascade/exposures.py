"""Who saw which variant: a table of its own in the file of the request log, so that it can be kept longer than whole requests.

A row says which page (`request_id`) of which unit was made by which variant, what stood on it, and with which chances; what came of it is
found in the events, by the unit's id and the time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    delete,
    func,
    insert,
    select,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.sql.dml import Delete

from shortlist.cascade.experiments import Experiment, experiment_of
from shortlist.errors import DataError
from shortlist.store.events import sqlite_engine

METADATA = MetaData()
EXPOSURES = Table(
    "exposures",
    METADATA,
    Column("id", Integer, primary_key=True),
    Column("request_id", String, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("experiment", String, nullable=False),
    Column("variant", String, nullable=False),
    Column("unit", String, nullable=False),
    Column("propensity", Double, nullable=False),
    Column("spent_ms", Double, nullable=False),
    Column("degraded", Boolean, nullable=False),
    Column("page", String, nullable=False),
    Index("exposures_by_experiment", "experiment", "id"),
    Index("exposures_by_unit", "unit"),
    sqlite_autoincrement=True,
)
STOPS = Table(
    "experiment_stops",
    METADATA,
    Column("experiment", String, primary_key=True),
    Column("at_ms", BigInteger, nullable=False),
    Column("reason", String, nullable=False),
)
DEFINED = Table(
    "experiments",
    METADATA,
    Column("experiment", String, primary_key=True),
    Column("definition", String, nullable=False),
)
MAX_ROWS = 2_000_000
"""Newest exposures kept, some 200 bytes each."""
_AT_ONCE = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Exposure:
    """One page that one experiment had a hand in."""

    request_id: str
    at_ms: int
    """When it was answered: milliseconds since 1970 UTC."""
    experiment: str
    variant: str
    """`interleaved` where both made it."""
    unit: str
    """Id of the user, of an anonymous request its session, else of the request; also the user of its events."""
    propensity: float
    """Chance of a unit that takes part to get the variant."""
    spent_ms: float
    degraded: bool
    items: tuple[str, ...]
    """Ids as shown, from the top."""
    chances: tuple[float, ...] = ()
    """Chance of each item to stand at its place, where the variant explores; empty = nothing was drawn."""
    teams: tuple[int, ...] = ()
    """0 or 1 per place: which variant brought the item, where both made the page."""

    def row(self) -> dict[str, Any]:
        """As the table has it."""
        page = {"items": self.items, "chances": self.chances, "teams": self.teams}
        named = {name: getattr(self, name) for name in Exposure.__slots__ if name not in page}
        return {**named, "page": json.dumps({name: value for name, value in page.items() if value})}


def write_exposures(connection: Connection, exposures: Sequence[Exposure]) -> None:
    """Within the transaction of the connection; the oldest beyond MAX_ROWS make room."""
    if exposures:
        connection.execute(insert(EXPOSURES), [exposure.row() for exposure in exposures])
        newest = select(func.max(EXPOSURES.c.id)).scalar_subquery()
        connection.execute(delete(EXPOSURES).where(EXPOSURES.c.id <= newest - MAX_ROWS))


def forgetting(user: str) -> Delete:
    """The statement that removes what a user saw."""
    return delete(EXPOSURES).where(EXPOSURES.c.unit == user)


def read_exposures(path: Path, experiment: str | None = None) -> Iterator[Exposure]:
    """Exposures of a request log in the order in which they were written, of one experiment or of all; the file may be written meanwhile.

    Raises DataError where the file is not there or is no request log of a server with experiments.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; give the request log that the server writes")
    engine = sqlite_engine(Path(path), sync="off", what="a request log")
    c = EXPOSURES.c
    wanted = [c.experiment == experiment] if experiment is not None else []
    last = 0
    try:
        while True:
            with engine.connect() as connection:
                found = select(EXPOSURES).where(c.id > last, *wanted).order_by(c.id).limit(_AT_ONCE)
                rows = list(connection.execute(found))
            yield from (_exposure(row) for row in rows)
            if len(rows) < _AT_ONCE:
                return
            last = rows[-1].id
    except SQLAlchemyError as error:
        raise DataError(
            f"{path} has no exposures to experiments ({getattr(error, 'orig', error)}); give the request log of a server that ran with "
            "--experiments"
        ) from error
    finally:
        engine.dispose()


def exposures_gone(path: Path) -> int:
    """Rows that had to make room or were of deleted users; DataError where the file can not be read."""
    with _opened(path) as connection:
        last, count = connection.execute(select(func.max(EXPOSURES.c.id), func.count())).one()
    return int((last or 0) - count)


def write_stop(path: Path, experiment: str, reason: str, at_ms: int) -> None:
    """An experiment is over, for every server that writes this request log; the first reason stays.

    Raises DataError where the file can not be written.
    """
    with _opened(path) as connection, connection.begin():
        connection.execute(
            sqlite.insert(STOPS).values(experiment=experiment, at_ms=at_ms, reason=reason).on_conflict_do_nothing()
        )


def read_stops(path: Path) -> dict[str, str]:
    """Reason by experiment, of those that were stopped; DataError where the file can not be read."""
    with _opened(path) as connection:
        return {row.experiment: row.reason for row in connection.execute(select(STOPS))}


def write_experiments(path: Path, experiments: Iterable[Experiment]) -> None:
    """Keep what is served beside what comes of it, in place of earlier definitions of the same names."""
    rows = [{"experiment": one.name, "definition": json.dumps(one.to_table())} for one in experiments]
    with _opened(path) as connection, connection.begin():
        for row in rows:
            made = sqlite.insert(DEFINED).values(row)
            connection.execute(made.on_conflict_do_update(index_elements=["experiment"], set_=row))


def defined_experiments(path: Path) -> dict[str, Experiment]:
    """Experiments that servers of this request log ran, by name; DataError where the file can not be read."""
    with _opened(path) as connection:
        rows = list(connection.execute(select(DEFINED).order_by(DEFINED.c.experiment)))
    return {row.experiment: experiment_of(row.experiment, json.loads(row.definition)) for row in rows}


@contextmanager
def _opened(path: Path) -> Iterator[Connection]:
    engine = sqlite_engine(path, sync="off", what="a request log")
    try:
        METADATA.create_all(engine)
        with engine.connect() as connection:
            yield connection
    except SQLAlchemyError as error:
        raise DataError(f"{path} can not be used as a request log: {getattr(error, 'orig', error)}") from error
    finally:
        engine.dispose()


def _exposure(row: Any) -> Exposure:
    page = json.loads(row.page)
    return Exposure(
        request_id=row.request_id,
        at_ms=row.at_ms,
        experiment=row.experiment,
        variant=row.variant,
        unit=row.unit,
        propensity=row.propensity,
        spent_ms=row.spent_ms,
        degraded=row.degraded,
        items=tuple(page.get("items", ())),
        chances=tuple(page.get("chances", ())),
        teams=tuple(page.get("teams", ())),
    )

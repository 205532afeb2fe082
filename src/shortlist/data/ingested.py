"""A log that `ingest` laid down in a folder: a drop-in for `EventLog` whose columns stay on disk until they are asked for.

    log = Ingested.load("big")                 also what `shortlist train big` and `shortlist check big` read
    dataset = build_dataset(log)               the same as build_dataset(read(...)) of the log it was made from

N events, U users.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from shortlist.data.encode import EncodedEvents
from shortlist.data.histories import Histories, Int, mapped
from shortlist.data.log import INGESTED, SIMULATED, EventLog, Quarantine, k_core, read
from shortlist.data.manifest import read_json, read_manifest
from shortlist.data.roles import SINGLE_ROLES, Roles, flag
from shortlist.data.vocabulary import Vocabulary
from shortlist.errors import DataError, SnapshotError

REJECTED = "rejected.parquet"
GROUP = "group_id"
_REMEDY = "ingest the log again"


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredEvents:
    """The columns of `EventLog.events` as files, read one by one."""

    files: tuple[Path, ...]
    """Parquet, in the order of the source."""
    columns: list[str]
    """Names as in `EventLog.events`."""
    height: int
    """N."""
    group: Int
    """[N] memory-mapped: the column `group_id`."""

    def __getitem__(self, name: str) -> pl.Series:
        """One column [N]; SnapshotError where its file is missing or damaged."""
        return self.select(name)[name]

    def select(self, *columns: str | pl.Expr) -> pl.DataFrame:
        """The given columns in memory, or what is made of them."""
        names = {n for c in columns for n in ([c] if isinstance(c, str) else c.meta.root_names())}
        try:
            stored = sorted(names - {GROUP})
            frame = pl.concat([pl.read_parquet(file, columns=stored) for file in self.files]) if stored else None
        except (OSError, pl.exceptions.PolarsError) as error:
            raise SnapshotError(f"{self.files[0].parent} is damaged ({error}); ingest the log again") from error
        if GROUP in names:
            group = pl.Series(GROUP, self.group)
            frame = group.to_frame() if frame is None else frame.with_columns(group)
        assert frame is not None
        return frame.select(columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ingested:
    """What `ingest` wrote. Fields that `EventLog` has too mean the same."""

    folder: Path
    events: StoredEvents
    items: pl.DataFrame | None
    users: pl.DataFrame | None
    roles: Roles
    source: str
    time_unit: str | None
    has_time: bool
    quarantined: Quarantine
    notes: tuple[str, ...]
    histories: Histories
    """Memory-mapped; those of `encode_events(log, item_ids, user_ids)`."""
    row: Int
    """[N] memory-mapped: the place of each event in `events`."""
    item_ids: Vocabulary
    user_ids: Vocabulary
    actions: tuple[str, ...]
    """Action names, sorted; action ids are 1.. in this order."""
    seed: int
    """With which ids, and groups without times, were shuffled."""

    @property
    def has_clock(self) -> bool:
        """As `EventLog.has_clock`."""
        return self.has_time and self.time_unit != "order"

    @property
    def encoded(self) -> EncodedEvents:
        """What `encode_events` makes of the log."""
        return EncodedEvents(histories=self.histories, row=self.row, actions=self.actions)

    def in_memory(self) -> EventLog:
        """The whole log, as `read` would have given it."""
        return self._with(self.events.select(*self.events.columns), self.items, self.users)

    def numbered(self) -> EventLog:
        """The log with numbers in place of ids, in the natural order of the ids: what needs no names needs less memory."""
        of_user, of_item = _ranks(self.user_ids), _ranks(self.item_ids)
        order = np.empty(len(self.row), dtype=np.int64)
        order[self.row] = np.arange(len(self.row))
        user = of_user[np.repeat(np.arange(len(of_user)), np.diff(self.histories.offsets))][order]
        item = of_item[self.histories.item[order]]
        numbers = {"user_id": pl.Series(user), "item_id": pl.Series(item)}
        rest = [name for name in self.events.columns if name not in numbers]
        frame = self.events.select(*rest).with_columns(**numbers).select(self.events.columns)
        tables = [
            None if table is None else table.with_columns(pl.Series(name, ranks[ids.encode(table[name])]))
            for table, name, ids, ranks in (
                (self.items, "item_id", self.item_ids, of_item), (self.users, "user_id", self.user_ids, of_user),
            )
        ]  # fmt: skip
        return self._with(frame, *tables)

    def _with(self, events: pl.DataFrame, items: pl.DataFrame | None, users: pl.DataFrame | None) -> EventLog:
        return EventLog(
            events=events, items=items, users=users, roles=self.roles, source=self.source, time_unit=self.time_unit,
            has_time=self.has_time, quarantined=self.quarantined, notes=self.notes,
        )  # fmt: skip

    @classmethod
    def load(cls, folder: Path | str, *, verify: bool = True) -> Ingested:
        """From a folder of `ingest`; SnapshotError names a missing or damaged file.

        Args:
            folder: as given to `ingest`.
            verify: read every file and compare its digest; without it only presence, size and what fits together are checked.
        """
        folder = Path(folder)
        recover(folder)
        about = read_json(folder / INGESTED, remedy=_REMEDY)
        read_manifest(folder, remedy=_REMEDY, verify=verify)
        try:
            log = _opened(cls, folder, about)
        except SnapshotError:
            raise
        except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
            raise SnapshotError(f"{folder} is damaged: its files do not fit each other ({error}); {_REMEDY}") from error
        _check(log)
        return log


def _opened(cls: type[Ingested], folder: Path, about: dict[str, Any]) -> Ingested:
    roles = Roles(**{**about["roles"], "labels": tuple(about["roles"]["labels"])})
    row, group = (mapped(folder / f"{name}.npy", np.int64) for name in ("row", GROUP))
    files = tuple(folder / "events" / Path(name).name for name in about["files"])
    items, users = (pl.read_parquet(folder / f"{n}.parquet") if about[n] else None for n in ("items", "users"))
    return cls(
        folder=folder,
        events=StoredEvents(files=files, columns=about["columns"], height=len(row), group=group),
        roles=roles,
        quarantined=_quarantine(about["quarantined"], folder / REJECTED),
        histories=Histories.load(folder / "histories"),
        row=row,
        item_ids=Vocabulary.load(folder / "item_ids.parquet"),
        user_ids=Vocabulary.load(folder / "user_ids.parquet"),
        actions=tuple(about["actions"]),
        notes=tuple(about["notes"]),
        items=items,
        users=users,
        source=about["source"],
        time_unit=about["time_unit"],
        has_time=about["has_time"],
        seed=about["seed"],
    )


def _check(log: Ingested) -> None:
    """SnapshotError where numbers point beyond what they number, or tables lack what the log's own record says; reads the arrays once."""
    events, histories, folder = log.events, log.histories, log.folder
    ranges = {
        "row.npy": (log.row, 0, events.height - 1),
        f"{GROUP}.npy": (events.group, 0, events.height - 1),
        "histories/item.npy": (histories.item, 1, len(log.item_ids)),
        "histories/action.npy": (histories.action, 1, len(log.actions)),
    }
    for name, (found, low, high) in ranges.items():
        if len(found) != events.height or (len(found) and not low <= int(found.min()) <= int(found.max()) <= high):
            raise SnapshotError(
                f"{folder / name} is damaged: it does not hold {events.height:,} numbers from {low} to {high:,}; {_REMEDY}"
            )
    offsets = histories.offsets
    if offsets[0] != 0 or (np.diff(offsets) < 0).any() or len(offsets) != len(log.user_ids) + 2:
        raise SnapshotError(
            f"{folder / 'histories' / 'offsets.npy'} is damaged: it does not cut the events by {len(log.user_ids):,} users; {_REMEDY}"
        )
    try:
        rows = pl.scan_parquet(list(events.files)).select(pl.len()).collect().item()
        lacking = set(events.columns) - {GROUP} - set(pl.read_parquet_schema(events.files[0]))
    except (OSError, IndexError, pl.exceptions.PolarsError) as error:
        raise SnapshotError(f"{folder / 'events'} is damaged ({error}); {_REMEDY}") from error
    if rows != events.height or lacking:
        fault = f"no column {min(lacking)!r}" if lacking else f"{rows:,} rows where {events.height:,} belong"
        raise SnapshotError(f"{folder / 'events'} is damaged: it has {fault}; {_REMEDY}")
    for table, name, ids in ((log.items, "item", log.item_ids), (log.users, "user", log.user_ids)):
        if table is not None and (f"{name}_id" not in table.columns or table[f"{name}_id"].dtype != ids.ids.dtype):
            raise SnapshotError(
                f"{folder / f'{name}s.parquet'} is damaged: it has no {name}_id of type {ids.ids.dtype}; {_REMEDY}"
            )


def is_ingested(folder: Path) -> bool:
    """Whether `ingest` wrote this folder; one that a stop left beside its place is put back first."""
    recover(folder)
    return (folder / INGESTED).exists()


def recover(folder: Path) -> None:
    """After a stop between the two renames of `ingest` the old folder is put back."""
    old = folder.with_name(f"{folder.name}.old")
    if not folder.exists() and (old / INGESTED).exists():
        os.replace(old, folder)


def _quarantine(counts: Mapping[str, int], path: Path) -> Quarantine:
    return Quarantine(counts=counts, path=path, rows=pl.read_parquet(path)) if counts else Quarantine()


def _ranks(ids: Vocabulary) -> Int:
    """[n + 1] place of each row's id in natural order: numbers, also written as text, by size, other text by alphabet; -1 for row 0."""
    whole = ids.ids.cast(pl.Int64, strict=False)
    rank = (ids.ids if whole.null_count() else whole).rank("ordinal").cast(pl.Int64).to_numpy()
    return np.concatenate([[-1], rank])


Log = EventLog | Ingested
"""What data sets are built from."""


def is_simulated(log: Log) -> bool:
    """Whether rows of the log came from a simulated world: its column `source` says so."""
    if "source" not in log.events.columns:
        return False
    source = log.events["source"]
    return source.dtype == pl.String and bool((source == SIMULATED).any())


def open_log(
    events: object,
    *,
    items: object = None,
    users: object = None,
    roles: Roles | None = None,
    separator: str | None = None,
    quarantine: Path | str | None = None,
    max_bad_share: float = 0.01,
    kcore: int = 0,
) -> Log:
    """`read`, and `Ingested.load` for a folder that `ingest` wrote, where bad rows, tables and roles are settled already.

    Raises DataError as `read` does, and where an ingested log is given tables, a separator or other roles.
    """
    if not (isinstance(events, str | Path) and is_ingested(Path(events))):
        return read(
            events, items=items, users=users, roles=roles, separator=separator, quarantine=quarantine,
            max_bad_share=max_bad_share, kcore=kcore,
        )  # fmt: skip
    log = Ingested.load(events)
    for name, given in (("items", items), ("users", users), ("separator", separator)):
        if given is not None:
            raise DataError(f"{events} is an ingested log, so --{name} has no effect; give it to `shortlist ingest`")
    for name in SINGLE_ROLES if roles is not None else ():
        wanted = getattr(roles, name)
        if wanted is not None and (wanted or None) != getattr(log.roles, name):
            raise DataError(
                f"{events} was ingested with {getattr(log.roles, name) or 'nothing'} as {name}, now {wanted or 'nothing'} is wanted; "
                f"ingest the log again with `{flag(name)} {wanted}`"
            )
    if roles is not None and roles.labels and roles.labels != log.roles.labels:
        raise DataError(f"{events} was ingested with other labels; ingest the log again with `{flag('labels')} COLUMN`")
    return k_core(log.in_memory(), kcore) if kcore else log

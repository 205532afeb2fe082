"""A log that does not fit into memory, from any kind of file to a folder that stands for it: `Ingested`.

    pass 1   batch after batch: rows under canonical names; bad ones aside, good ones to    events/*.parquet
    pass 2   every distinct id, and how many events each user has                           vocabularies, parts
    pass 3   batch after batch: ids become rows, rows go to the part of their user          one file per part
    pass 4   part after part: groups are numbered; the same `sort_events` as in memory      histories/*.npy

A part holds whole users, so sorting it alone gives exactly what sorting all at once gives (a test compares). In memory stand the
vocabularies, one batch, one part and one column. N events, U users.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from shortlist.data.encode import sort_events
from shortlist.data.histories import Histories, Int
from shortlist.data.ingested import GROUP, REJECTED, Ingested, is_ingested
from shortlist.data.log import INGESTED, Quarantine, agreed, as_ids, canonical_events, set_aside, side_table
from shortlist.data.manifest import write_manifest
from shortlist.data.roles import Roles, flag, guess_roles
from shortlist.data.sorting import dense_numbers, first_of_equal, stable_order
from shortlist.data.staging import LINE, Source, open_source
from shortlist.data.tables import Table, load_table
from shortlist.data.times import parse_times
from shortlist.data.vocabulary import Vocabulary
from shortlist.errors import DataError

_SAMPLE_ROWS = 2_000
_SPILL = np.dtype([
    ("row", "<i8"), ("user", "<i8"), ("item", "<i8"), ("time", "<i8"), ("key", "<i8"), ("in_basket", "<i8"), ("action", "<i8"),
    ("value", "<f4"),
])  # fmt: skip
_KEY, _IN_BASKET = "\0key", "\0in_basket"
"""Columns of the rows in pass 1: a number that is the same in rows of one user that happened together, and whether it is a basket's."""
_CHUNK = 1 << 20
_BATCHES_TOLD = 10
_MOST_PARTS = 500
"""Files open at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestConfig:
    """How much stands in memory at a time."""

    block_bytes: int = 1 << 26
    """Text read at a time."""
    batch_rows: int = 500_000
    """Rows read at a time."""
    part_rows: int = 1_000_000
    """Events sorted at a time, about: a user is never cut, so one with more events makes a larger part."""
    max_bad_share: float = 0.01
    """Share of bad rows above which the log is refused."""
    seed: int = 0
    """Shuffles the row numbers."""

    def __post_init__(self) -> None:
        if min(self.batch_rows, self.part_rows, self.block_bytes) < 1 or not 0.0 <= self.max_bad_share < 1.0:
            raise DataError(
                "batch_rows, part_rows and block_bytes must be at least 1, max_bad_share at least 0 and below 1."
            )


def ingest(
    source: Path | str,
    folder: Path | str,
    *,
    items: object = None,
    users: object = None,
    roles: Roles | None = None,
    separator: str | None = None,
    config: IngestConfig | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Ingested:
    """Lay a log down in `folder`, beside it first and renamed when complete; `source`, tables and roles are those of `read`.

    `say` is told how far it is.

    Bad rows go to `rejected.parquet` in the folder, or to FOLDER.rejected.parquet where there are too many of them. The tables of
    items and users are read at once. A stop in the middle leaves the old folder whole; the next run begins anew.

    Raises DataError: source absent or not readable, roles unclear, too many bad rows, times that read as one form in one batch and as
    another in the next.
    """
    config, folder = config or IngestConfig(), Path(folder)
    if is_ingested(Path(source)):
        raise DataError(f"{source} is an ingested log already; give it to `shortlist check` or `shortlist train`.")
    if not is_ingested(folder) and folder.exists():
        raise DataError(f"{folder} exists and holds no ingested log; choose another folder.")
    part, rejected = (folder.with_name(f"{folder.name}.{name}") for name in ("part", REJECTED))
    shutil.rmtree(part, ignore_errors=True)
    rejected.unlink(missing_ok=True)
    for name in ("staged", "events", "keys", "histories"):
        (part / name).mkdir(parents=True)
    try:
        staged = open_source(
            Path(source), part / "staged", separator=separator, block_bytes=config.block_bytes, say=say
        )
        log = _Log.open(staged, roles, {"items": items, "users": users})
        _write(log, part, rejected, config, say)
    except DataError:
        shutil.rmtree(part)
        raise
    _replace(part, folder)
    return Ingested.load(folder, verify=False)


def _write(log: _Log, part: Path, rejected: Path, config: IngestConfig, say: Callable[[str], None]) -> None:
    """All passes, into `part`."""
    rows = _canonical(log, part, rejected, config, say)
    files = sorted((part / "events").glob("*.parquet"))
    shutil.rmtree(part / "staged")
    say(f"{rows.height:,} events; numbering their ids")
    item_ids, user_ids, counts, actions = _distinct(files, log.tables["items"], config.seed)
    ends = _part_ends(counts, max(config.part_rows, rows.height // _MOST_PARTS))
    _spill(files, part, item_ids, user_ids, actions, ends)
    shutil.rmtree(part / "keys")
    say(f"sorting the events of {len(user_ids):,} users by time, in {len(ends):,} parts")
    _number_groups(part, ends, rows.height)
    _sort_parts(part, counts, ends, rows.unit, config.seed)
    item_ids.save(part / "item_ids.parquet")
    user_ids.save(part / "user_ids.parquet")
    for name, table in log.tables.items():
        if table is not None:
            table.write_parquet(part / f"{name}.parquet")
    if rows.quarantined.total:
        os.replace(rejected, part / REJECTED)
    counter = f"column {log.roles.timestamp!r} holds small numbers, no clock times: used for order only."
    notes = [*log.notes, *([counter] if rows.unit == "order" else []), *log.late_notes]
    about = {
        "source": log.source.name, "roles": asdict(log.roles), "time_unit": rows.unit, "has_time": log.has_time,
        "seed": config.seed, "notes": notes, "actions": list(actions), "columns": rows.columns,
        "files": [file.name for file in files], "quarantined": dict(rows.quarantined.counts),
        **{name: table is not None for name, table in log.tables.items()},
    }  # fmt: skip
    (part / INGESTED).write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    write_manifest(part)


def _replace(part: Path, folder: Path) -> None:
    """Put `part` in the place of `folder`; between the two renames the old folder is beside, as NAME.old."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


# -- pass 1: canonical rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Log:
    """A source with its roles, the types of its ids, and its side tables."""

    source: Source
    roles: Roles
    own_types: dict[str, pl.DataType]
    """String or Int64 of user, item and, where there is one, basket."""
    id_types: dict[str, pl.DataType]
    """The same, made to agree with the tables."""
    has_time: bool
    tables: dict[str, pl.DataFrame | None]
    """items and users."""
    aside: list[tuple[str, Table, pl.DataFrame, int]]
    """Of the tables: kind, table, bad rows, good rows."""
    notes: list[str]
    """What was assumed while reading."""
    late_notes: list[str]
    """What the tables changed."""

    @classmethod
    def open(cls, source: Source, given: Roles | None, tables: dict[str, object]) -> _Log:
        """Guess roles and types; DataError names the log."""
        try:
            frame = source.frame.drop(LINE, strict=False)
            schema = frame.collect_schema()
            roles = guess_roles(schema, frame.head(_SAMPLE_ROWS).collect(), given)
            columns = {kind: getattr(roles, kind) for kind in ("user", "item", "basket")}
            own = {kind: _id_type(frame, name, schema[name]) for kind, name in columns.items() if name}
            times = frame.select(pl.col(roles.timestamp).is_not_null().any()) if roles.timestamp else None
            has_time = times is not None and bool(times.collect(engine="streaming").item())
        except (pl.exceptions.PolarsError, DataError) as error:
            raise DataError(f"{source.name}: {str(error).strip().splitlines()[0]}") from error
        types, good, aside = dict(own), dict.fromkeys(tables), []
        notes, late_notes = list(source.notes), list[str]()
        for name, given_table in tables.items():
            if given_table is None:
                continue
            kind, table = name.removesuffix("s"), load_table(given_table)
            rows, bad = side_table(table, kind, getattr(roles, kind))
            ids, good[name], more = agreed(pl.DataFrame(schema={f"{kind}_id": own[kind]}), rows, f"{kind}_id")
            types[kind] = ids.schema[f"{kind}_id"]
            aside.append((name, table, bad, rows.height))
            notes += table.notes
            late_notes += more
        if roles.timestamp and not has_time:
            notes.append(f"column {roles.timestamp!r} is empty: the log has no times.")
        return cls(
            source=source, roles=roles, own_types=own, id_types=types, has_time=has_time, tables=good, aside=aside,
            notes=notes, late_notes=late_notes,
        )  # fmt: skip


def _id_type(frame: pl.LazyFrame, column: str, dtype: pl.DataType) -> pl.DataType:
    """What `as_ids` would make of the whole column."""
    if not (dtype.is_float() or dtype in (pl.UInt64, pl.Int128, pl.UInt128)):
        return as_ids(pl.Series(column, [], dtype=dtype)).dtype
    value = pl.col(column).fill_nan(None) if dtype.is_float() else pl.col(column)
    whole = value.cast(pl.Int64, strict=False)
    fits = (whole.cast(dtype) == value).all() if dtype.is_float() else whole.null_count() == value.null_count()
    return pl.Int64() if frame.select(fits).collect(engine="streaming").item() else pl.String()


def _ids(column: pl.Series, dtype: pl.DataType) -> pl.Series:
    """One batch's ids, of the type of the whole column."""
    if column.dtype.is_numeric():
        return (column.fill_nan(None) if column.dtype.is_float() else column).cast(dtype, strict=False)
    return as_ids(column)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    """What pass 1 wrote."""

    unit: str | None
    """As `EventLog.time_unit`."""
    height: int
    """N: good rows."""
    columns: list[str]
    """Names in the order of `EventLog.events`."""
    quarantined: Quarantine


def _canonical(log: _Log, part: Path, rejected: Path, config: IngestConfig, say: Callable[[str], None]) -> _Rows:
    """Write good rows, and apart from them the keys of their groups, batch by batch.

    Raises DataError where too many rows are bad, none is left, or batches read their times in different forms.
    """
    units: dict[str, None] = {}
    forms: dict[pl.DataType, None] = {}
    bad, height, columns = [log.source.bad], 0, []
    for number, table in enumerate(log.source.batches(config.batch_rows)):
        times = parse_times(table.frame[log.roles.timestamp or ""], flag("timestamp")) if log.has_time else None
        row = pl.int_range(height, height + table.frame.height, dtype=pl.Int64, eager=True)
        exact = row if times is None else times.exact
        ids = {
            kind: _ids(table.frame[getattr(log.roles, kind)], dtype).cast(log.id_types[kind])
            for kind, dtype in log.own_types.items()
        }
        frame, wrong = canonical_events(table, log.roles, ids, times, _keys(exact, ids.get("basket")))
        bad.append(wrong)
        if not frame.height:
            continue
        if times is not None:
            units[times.unit], forms[exact.dtype] = None, None
        columns = [GROUP if name == _KEY else name for name in frame.columns if name != _IN_BASKET]
        frame.drop(_KEY, _IN_BASKET).write_parquet(part / "events" / f"{number:06}.parquet", compression="lz4")
        frame.select(_KEY, _IN_BASKET).write_parquet(part / "keys" / f"{number:06}.parquet", compression="lz4")
        height += frame.height
        if number % _BATCHES_TOLD == 0:
            say(f"{height:,} events read")
    rows = pl.concat(bad).sort("line", maintain_order=True)
    events = Table(frame=pl.DataFrame(), lines=pl.Series([]), bad=rows, name=log.source.name)
    quarantined = set_aside([("events", events, rows, height), *log.aside], rejected, config.max_bad_share)
    if not height:
        raise DataError(f"{log.source.name}: no rows; the log is empty.")
    unit = _one_unit(log.source.name, list(units), len(forms)) if log.has_time else None
    return _Rows(unit=unit, height=height, columns=columns, quarantined=quarantined)


def _keys(exact: pl.Series, basket: pl.Series | None) -> dict[str, pl.Series]:
    """Numbers that are equal in rows of one user that happened together: in one basket, or, without any, at one moment."""
    key, in_basket = _code(exact), np.zeros(len(exact), dtype=bool)
    if basket is not None:
        in_basket = basket.is_not_null().to_numpy()
        key = np.where(in_basket, _code(basket), key)
    return {_KEY: pl.Series(key), _IN_BASKET: pl.Series(in_basket)}


def _code(column: pl.Series) -> Int:
    """int64 [rows]: equal where the values are, in every batch alike. Text by its 64-bit hash: only baskets of one user could meet."""
    if column.dtype == pl.String:
        return column.hash(seed=1).to_numpy().view(np.int64)
    if column.dtype.is_float():
        number: Int = (column.fill_null(0.0).cast(pl.Float64).to_numpy() + 0.0).view(np.int64)
        return number
    return column.to_physical().fill_null(0).cast(pl.Int64).to_numpy()


def _one_unit(name: str, units: list[str], num_forms: int) -> str:
    """The unit of all batches; dates with and without hours are one form of text."""
    if set(units) == {"iso", "date"}:
        return "iso"
    if len(units) > 1:
        raise DataError(f"{name}: times read as {' and as '.join(sorted(units))}; write all of them in one form.")
    if num_forms > 1:
        raise DataError(f"{name}: times read as whole numbers and as fractions; write all of them in one form.")
    return units[0]


# -- passes 2 and 3: numbers, by parts ------------------------------------------------------------------------------


def _distinct(
    files: list[Path], items: pl.DataFrame | None, seed: int
) -> tuple[Vocabulary, Vocabulary, Int, tuple[str, ...]]:
    """Items, users, events per user [U + 1] (row 0 none), action names."""
    events = pl.scan_parquet(files)
    item_ids = events.select("item_id").unique().collect(engine="streaming").to_series()
    per_user = events.group_by("user_id").agg(pl.len()).collect(engine="streaming")
    actions = events.select("action").unique().collect(engine="streaming").to_series()
    user_ids = Vocabulary.build(per_user["user_id"], seed=seed)
    counts = np.zeros(len(user_ids) + 1, dtype=np.int64)
    counts[user_ids.encode(per_user["user_id"])] = per_user["len"].to_numpy()
    known = [item_ids] if items is None else [item_ids, items["item_id"]]
    return Vocabulary.build(*known, seed=seed), user_ids, counts, tuple(sorted(actions.to_list()))


def _part_ends(counts: Int, part_rows: int) -> Int:
    """[P]: one past the last user row of each part, so that parts have about `part_rows` events."""
    before = np.cumsum(counts) - counts
    number = before // part_rows
    return np.append(np.flatnonzero(np.diff(number)) + 1, len(counts))


def _spill(
    files: list[Path], part: Path, items: Vocabulary, users: Vocabulary, actions: tuple[str, ...], ends: Int
) -> None:
    """Append every row to the file of its part, in the order of the source."""
    wanted = ["user_id", "item_id", "timestamp", "action", "value"]
    num_rows = 0
    with ExitStack() as stack:
        spilled = [stack.enter_context((part / f"part-{n}.bin").open("wb")) for n in range(len(ends))]
        for file in files:
            has = pl.read_parquet_schema(file)
            batch = pl.read_parquet(file, columns=[name for name in wanted if name in has])
            keys = pl.read_parquet(part / "keys" / file.name)
            _append(spilled, _rows(batch.hstack(keys), items, users, actions, num_rows), ends)
            num_rows += batch.height


def _rows(
    batch: pl.DataFrame, items: Vocabulary, users: Vocabulary, actions: tuple[str, ...], first_row: int
) -> NDArray[np.void]:
    """The batch as numbers [rows]."""
    rows = np.zeros(batch.height, dtype=_SPILL)
    rows["row"] = np.arange(first_row, first_row + batch.height)
    rows["user"], rows["item"] = users.encode(batch["user_id"]), items.encode(batch["item_id"])
    rows["key"], rows["in_basket"] = batch[_KEY].to_numpy(), batch[_IN_BASKET].to_numpy()
    if "timestamp" in batch.columns:
        rows["time"] = batch["timestamp"].dt.timestamp("ms").to_numpy()
    numbers = pl.Series(range(1, len(actions) + 1), dtype=pl.Int64)
    rows["action"] = batch["action"].replace_strict(pl.Series(actions), numbers).to_numpy()
    rows["value"] = batch["value"].fill_null(0.0).to_numpy() if "value" in batch.columns else 1.0
    return rows


def _append(files: Sequence[IO[bytes]], rows: NDArray[np.void], ends: Int) -> None:
    """Each row to the file of its part, in the order given."""
    number = np.searchsorted(ends, rows["user"], side="right")
    ordered = rows[stable_order(number)]
    cuts = np.concatenate([[0], np.cumsum(np.bincount(number, minlength=len(files)))])
    for n, file in enumerate(files):
        ordered[cuts[n] : cuts[n + 1]].tofile(file)


# -- pass 4: histories ----------------------------------------------------------------------------------------------


def _columns(path: Path) -> dict[str, NDArray[Any]]:
    """The rows of a part, column by column."""
    spilled = np.fromfile(path, dtype=_SPILL)
    return {name: np.ascontiguousarray(spilled[name]) for name in _SPILL.names or ()}


def _number_groups(part: Path, ends: Int, num_rows: int) -> None:
    """Write group.npy [N] in the order of the source: dense numbers by first appearance, as `read` gives them."""
    first = np.lib.format.open_memmap(part / f"{GROUP}.npy", mode="w+", dtype=np.int64, shape=(num_rows,))
    for n in range(len(ends)):
        rows = _columns(part / f"part-{n}.bin")
        first[rows["row"]] = rows["row"][first_of_equal(rows["user"], rows["in_basket"], rows["key"])]
    number = np.cumsum(first == np.arange(num_rows)) - 1
    for at in range(0, num_rows, _CHUNK):
        first[at : at + _CHUNK] = number[first[at : at + _CHUNK]]
    first.flush()


def _sort_parts(part: Path, counts: Int, ends: Int, unit: str | None, seed: int) -> None:
    """Sort the parts one by one and write their histories end to end; the files of the parts go."""
    group_of_row = np.load(part / f"{GROUP}.npy", mmap_mode="r", allow_pickle=False)
    # The order of groups without times is drawn, as `encode_events` draws it.
    lots = np.random.default_rng([seed, 3]).permutation(int(group_of_row.max()) + 1) if unit is None else None
    names = [f.name for f in fields(Histories) if f.name != "offsets"]
    lengths = np.zeros(len(counts), dtype=np.int64)
    groups = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context((part / "histories" / f"{name}.npy").open("wb")) for name in names}
        files["row"] = stack.enter_context((part / "row.npy").open("wb"))
        for name, file in files.items():
            kind = "<f4" if name == "value" else "<i8"
            header = {"descr": kind, "fortran_order": False, "shape": group_of_row.shape}
            np.lib.format.write_array_header_1_0(file, header)
        for n, end in enumerate(ends):
            path = part / f"part-{n}.bin"
            rows = _columns(path)
            path.unlink()
            first, group = int(ends[n - 1]) if n else 0, group_of_row[rows["row"]]
            sorted_, row = sort_events(
                # Row `first` of the log is row 1 of this part.
                rows["user"] - (first - 1),
                rows["item"],
                rows["time"] if lots is None else lots[group],
                group=dense_numbers(group),
                action=rows["action"],
                value=rows["value"],
                num_users=int(end) - first,
                time_unit=None if unit in (None, "order") else 1_000,
            )
            lengths[first:end] = np.diff(sorted_.offsets)[1:]
            arrays: dict[str, NDArray[Any]] = {name: getattr(sorted_, name) for name in names}
            arrays |= {"row": rows["row"][row], "group": sorted_.group + groups}
            groups += int(sorted_.group[-1]) + 1 if len(row) else 0
            for name, array in arrays.items():
                array.tofile(files[name])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    np.save(part / "histories" / "offsets.npy", offsets, allow_pickle=False)

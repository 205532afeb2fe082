"""The event log: who did what, when, with the tables of items and users, read from anything and checked row by row.

log = read("events.csv", items="items.parquet")
log.events      user_id  item_id  timestamp            action  group_id  ...
                17850    715      2010-12-01 08:26:00  event   0
                17850    2378     2010-12-01 08:26:00  event   0        <- same user and time: same group
                13047    1022     2010-12-01 08:34:00  event   1
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from shortlist.data.roles import Roles, best_column, flag, guess_roles
from shortlist.data.sorting import dense_numbers
from shortlist.data.tables import Table, load_table
from shortlist.data.times import ParsedTimes, parse_times
from shortlist.errors import DataError

_CANONICAL = {
    "request": "request_id", "basket": "basket_id", "position": "position", "value": "value", "bid": "bid", "query": "query",
    "propensity": "propensity",
}  # fmt: skip
INGESTED = "ingest.json"
"""File that makes a folder an ingested log; see `data/ingested.py`."""
_NUMBERS = ("position", "value", "bid", "propensity")
RESERVED = ("user_id", "item_id", "timestamp", "action", "group_id", *_CANONICAL.values())
"""Names that columns of the events have by their role; a source column of such a name is called `source_NAME`."""
SIMULATED = "simulated"
"""What the column `source` of the events says of rows that a world of `shortlist.simulation` drew."""
_SAMPLE_ROWS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantine:
    """Rows that could not be used, kept aside with the reason."""

    counts: Mapping[str, int] = field(default_factory=dict)
    """Rows per reason, over all tables."""
    path: Path | None = None
    """File that holds them; None when there are none or no file was asked for."""
    rows: pl.DataFrame | None = None
    """table ("events", "items", "users"), line (1-based), reason, row (as text or JSON); None when there are none."""

    @property
    def total(self) -> int:
        """Rows kept aside, over all reasons and tables."""
        return sum(self.counts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class EventLog:
    """Events in file order, with the tables of their items and users."""

    events: pl.DataFrame
    """user_id, item_id (each String or Int64), timestamp (Datetime("ms"), UTC; absent without times), action (String, "event"
    where the log has no action column), group_id (Int64, dense, numbered by first appearance), then the roles that are present:
    request_id, basket_id, position (Int64), value, bid, propensity (Float64), query; then labels and all other columns."""
    items: pl.DataFrame | None = None
    """item_id and its fields, one row per item."""
    users: pl.DataFrame | None = None
    """user_id and its fields, one row per user."""
    roles: Roles
    """Source columns of the roles, as used."""
    source: str
    """Path, or kind of frame, the events came from."""
    time_unit: str | None
    """"s", "ms", "us", "ns", "iso", "date", "datetime" as recognised; "order" for a counter that orders events and is no clock;
    None without times."""
    has_time: bool
    """Events are ordered: there is a timestamp column."""
    quarantined: Quarantine = field(default_factory=Quarantine)
    """Rows kept aside."""
    notes: tuple[str, ...] = ()
    """What was assumed while reading, in sentences."""

    def __post_init__(self) -> None:
        if self.has_time != ("timestamp" in self.events.columns) or self.has_time != (self.time_unit is not None):
            raise ValueError("has_time, time_unit and the timestamp column must agree")

    @property
    def has_clock(self) -> bool:
        """Timestamps are clock times. False for mere order: no splits by date, no time gaps, no hours of the day."""
        return self.has_time and self.time_unit != "order"


def read(
    events: object,
    *,
    items: object = None,
    users: object = None,
    roles: Roles | None = None,
    separator: str | None = None,
    quarantine: Path | str | None = None,
    max_bad_share: float = 0.01,
    kcore: int = 0,
) -> EventLog:
    """Read a log and its tables.

    Each source is a path (CSV with any separator, also .gz; Parquet, JSONL, Arrow IPC) or a polars, pandas or pyarrow table.
    `roles` overrides the guess field by field. Bad rows (missing or unparsable ids and times, non-finite numbers, ragged lines,
    repeated ids in items or users) go to the file `quarantine` (Parquet or CSV by suffix); their share of a table must not exceed
    `max_bad_share`. Exact duplicates stay. `kcore` > 0 keeps users and items with at least that many events.

    Ids keep the type of the events table: integers in a CSV only where every id is written as one ("007" is text). An items or
    users table of the other type is converted where that loses nothing, otherwise both become text.

    Raises DataError: source absent or unreadable, roles unclear, too many bad rows, nothing left.
    """
    if not 0.0 <= max_bad_share < 1.0:
        raise DataError(f"max_bad_share must be at least 0 and below 1, got {max_bad_share}.")
    if isinstance(events, str | Path) and (Path(events) / INGESTED).exists():
        raise DataError(f"{events} is an ingested log, no table; open it with `shortlist.read` or `Ingested.load`.")
    table = load_table(events, separator=separator)
    if table.frame.height == 0 and table.bad.height == 0:
        raise DataError(f"{table.name}: no rows; the log is empty.")
    try:
        roles = guess_roles(table.frame.schema, table.frame.head(_SAMPLE_ROWS), roles)
        frame, times, bad = _canonical_events(table, roles)
    except DataError as error:
        raise DataError(f"{table.name}: {error}") from error
    tables = [("events", table, bad, frame.height)]
    notes = list(table.notes)
    side: dict[str, pl.DataFrame | None] = {"items": None, "users": None}
    for kind, role, source, name in (("items", "item", items, roles.item), ("users", "user", users, roles.user)):
        if source is not None:
            listed = load_table(source)
            good, bad = side_table(listed, role, name)
            side[kind] = good
            tables.append((kind, listed, bad, good.height))
            notes += listed.notes
    quarantined = set_aside(tables, None if quarantine is None else Path(quarantine), max_bad_share)
    frame, side["items"], note_i = agreed(frame, side["items"], "item_id")
    frame, side["users"], note_u = agreed(frame, side["users"], "user_id")
    unit = times.unit if times is not None else None
    if unit is None and roles.timestamp is not None:
        notes.append(f"column {roles.timestamp!r} is empty: the log has no times.")
    if unit == "order":
        notes.append(f"column {roles.timestamp!r} holds small numbers, no clock times: used for order only.")
    log = EventLog(
        events=frame, items=side["items"], users=side["users"], roles=roles, source=table.name, time_unit=unit,
        has_time=unit is not None, quarantined=quarantined, notes=(*notes, *note_i, *note_u),
    )  # fmt: skip
    return k_core(log, kcore) if kcore > 0 else log


def k_core(log: EventLog, k: int) -> EventLog:
    """Drop users and items with fewer than `k` events, again and again until all have `k` (repeats count as events).

    The items and users tables keep only what is left, as published k-core sets do; otherwise dropped items would still be ranked.
    Raises DataError when nothing is left.
    """
    events = log.events
    height = -1
    while height != events.height:
        height = events.height
        events = events.filter((pl.len().over("user_id") >= k) & (pl.len().over("item_id") >= k))
    if events.height == 0:
        raise DataError(
            f"{log.source}: no user and item with at least {k} events each is left; choose a smaller k-core."
        )
    events = events.with_columns(group_id=dense_codes(events.select("group_id")))
    items = None if log.items is None else log.items.join(events.select("item_id").unique(), on="item_id", how="semi")
    users = None if log.users is None else log.users.join(events.select("user_id").unique(), on="user_id", how="semi")
    return replace(log, events=events, items=items, users=users)


def dense_codes(keys: pl.DataFrame) -> pl.Series:
    """Int64 [rows]: equal rows share a number; numbers are dense and follow first appearance."""
    codes = [code for name in keys.columns for code in _codes(keys[name])]
    return pl.Series("group_id", dense_numbers(*codes))


def _codes(column: pl.Series) -> list[NDArray[np.int64]]:
    """int64 arrays [rows] that are equal where the values are; missing values equal each other."""
    dtype = column.dtype
    if dtype.is_float():
        # 0.0 and -0.0 are one value, and so are all NaN.
        number = column.fill_null(0.0).fill_nan(0.0).cast(pl.Float64).to_numpy() + 0.0
        marks = column.is_nan().fill_null(False).cast(pl.Int64) + 2 * column.is_null().cast(pl.Int64)
        return [number.view(np.int64), marks.to_numpy()] if marks.max() else [number.view(np.int64)]
    if not (dtype.is_integer() or dtype.is_temporal()):
        column = column.cast(pl.String).cast(pl.Categorical)
    whole = column.to_physical()
    codes = [whole.fill_null(0).cast(pl.Int64, wrap_numerical=True).to_numpy()]
    return [*codes, column.is_null().cast(pl.Int64).to_numpy()] if column.null_count() else codes


# -- events -------------------------------------------------------------------------------------------------------


def _canonical_events(table: Table, roles: Roles) -> tuple[pl.DataFrame, ParsedTimes | None, pl.DataFrame]:
    """Events under canonical names, their times, and the bad rows (line, reason, row)."""
    source = table.frame
    times = None
    if roles.timestamp is not None and source[roles.timestamp].null_count() < source.height:
        times = parse_times(source[roles.timestamp], flag("timestamp"))
    ids = {"user": as_ids(source[roles.user or ""]), "item": as_ids(source[roles.item or ""])}
    if roles.basket is not None:
        ids["basket"] = as_ids(source[roles.basket])
    frame, bad = canonical_events(table, roles, ids, times, {"group_id": _groups(source.height, ids, times)})
    if bad.height:
        frame = frame.with_columns(dense_codes(frame.select("group_id")))
    return frame, times, bad


def canonical_events(
    table: Table, roles: Roles, ids: Mapping[str, pl.Series], times: ParsedTimes | None, groups: Mapping[str, pl.Series]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Good events under canonical names, and the bad rows (line, reason, row).

    Args:
        ids: columns of "user" and "item", as `as_ids` makes them.
        times: None where the log has none.
        groups: columns that say which rows happened together.
    """
    source = table.frame
    columns = {"user_id": ids["user"].alias("user_id"), "item_id": ids["item"].alias("item_id")}
    reasons = [_reason(ids["user"].is_null(), "missing user"), _reason(ids["item"].is_null(), "missing item")]
    if times is not None:
        columns["timestamp"] = times.at
        reasons.append(times.reason)
    columns["action"] = _actions(source, roles)
    columns |= groups
    for role, name in _CANONICAL.items():
        if (column := getattr(roles, role)) is None:
            continue
        columns[name] = _number(source, column, name) if role in _NUMBERS else source[column]
        if role in _NUMBERS:
            raw = source[column].is_not_null() if column in source.columns else columns[name].is_not_null()
            reasons.append(_reason(raw & columns[name].is_null(), f"{role} is not a number"))
    used = roles.columns()
    for name in (*roles.labels, *(name for name in source.columns if name not in roles.labels)):
        if name not in used:
            columns[f"source_{name}" if name in RESERVED else name] = source[name]
    columns, finite = _without_nan(columns)
    frame, bad = _split_bad(pl.DataFrame(columns), table, [*reasons, *finite])
    return frame if times is None else frame.with_columns(pl.col("timestamp").cast(pl.Datetime("ms"))), bad


def as_ids(column: pl.Series) -> pl.Series:
    """Ids as Int64 or String, null where missing or empty. Whole floats become integers; integers beyond 64 bits become text."""
    dtype = column.dtype
    if dtype == pl.String or isinstance(dtype, pl.Categorical | pl.Enum):
        text = column.cast(pl.String)
        blank = text.str.strip_chars() == ""
        return text.set(blank, None) if blank.any() else text
    if dtype.is_integer():
        whole = column.cast(pl.Int64, strict=False)
        return whole if whole.null_count() == column.null_count() else column.cast(pl.String)
    if dtype.is_float():
        column = column.fill_nan(None)
        whole = column.cast(pl.Int64, strict=False)
        return whole if bool((whole.cast(pl.Float64) == column).all()) else column.cast(pl.String)
    raise DataError(f"column {column.name!r} of type {dtype} cannot hold ids; ids are text or integers.")


def _reason(mask: pl.Series, words: str) -> pl.Series:
    if not mask.any():
        return pl.Series([None], dtype=pl.String).new_from_index(0, len(mask))
    return pl.select(pl.when(mask).then(pl.lit(words)).otherwise(pl.lit(None, dtype=pl.String))).to_series()


def _actions(source: pl.DataFrame, roles: Roles) -> pl.Series:
    if roles.action is None:
        return pl.repeat("event", source.height, dtype=pl.String, eager=True)
    return source[roles.action].cast(pl.String).fill_null("unknown")


def _groups(num_rows: int, ids: Mapping[str, pl.Series], times: ParsedTimes | None) -> pl.Series:
    """One number per (user, basket); per (user, exact time) where there is no basket; per event where there is neither."""
    row = pl.int_range(num_rows, dtype=pl.Int64, eager=True)
    when = row if times is None else times.exact
    keys = {"user": ids["user"], "when": when}
    if "basket" in ids:
        frame = pl.DataFrame({"basket": ids["basket"], "when": when})
        keys |= {
            "basket": ids["basket"],
            "when": frame.select(pl.when(pl.col("basket").is_null()).then("when")).to_series(),
        }
    return dense_codes(pl.DataFrame(keys))


def _number(source: pl.DataFrame, column: str, name: str) -> pl.Series:
    """A numeric role; null where the text is not a number."""
    dtype = pl.Int64 if name == "position" else pl.Float64
    if column in source.columns:
        return source[column].cast(dtype, strict=False)
    factors = [source[factor].cast(pl.Float64, strict=False) for factor in column.split("*")]
    product = factors[0]
    for factor in factors[1:]:
        product = product * factor
    return product


def _without_nan(columns: dict[str, pl.Series]) -> tuple[dict[str, pl.Series], list[pl.Series]]:
    """NaN in columns without a role becomes null; infinities, and NaN in a role, are reasons to set a row aside."""
    clean, reasons = {}, []
    for name, column in columns.items():
        if column.dtype.is_float():
            if name not in RESERVED:
                column = column.fill_nan(None)
            wrong = ~column.is_finite().fill_null(True)
            if wrong.any():
                reasons.append(_reason(wrong, f"non-finite number in {name}"))
        clean[name] = column
    return clean, reasons


# -- bad rows -----------------------------------------------------------------------------------------------------


def _split_bad(frame: pl.DataFrame, table: Table, reasons: list[pl.Series]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Good rows, and line, reason, row of the bad ones; the first reason that applies is the one given."""
    reasons = [reason.alias(f"reason_{i}") for i, reason in enumerate(reasons) if reason.null_count() < len(reason)]
    if not reasons:
        return frame, table.bad
    reason = pl.DataFrame(reasons).select(pl.coalesce(pl.all())).to_series()
    wrong = reason.is_not_null()
    rows = table.frame.filter(wrong)
    bad = pl.DataFrame({
        "line": table.lines.filter(wrong),
        "reason": reason.filter(wrong),
        "row": rows.select(pl.struct(pl.all()).struct.json_encode()).to_series(),
    })  # fmt: skip
    return frame.filter(~wrong), pl.concat([table.bad, bad]).sort("line")


def set_aside(tables: list[tuple[str, Table, pl.DataFrame, int]], path: Path | None, max_share: float) -> Quarantine:
    """Write bad rows and raise DataError when a table has too many of them."""
    frames = [
        bad.with_columns(table=pl.lit(kind)).select("table", "line", "reason", "row")
        for kind, _, bad, _ in tables
        if bad.height
    ]
    if not frames:
        return Quarantine()
    rows = pl.concat(frames)
    if path is not None:
        _write(rows, path)
    for kind, table, bad, num_good in tables:
        share = bad.height / max(bad.height + num_good, 1)
        if share > max_share or (bad.height and num_good == 0):
            counts = bad.group_by("reason").len().sort("len", descending=True)
            told = ", ".join(f"{count:,} {reason}" for reason, count in counts.iter_rows())
            line, reason, text = bad.row(0)
            where = f" They are in {path}." if path is not None else ""
            raise DataError(
                f"{table.name}: {bad.height:,} of {bad.height + num_good:,} {kind} rows are bad ({told}), more than the "
                f"{max_share:.1%} allowed; the first is line {line} ({reason}): {text[:120]}.{where} "
                "Mend the export, name other columns (`--user`, `--item`, `--timestamp`), "
                f"or allow more with `--max-bad-share {_rounded_up(share)}`."
            )
    counts = rows.group_by("reason").len().sort("len", "reason", descending=[True, False])
    return Quarantine(counts=dict(counts.iter_rows()), path=path, rows=rows)


def _rounded_up(share: float) -> float:
    return min(round(share + 0.01, 2), 0.99)


def _write(rows: pl.DataFrame, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    if path.suffix == ".csv":
        rows.write_csv(part)
    else:
        rows.write_parquet(part)
    os.replace(part, path)


# -- items and users ----------------------------------------------------------------------------------------------


def side_table(table: Table, role: str, events_name: str | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The items or users table with its id column first, and the bad rows: missing and repeated ids."""
    name = f"{role}_id"
    source = table.frame
    column = _id_column(table, role, events_name)
    ids = as_ids(source[column]).alias(name)
    taken = name in source.columns and name != column
    rest = source.drop(column).rename({name: f"source_{name}"} if taken else {})
    rest = rest.with_columns(pl.selectors.float().fill_nan(None)) if rest.width else rest
    frame = pl.DataFrame([ids, *rest.get_columns()])
    repeated = ids.is_not_null() & ~ids.is_first_distinct()
    return _split_bad(
        frame, table, [_reason(ids.is_null(), f"missing {role} id"), _reason(repeated, f"repeated {role} id")]
    )


def _id_column(table: Table, role: str, events_name: str | None) -> str:
    """Id column of a side table: named as in the events, or canonically, or guessed, or plainly "id"."""
    source = table.frame
    for column in (events_name, f"{role}_id"):
        if column in source.columns:
            return column
    try:
        return best_column(role, source.schema, source.head(_SAMPLE_ROWS), set()) or ""
    except DataError as error:
        if "id" in source.columns:
            return "id"
        listed = ", ".join(source.columns)
        raise DataError(
            f"{table.name}: cannot tell the {role} id among {listed}; call that column `{role}_id`."
        ) from error


def agreed(
    events: pl.DataFrame, table: pl.DataFrame | None, name: str
) -> tuple[pl.DataFrame, pl.DataFrame | None, tuple[str, ...]]:
    """Give both tables one id type: that of the events where the other converts without loss, otherwise text."""
    if table is None or table[name].dtype == events[name].dtype:
        return events, table, ()
    ids = table[name]
    if events[name].dtype == pl.String:
        return events, table.with_columns(ids.cast(pl.String)), ()
    whole = ids.cast(pl.Int64, strict=False)
    if whole.null_count() == 0 and bool((whole.cast(pl.String) == ids).all()):
        return events, table.with_columns(whole), ()
    note = f"{name} is text in one table and a number in the other: text in both now."
    return events.with_columns(pl.col(name).cast(pl.String)), table, (note,)

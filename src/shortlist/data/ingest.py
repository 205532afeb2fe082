"""Histories and vocabularies of a log that does not fit into memory, from Parquet or CSV to memory-mapped files.

    pass 1   every distinct id, and how many events each user has          -> vocabularies, offsets
    pass 2   batch after batch: ids become rows, rows go to the part of their user     -> one file per part
    pass 3   part after part: the same `sort_events` as in memory             -> histories/*.npy

A part holds whole users, so sorting it alone gives exactly what sorting all at once gives (a test compares). In memory stand the
vocabularies, one batch and one part. N events, U users.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from shortlist.data.encode import sort_events
from shortlist.data.histories import Histories, Int
from shortlist.data.roles import Roles, guess_roles
from shortlist.data.sorting import dense_numbers, stable_order
from shortlist.data.tables import _MISSING as MISSING
from shortlist.data.times import parse_times
from shortlist.data.vocabulary import Vocabulary
from shortlist.errors import DataError, SnapshotError

_SAMPLE_ROWS = 2_000
_SPILL = np.dtype([
    ("row", "<i8"), ("user", "<i8"), ("item", "<i8"), ("time", "<i8"), ("key", "<i8"), ("in_basket", "<i8"), ("action", "<i8"),
    ("value", "<f4"),
])  # fmt: skip
_PARQUET = (".parquet", ".pq")
_MOST_PARTS = 500
"""Files open at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestConfig:
    """How much stands in memory at a time."""

    batch_rows: int = 500_000
    """Rows read at a time."""
    part_rows: int = 1_000_000
    """Events sorted at a time, about: a user is never cut, so one with more events makes a larger part."""
    max_bad_share: float = 0.01
    """Share of rows without user, item or readable time above which the log is refused."""
    seed: int = 0
    """Shuffles the row numbers."""

    def __post_init__(self) -> None:
        if min(self.batch_rows, self.part_rows) < 1 or not 0.0 <= self.max_bad_share < 1.0:
            raise DataError("batch_rows and part_rows must be at least 1, max_bad_share at least 0 and below 1.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ingested:
    """What `ingest` wrote."""

    histories: Histories
    """Memory-mapped; the same as `encode_events(read(source), items, users).histories`."""
    row: Int
    """[N] memory-mapped: place of each event among the good rows of the source."""
    items: Vocabulary
    users: Vocabulary
    actions: tuple[str, ...]
    """Action names, sorted; action ids are 1.. in this order."""
    time_unit: str
    """As `EventLog.time_unit`."""
    num_bad: int
    """Rows left out: no user, no item, or no readable time."""

    @classmethod
    def load(cls, folder: Path | str) -> Ingested:
        """From a folder of `ingest`; SnapshotError names a missing or damaged file."""
        folder = Path(folder)
        _recover(folder)
        path = folder / "ingest.json"
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            row = np.load(folder / "row.npy", mmap_mode="r", allow_pickle=False)
            actions, unit, num_bad = tuple(about["actions"]), str(about["time_unit"]), int(about["num_bad"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SnapshotError(f"{path} or row.npy is missing or damaged ({error}); ingest the log again") from error
        return cls(
            histories=Histories.load(folder / "histories"), row=row, items=Vocabulary.load(folder / "items.parquet"),
            users=Vocabulary.load(folder / "users.parquet"), actions=actions, time_unit=unit, num_bad=num_bad,
        )  # fmt: skip


def ingest(
    source: Path | str, folder: Path | str, *, roles: Roles | None = None, config: IngestConfig | None = None
) -> Ingested:
    """Read a log (Parquet or CSV with header; a log with times) into `folder`, beside it first and renamed when complete.

    Rows without user, item or readable time are left out and counted (the ids of the latter keep a row of their vocabulary).
    Groups are (user, time), or (user, basket) where there is one.
    A stop in the middle leaves the old folder whole; the next run begins anew.

    Raises DataError: source absent or of another kind, roles unclear, no times, too many bad rows, ids or times that read as one type
    in one batch and as another in the next.
    """
    config, folder = config or IngestConfig(), Path(folder)
    _recover(folder)
    if folder.exists() and not (folder / "ingest.json").exists():
        raise DataError(f"{folder} exists and holds no ingested log; choose another folder.")
    log = _Scan.open(Path(source), roles)
    items, users, counts, actions = _distinct(log, config)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "histories").mkdir(parents=True)
    ends = _part_ends(counts, max(config.part_rows, int(counts.sum()) // _MOST_PARTS))
    unit, num_rows, num_bad = _spill(log, part, items, users, actions, ends, config)
    _sort_parts(part, counts, ends, unit, num_rows - num_bad)
    items.save(part / "items.parquet")
    users.save(part / "users.parquet")
    about = {"source": str(source), "actions": list(actions), "time_unit": unit, "num_bad": num_bad}
    (part / "ingest.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    _replace(part, folder)
    return Ingested.load(folder)


def _recover(folder: Path) -> None:
    """After a stop between the two renames of `_replace` the old folder is put back."""
    old = folder.with_name(f"{folder.name}.old")
    if not folder.exists() and (old / "ingest.json").exists():
        os.replace(old, folder)


def _replace(part: Path, folder: Path) -> None:
    """Put `part` in the place of `folder`; between the two renames the old folder is beside, as NAME.old."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(part, folder)
    shutil.rmtree(old, ignore_errors=True)


# -- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scan:
    """The columns that matter, read lazily."""

    name: str
    frame: pl.LazyFrame
    """user, item (Int64 or String, null where missing), time (as in the source), and basket, action, value where there are any."""
    has: frozenset[str]

    @classmethod
    def open(cls, path: Path, given: Roles | None) -> _Scan:
        if not path.exists():
            raise DataError(f"{path}: no such file; check the path.")
        is_parquet = path.suffix in _PARQUET
        if not is_parquet and path.suffix not in (".csv", ".tsv"):
            raise DataError(
                f"{path}: ingest reads Parquet and CSV; convert the log, or read it at once with `shortlist train`."
            )
        try:
            if is_parquet:
                lazy = pl.scan_parquet(path)
                sample = lazy.head(_SAMPLE_ROWS).collect()
            else:
                lazy = pl.scan_csv(
                    path,
                    separator="\t" if path.suffix == ".tsv" else ",",
                    infer_schema=False,
                    null_values=list(MISSING),
                )
                # Types of a sample tell the roles; the columns themselves are read as text.
                sample = pl.read_csv(path, separator="\t" if path.suffix == ".tsv" else ",", n_rows=_SAMPLE_ROWS)
            roles = guess_roles(sample.schema, sample, given)
        except (pl.exceptions.PolarsError, DataError) as error:
            raise DataError(f"{path}: {str(error).strip().splitlines()[0]}") from error
        if not roles.timestamp:
            raise DataError(
                f"{path}: no column is the time, and histories need an order; name it with `--timestamp COLUMN`."
            )
        return cls._with_roles(str(path), lazy, roles, text=not is_parquet)

    @classmethod
    def _with_roles(cls, name: str, lazy: pl.LazyFrame, roles: Roles, *, text: bool) -> _Scan:
        columns = {"time": pl.col(roles.timestamp or "")}
        schema = lazy.collect_schema()
        for kind, column in (("user", roles.user), ("item", roles.item), ("basket", roles.basket)):
            if column:
                columns[kind] = _id_expression(lazy, column, schema[column], text=text)
        if roles.action:
            columns["action"] = pl.col(roles.action).cast(pl.String).fill_null("unknown")
        if roles.value:
            factors = [_number_expression(factor) for factor in roles.value.split("*")]
            columns["value"] = factors[0] if len(factors) == 1 else factors[0] * factors[1]
        chosen = lazy.select(expression.alias(kind) for kind, expression in columns.items())
        return cls(name=name, frame=chosen, has=frozenset(columns))

    def batches(self, rows: int) -> Iterator[pl.DataFrame]:
        """The rows in file order, so many at a time."""
        try:
            yield from self.frame.collect_batches(chunk_size=rows, maintain_order=True, engine="streaming")
        except pl.exceptions.PolarsError as error:
            raise DataError(
                f"{self.name}: not readable ({str(error).strip().splitlines()[0]}); is the file whole?"
            ) from error


def _id_expression(lazy: pl.LazyFrame, column: str, dtype: pl.DataType, *, text: bool) -> pl.Expr:
    """Ids as Int64 or String. In a CSV they are integers only where every id is written as one."""
    value = pl.col(column)
    if dtype.is_integer():
        return value.cast(pl.Int64)
    if not (dtype == pl.String or isinstance(dtype, pl.Categorical | pl.Enum)):
        raise DataError(f"column {column!r} of type {dtype} cannot hold ids; ids are text or integers.")
    value = value.cast(pl.String)
    value = pl.when(value.str.strip_chars() != "").then(value)
    if text:
        plain = (value.cast(pl.Int64, strict=False).cast(pl.String) == value).fill_null(value.is_null()).all()
        if lazy.select(plain).collect(engine="streaming").item():
            return value.cast(pl.Int64)
    return value


def _number_expression(column: str) -> pl.Expr:
    """Float64, null where missing, NaN where there is something that is no number."""
    number = pl.col(column).cast(pl.Float64, strict=False)
    return pl.when(number.is_null() & pl.col(column).is_not_null()).then(float("nan")).otherwise(number)


# -- the passes -----------------------------------------------------------------------------------------------------


def _distinct(log: _Scan, config: IngestConfig) -> tuple[Vocabulary, Vocabulary, Int, tuple[str, ...]]:
    """Items, users, rows per user [U + 1] (row 0 none; bad times are counted, which only makes parts smaller), action names."""
    good = log.frame.filter(pl.col("user").is_not_null() & pl.col("item").is_not_null())
    item_ids = good.select("item").unique().collect(engine="streaming").to_series()
    per_user = good.group_by("user").agg(pl.len()).collect(engine="streaming")
    if not per_user.height:
        raise DataError(f"{log.name}: no row has a user and an item; the log is empty, or other columns are meant.")
    users = Vocabulary.build(per_user["user"], seed=config.seed)
    counts = np.zeros(len(users) + 1, dtype=np.int64)
    counts[users.encode(per_user["user"])] = per_user["len"].to_numpy()
    names: Sequence[str] = ("event",)
    if "action" in log.has:
        names = sorted(good.select("action").unique().collect(engine="streaming").to_series().to_list())
    return Vocabulary.build(item_ids, seed=config.seed), users, counts, tuple(names)


def _part_ends(counts: Int, part_rows: int) -> Int:
    """[P]: one past the last user row of each part, so that parts have about `part_rows` events."""
    before = np.cumsum(counts) - counts
    number = before // part_rows
    return np.append(np.flatnonzero(np.diff(number)) + 1, len(counts))


def _spill(
    log: _Scan,
    part: Path,
    items: Vocabulary,
    users: Vocabulary,
    actions: tuple[str, ...],
    ends: Int,
    config: IngestConfig,
) -> tuple[str, int, int]:
    """Append every good row to the file of its part, in file order; the time unit, all rows, bad rows."""
    units: set[str] = set()
    num_rows = num_bad = 0
    with ExitStack() as stack:
        files = [stack.enter_context((part / f"part-{n}.bin").open("wb")) for n in range(len(ends))]
        for batch in log.batches(config.batch_rows):
            times = parse_times(batch["time"])
            good = batch["user"].is_not_null() & batch["item"].is_not_null() & times.at.is_not_null()
            if "value" in log.has:
                good &= batch["value"].is_finite().fill_null(True)
            num_good = int(good.sum())
            units |= {times.unit} if num_good else set()
            if len(units) > 1:
                raise DataError(
                    f"{log.name}: times read as {' and as '.join(sorted(units))}; write all of them in one form."
                )
            table = batch.with_columns(time=times.at, exact=times.exact).filter(good)
            _append(files, _rows(table, items, users, actions, num_rows - num_bad), ends)
            num_rows, num_bad = num_rows + batch.height, num_bad + batch.height - num_good
    if num_bad > config.max_bad_share * num_rows or num_bad == num_rows:
        shutil.rmtree(part)
        raise DataError(
            f"{log.name}: {num_bad:,} of {num_rows:,} rows have no user, no item or no readable time, more than the "
            f"{config.max_bad_share:.1%} allowed; mend the export, or name other columns."
        )
    return units.pop(), num_rows, num_bad


def _rows(
    batch: pl.DataFrame, items: Vocabulary, users: Vocabulary, actions: tuple[str, ...], first_row: int
) -> NDArray[np.void]:
    """The batch as numbers [rows]."""
    rows = np.zeros(batch.height, dtype=_SPILL)
    rows["row"] = np.arange(first_row, first_row + batch.height)
    rows["user"], rows["item"] = users.encode(batch["user"]), items.encode(batch["item"])
    rows["time"] = batch["time"].dt.timestamp("ms").to_numpy()
    rows["key"] = _code(batch["exact"])
    if "basket" in batch.columns:
        known = batch["basket"].is_not_null().to_numpy()
        rows["in_basket"] = known
        rows["key"] = np.where(known, _code(batch["basket"]), rows["key"])
    rows["action"] = 1
    if "action" in batch.columns:
        numbers = pl.Series(range(1, len(actions) + 1), dtype=pl.Int64)
        rows["action"] = batch["action"].replace_strict(pl.Series(actions), numbers).to_numpy()
    rows["value"] = batch["value"].fill_null(0.0).to_numpy() if "value" in batch.columns else 1.0
    return rows


def _code(column: pl.Series) -> Int:
    """int64 [rows]: equal where the values are, in every batch alike. Text by its 64-bit hash: only baskets of one user could meet."""
    if column.dtype == pl.String:
        return column.hash(seed=1).to_numpy().view(np.int64)
    if column.dtype.is_float():
        number: Int = (column.fill_null(0.0).cast(pl.Float64).to_numpy() + 0.0).view(np.int64)
        return number
    return column.to_physical().fill_null(0).cast(pl.Int64).to_numpy()


def _append(files: Sequence[IO[bytes]], rows: NDArray[np.void], ends: Int) -> None:
    """Each row to the file of its part, in the order given."""
    number = np.searchsorted(ends, rows["user"], side="right")
    ordered = rows[stable_order(number)]
    cuts = np.concatenate([[0], np.cumsum(np.bincount(number, minlength=len(files)))])
    for n, file in enumerate(files):
        ordered[cuts[n] : cuts[n + 1]].tofile(file)


def _sort_parts(part: Path, counts: Int, ends: Int, unit: str, num_good: int) -> None:
    """Sort the parts one by one and write their histories end to end; the files of the parts go."""
    columns = [f.name for f in fields(Histories) if f.name != "offsets"]
    lengths = np.zeros(len(counts), dtype=np.int64)
    groups = 0
    with ExitStack() as stack:
        files = {name: stack.enter_context((part / "histories" / f"{name}.npy").open("wb")) for name in columns}
        files["row"] = stack.enter_context((part / "row.npy").open("wb"))
        for name, file in files.items():
            kind = "<f4" if name == "value" else "<i8"
            header = {"descr": kind, "fortran_order": False, "shape": (num_good,)}
            np.lib.format.write_array_header_1_0(file, header)
        for n, end in enumerate(ends):
            path = part / f"part-{n}.bin"
            first = int(ends[n - 1]) if n else 0
            spilled = np.fromfile(path, dtype=_SPILL)
            rows = {name: np.ascontiguousarray(spilled[name]) for name in _SPILL.names or ()}
            del spilled
            path.unlink()
            keys = (rows["user"], rows["in_basket"], rows["key"])
            sorted_, row = sort_events(
                # Row `first` of the log is row 1 of this part.
                rows["user"] - (first - 1),
                rows["item"],
                rows["time"],
                group=dense_numbers(*keys),
                action=rows["action"],
                value=rows["value"],
                num_users=int(end) - first,
                time_unit=None if unit == "order" else 1_000,
            )
            lengths[first:end] = np.diff(sorted_.offsets)[1:]
            arrays: dict[str, NDArray[Any]] = {name: getattr(sorted_, name) for name in columns}
            arrays |= {"row": rows["row"][row], "group": sorted_.group + groups}
            groups += int(sorted_.group[-1]) + 1 if len(row) else 0
            for name, array in arrays.items():
                array.tofile(files[name])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    np.save(part / "histories" / "offsets.npy", offsets, allow_pickle=False)

"""Logs as they come out of other people's systems: cut, mixed, mislabelled, in the wrong encoding, or no logs at all.

dirty = DIRT["NUL bytes"](frame, lot)          a file's suffix, its content, and how many rows a reader should account for
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from _damage import PICKLE, Lot

COLUMNS = ("user_id", "item_id", "timestamp", "value")


class Dirty(NamedTuple):
    """A file that is to be read as a log."""

    suffix: str
    content: bytes
    rows: int | None
    """Rows that are either kept or set aside where the file is taken; None where that depends on how it is read."""


Work = Callable[[pl.DataFrame, Lot], Dirty]


def packed(frame: pl.DataFrame, suffix: str) -> bytes:
    """A table as the bytes of a file."""
    made = io.BytesIO()
    match suffix:
        case ".csv" | ".csv.gz":
            frame.write_csv(made)
        case ".jsonl":
            frame.write_ndjson(made)
        case ".parquet":
            frame.write_parquet(made)
        case ".arrow":
            frame.write_ipc(made)
    return gzip.compress(made.getvalue(), mtime=0) if suffix.endswith(".gz") else made.getvalue()


def some(lot: Lot, count: int) -> list[int]:
    """A few row numbers: sometimes fewer than a reader bears (1 %), sometimes more."""
    return sorted(lot.choice(count, int(lot.choice([1, 2, 3, count // 10])), replace=False).tolist())


def cells(column: str, *values: str, suffix: str = ".csv") -> Work:
    """Other words in a few cells of a column."""

    def work(frame: pl.DataFrame, lot: Lot) -> Dirty:
        rows = frame.cast(pl.String).to_dicts()
        for place in some(lot, len(rows)):
            rows[place][column] = values[lot.integers(len(values))]
        return Dirty(suffix, packed(pl.DataFrame(rows, schema=dict.fromkeys(COLUMNS, pl.String)), suffix), len(rows))

    return work


def lines(change: Callable[[list[str], Lot], list[str]], *, counted: bool = True) -> Work:
    """Other lines in a CSV; the first one is the header."""

    def work(frame: pl.DataFrame, lot: Lot) -> Dirty:
        made = change(packed(frame, ".csv").decode().splitlines(), lot)
        return Dirty(".csv", ("\n".join(made) + "\n").encode(), len(made) - 1 if counted else None)

    return work


def content(change: Callable[[bytes, Lot], bytes], suffix: str = ".csv", *, counted: bool = False) -> Work:
    """Other bytes in a file."""
    return lambda frame, lot: Dirty(suffix, change(packed(frame, suffix), lot), frame.height if counted else None)


def typed(change: Callable[[pl.DataFrame, Lot], pl.DataFrame], suffix: str = ".parquet") -> Work:
    """Another table in a file with types."""

    def work(frame: pl.DataFrame, lot: Lot) -> Dirty:
        made = change(frame, lot)
        return Dirty(suffix, packed(made, suffix), made.height)

    return work


def whole(suffix: str, made: bytes) -> Work:
    """A file of something else."""
    return lambda *_: Dirty(suffix, made, None)


def header(*names: str) -> Work:
    """Other names of the columns."""
    return lines(lambda all_lines, _: [",".join(names), *all_lines[1:]])


def _with_bad_lines(*bad: str) -> Work:
    """Lines that are no rows in between."""

    def change(all_lines: list[str], lot: Lot) -> list[str]:
        for place in some(lot, len(all_lines) - 1):
            all_lines[place + 1] = bad[lot.integers(len(bad))]
        return all_lines

    return lines(change, counted=False)


def _scratched(made: bytes, lot: Lot) -> bytes:
    at = int(lot.integers(len(made)))
    return made[:at] + lot.bytes(40) + made[at + 40 :]


def _cut(made: bytes, lot: Lot) -> bytes:
    return made[: int(lot.integers(1, len(made)))]


def _nuls(made: bytes, lot: Lot) -> bytes:
    at = int(lot.integers(len(made)))
    return made[:at] + bytes(int(lot.integers(1, 9))) + made[at:]


def _json_lines(change: Callable[[dict[str, Any]], Any]) -> Work:
    """Other objects in a few lines of a JSONL."""

    def work(frame: pl.DataFrame, lot: Lot) -> Dirty:
        rows: list[Any] = frame.to_dicts()
        for place in some(lot, len(rows)):
            rows[place] = change(dict(rows[place]))
        told = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        return Dirty(".jsonl", told.encode() + b"\n", len(rows))

    return work


def _archive() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("log.csv", ",".join(COLUMNS) + "\nu,i,1,1\n")
    return made.getvalue()


def _with(**columns: pl.Expr) -> Callable[[pl.DataFrame, Lot], pl.DataFrame]:
    return lambda frame, _: frame.with_columns(**columns)


_EVERY_100 = pl.int_range(pl.len()) % 100 == 7
DIRT: dict[str, Work] = {
    "wrong header": header("a", "b", "c", "d"),
    "no header": lines(lambda all_lines, _: all_lines[1:], counted=False),
    "column twice": header("user_id", "user_id", "timestamp", "value"),
    "empty column names": header("user_id", "", "timestamp", ""),
    "header in the middle": _with_bad_lines(",".join(COLUMNS)),
    "header of other letters": header("USER_ID ", " Item_Id", "\tTIMESTAMP", "Value"),
    "one column": lines(lambda all_lines, _: [line.split(",")[0] for line in all_lines]),
    "header alone": lines(lambda all_lines, _: all_lines[:1]),
    "empty file": whole(".csv", b""),
    "blank lines alone": whole(".csv", b"\n\n \n"),
    "bad times": cells("timestamp", "soon", "2024-13-45", "1e400", "inf", "0x10", "true"),
    "negative times": cells("timestamp", "-5", "-1600000000"),
    "times far away": cells("timestamp", "99999999999999999999", "17", "9" * 400),
    "times in two units": cells("timestamp", "1600000000000", "1600000000000000"),
    "times of other forms": cells("timestamp", "2011-01-01", "01/02/2011 10:00", "2011-01-01T00:00:00+99:00"),
    "missing times": cells("timestamp", "", "nan", "null"),
    "missing users": cells("user_id", "", "NaN", "null", "\\N", "  "),
    "missing items": cells("item_id", "", "NaN", "None"),
    "huge ids": cells("item_id", "9" * 30, str(2**63), str(-(2**63) - 1)),
    "fractions as ids": cells("user_id", "17850.5", "1e3", "17850.0"),
    "long ids": cells("user_id", "x" * 5_000, "é" * 900),
    "control characters in ids": cells("item_id", "a\tb", "a\x07b", "\u202e12", "\ufeff12"),
    "mixed types of ids": cells("item_id", "abc", "12", "true", "2011-01-01"),
    "formulas": cells("value", "=1+1", "@SUM(A1)", "-2+3"),
    "values that are no numbers": cells("value", "inf", "-inf", "1e999", "cheap", "1.5.2"),
    "quotes in ids": cells("item_id", 'a"b', '"', '""', "a'b", "a,b"),
    "lines in quotes": cells("item_id", "a\nb", "a\r\nb\r\n"),
    "quote left open": _with_bad_lines('"17850,22,2011-01-01,1'),
    "fields missing": _with_bad_lines("17850,22", "17850"),
    "fields too many": _with_bad_lines("17850,22,2011-01-01,1,2,3"),
    "another separator in between": _with_bad_lines("17850;22;2011-01-01;1"),
    "noise in between": _with_bad_lines("%PDF-1.4", "<html>", '{"user_id": 1}', PICKLE.hex()),
    "byte order mark": content(lambda made, _: b"\xef\xbb\xbf" + made, counted=True),
    "UTF-16": content(lambda made, _: made.decode().encode("utf-16")),
    "Latin-1": content(lambda made, lot: made.replace(b"1", "é".encode("latin-1"), int(lot.integers(1, 40)))),
    "Windows line ends": content(lambda made, _: made.replace(b"\n", b"\r\n"), counted=True),
    "old Mac line ends": content(lambda made, _: made.replace(b"\n", b"\r")),
    "NUL bytes": content(_nuls),
    "scratched CSV": content(_scratched),
    "cut CSV": content(_cut),
    "cut gzip": content(_cut, ".csv.gz"),
    "scratched gzip": content(_scratched, ".csv.gz"),
    "gzip by name alone": content(lambda made, _: gzip.decompress(made), ".csv.gz"),
    "gzip of nothing": whole(".csv.gz", gzip.compress(b"")),
    "cut Parquet": content(_cut, ".parquet"),
    "scratched Parquet": content(_scratched, ".parquet"),
    "CSV named Parquet": whole(".parquet", b"user_id,item_id,timestamp\n1,2,3\n"),
    "Parquet named CSV": lambda frame, _: Dirty(".csv", packed(frame, ".parquet"), None),
    "cut Arrow": content(_cut, ".arrow"),
    "scratched Arrow": content(_scratched, ".arrow"),
    "not a number as id": typed(_with(item_id=pl.when(_EVERY_100).then(float("nan")).otherwise(pl.col("item_id")))),
    "nothing as id": typed(_with(user_id=pl.when(_EVERY_100).then(None).otherwise(pl.col("user_id")))),
    "lists as ids": typed(_with(item_id=pl.concat_list("item_id"))),
    "records as ids": typed(_with(user_id=pl.struct("user_id", "item_id"))),
    "bytes as ids": typed(_with(item_id=pl.col("item_id").cast(pl.String).cast(pl.Binary))),
    "yes and no as ids": typed(_with(user_id=pl.col("user_id") > 0)),
    "unsigned ids": typed(_with(item_id=pl.lit(2**64 - 1, dtype=pl.UInt64) - pl.col("item_id").cast(pl.UInt64))),
    "durations as times": typed(_with(timestamp=pl.duration(seconds=pl.int_range(pl.len())))),
    "times of no clock": typed(_with(timestamp=pl.lit(None, dtype=pl.Datetime("ms")))),
    "infinite values": typed(_with(value=pl.when(_EVERY_100).then(float("inf")).otherwise(pl.col("value")))),
    "no rows": typed(lambda frame, _: frame.clear()),
    "a JSON array": lambda frame, _: Dirty(".jsonl", json.dumps(frame.to_dicts()).encode(), frame.height),
    "lines that are no JSON": _json_lines(lambda _: '{"user_id": 1'),
    "lines that are no objects": _json_lines(lambda row: list(row.values())),
    "objects in ids": _json_lines(lambda row: row | {"item_id": {"id": row["item_id"]}}),
    "keys missing": _json_lines(lambda row: {key: row[key] for key in ("item_id", "timestamp")}),
    "keys of other types": _json_lines(lambda row: row | {"timestamp": [1, 2], "value": "x"}),
    "numbers too long": _json_lines(lambda row: json.dumps(row | {"user_id": 0}).replace(": 0", f": {'9' * 5_000}", 1)),
    "nested without end": whole(".jsonl", b'{"user_id":' * 50_000),
    "an archive": whole(".csv", _archive()),
    "a pickle": whole(".csv", PICKLE),
    "a pickle named Parquet": whole(".parquet", PICKLE),
    "a pickle named Arrow": whole(".arrow", PICKLE),
    "a web page": whole(".csv", b"<html><body>404 not found</body></html>\n" * 40),
    "a database": whole(".csv", b"SQLite format 3\0" + bytes(4_000)),
    "zeros": whole(".csv", bytes(10_000)),
    "noise": lambda _, lot: Dirty(".csv", lot.bytes(5_000), None),
}  # fmt: skip
"""By name; a random choice of them is what benchmarks/damage.py goes through."""


def shop_rows(events: pl.DataFrame, rows: int, lot: Lot) -> pl.DataFrame:
    """A piece of a log, times in seconds: `rows` rows in a row."""
    first = int(lot.integers(events.height - rows))
    piece = events.slice(first, rows).with_columns(timestamp=pl.col("timestamp").dt.epoch("s"))
    assert np.isfinite(piece["value"].to_numpy()).all()
    return piece.select(COLUMNS)

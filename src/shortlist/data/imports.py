"""What other libraries read becomes our tables: RecBole's atomic files, Gorse's JSONL dumps, FuxiCTR's split files.

    made = import_folder("recbole", "dataset/ml-100k")
    command = write_import(made, "imported/ml-100k")      events.parquet, items.parquet, users.parquet; the command that trains on them

Types that a format declares are kept; nothing is dropped in silence. The first line that can not be read stops the import, with its
file and number: a file made by a program is whole or damaged, unlike a log.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import polars as pl

from shortlist.data.roles import SINGLE_ROLES, Roles, flag, guess_roles
from shortlist.data.tables import load_table
from shortlist.errors import DataError

Format = Literal["recbole", "gorse", "fuxictr"]
FORMATS: tuple[Format, ...] = ("recbole", "gorse", "fuxictr")
MARK = "import.json"
"""File that tells an earlier import, which may be replaced, from a folder of something else."""
_TABLES = ("events", "items", "users")
_ATOMIC = ("token", "float", "token_seq", "float_seq")
_NO_TIME = "0001-01-01T00:00:00Z"  # a Go time that was never set
_SPLITS = ("train", "valid", "test")
_SAMPLE_ROWS = 2_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """Tables in our form and what their columns mean."""

    events: pl.DataFrame
    """One row per event, source columns under their own names (Gorse's in lower case)."""
    items: pl.DataFrame | None
    """One row per item; None where the source has none."""
    users: pl.DataFrame | None
    """One row per user; None where the source has none."""
    roles: Roles
    """Columns of the events by role; "" = none, not to be guessed."""
    notes: tuple[str, ...] = ()
    """What was assumed or left out, in sentences."""


def import_folder(format: str, source: Path | str, roles: Roles | None = None) -> Imported:
    """Read a folder (or the one file that matters: NAME.inter, feedback.jsonl, train.csv) of another library.

    `roles` names columns where the format does not; other roles than user, item, time, action and labels are never guessed.

    Raises DataError: unknown format, missing files, a line that can not be read (with file and number), roles unclear.
    """
    readers: dict[str, Callable[[Path], Imported]] = {"recbole": _recbole, "gorse": _gorse, "fuxictr": _fuxictr}
    if format not in readers:
        raise DataError(f"no format is called {format!r}; choose from {', '.join(FORMATS)}.")
    source = Path(source)
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; check the path.")
    made = readers[format](source)
    if made.events.height == 0:
        raise DataError(f"{source}: no events; is the dump whole?")
    return replace(made, roles=_settled(made, roles or Roles(), str(source)))


def write_import(made: Imported, folder: Path | str) -> str:
    """Write the tables to `folder`, beside it first and renamed when complete; gives the command that trains on them.

    Raises DataError where `folder` exists and is no earlier import.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / MARK).exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists and is no earlier import; choose another folder with --out.")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    frames = {name: frame for name in _TABLES if (frame := getattr(made, name)) is not None}
    for name, frame in frames.items():
        frame.write_parquet(part / f"{name}.parquet")
    command = shlex.join(train_command(made, folder))
    about = {"command": command, "roles": asdict(made.roles), "notes": list(made.notes)}
    (part / MARK).write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
    return command


def train_command(made: Imported, folder: Path) -> list[str]:
    """Words of `shortlist train` for the written tables: a flag for every role that the command would not find by itself."""
    words = ["shortlist", "train", str(folder / "events.parquet")]
    for name in _TABLES[1:]:
        if getattr(made, name) is not None:
            words += [f"--{name}", str(folder / f"{name}.parquet")]
    try:
        guessed = guess_roles(made.events.schema, made.events.head(_SAMPLE_ROWS))
    except DataError:
        guessed = Roles()
    for role in SINGLE_ROLES:
        wanted = getattr(made.roles, role) or ""
        if wanted != (getattr(guessed, role) or ""):
            words += [flag(role), wanted]
    wanted_labels = tuple(name for name in made.roles.labels if name)
    if wanted_labels != guessed.labels:
        for name in wanted_labels or ("",):
            words += [flag("labels"), name]
    return [*words, "--out", f"runs/{folder.name}"]


def _settled(made: Imported, given: Roles, source: str) -> Roles:
    """The roles of the format, overridden by those given; only user, item, time, action and labels are guessed where absent."""
    off = dict.fromkeys(set(SINGLE_ROLES) - {"user", "item", "timestamp"}, "")
    named = {f.name: getattr(made.roles, f.name) for f in fields(Roles) if getattr(made.roles, f.name)}
    chosen = {f.name: getattr(given, f.name) for f in fields(Roles) if getattr(given, f.name) not in (None, ())}
    wanted = Roles(**{**off, **named, **chosen})
    try:
        return guess_roles(made.events.schema, made.events.head(_SAMPLE_ROWS), wanted)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


# -- RecBole --------------------------------------------------------------------------------------------------------


def _recbole(source: Path) -> Imported:
    """NAME.inter with NAME.item and NAME.user; or NAME.train.inter, NAME.valid.inter ... whose middle becomes the column `split`."""
    if source.is_file():
        if source.suffix != ".inter":
            raise DataError(f"{source}: give the folder of the atomic files, or its .inter file.")
        paths = [source]
    else:
        paths = sorted(source.glob("*.inter"))
    if not paths:
        raise DataError(f"{source}: no .inter file; RecBole keeps interactions in NAME.inter, so give that folder.")
    names = {path.name.split(".")[0] for path in paths}
    if len(names) > 1:
        raise DataError(f"{source}: several data sets ({', '.join(sorted(names))}); give the .inter file of one.")
    whole = [path for path in paths if path.name.count(".") == 1]
    notes: list[str] = []
    if whole:
        events = _atomic_file(whole[0])
        notes += [
            f"{path.name} repeats a part of {whole[0].name} and was left out." for path in paths if path not in whole
        ]
    else:
        events = _stacked(
            {path.name.split(".", 1)[1].removesuffix(".inter"): _atomic_file(path) for path in paths}, paths
        )
        notes.append(_split_note(sorted(events["split"].unique().to_list())))
    base = paths[0].with_name(next(iter(names)))
    sides = {}
    for kind in ("item", "user"):
        path = base.with_name(f"{base.name}.{kind}")
        sides[kind] = _atomic_file(path) if path.exists() else None
    notes += [
        f"{base.name}.{kind} is not imported: it is no table of events, items or users."
        for kind in ("kg", "link", "net", "ent")
        if base.with_name(f"{base.name}.{kind}").exists()
    ]
    known = set(events.columns)
    roles = Roles(
        user="user_id" if "user_id" in known else None,
        item="item_id" if "item_id" in known else None,
        timestamp="timestamp" if "timestamp" in known else None,
        labels=tuple(name for name in ("label", "rating") if name in known),
    )
    return Imported(events=events, items=sides["item"], users=sides["user"], roles=roles, notes=tuple(notes))


def _atomic_file(path: Path) -> pl.DataFrame:
    """One tab-separated file whose header names a type per column: `user_id:token`, `rating:float`, `class:token_seq`."""
    text = _lines(path)
    header = text[0].split("\t") if len(text) else []
    types: dict[str, str] = {}
    for cell in header:
        name, colon, kind = cell.strip().rpartition(":")
        if not colon or not name or ":" in name or kind not in _ATOMIC:
            raise DataError(
                f"{path}: line 1: column {cell!r} has no type; write NAME:TYPE with one of {', '.join(_ATOMIC)}, divided by tabs."
            )
        if name in types:
            raise DataError(f"{path}: line 1: column {name!r} occurs twice; rename one.")
        types[name] = kind
    if not header:
        raise DataError(f"{path}: the file is empty; its first line must name the columns, such as user_id:token.")
    rows = pl.DataFrame({"line": pl.int_range(2, len(text) + 1, eager=True), "text": text.slice(1)})
    rows = rows.filter(pl.col("text") != "")
    wrong = rows.filter(pl.col("text").str.count_matches("\t", literal=True) != len(header) - 1)
    if wrong.height:
        line, row = wrong.row(0)
        raise DataError(
            f"{path}: line {line} has {row.count(chr(9)) + 1} fields, the header has {len(header)}; mend the line or export again."
        )
    cut = rows["text"].str.split_exact("\t", len(header) - 1).struct.rename_fields(list(types)).struct.unnest()
    return pl.DataFrame([_atomic(cut[name], kind, rows["line"], path) for name, kind in types.items()])


def _lines(path: Path) -> pl.Series:
    """Every line of a text file, without its end. Raises DataError where it is not UTF-8."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: line {line} is not UTF-8; convert the file, for instance with iconv.") from error
    lines = pl.Series("text", [text]).str.split("\n").explode().str.strip_suffix("\r")
    return lines.head(len(lines) - 1) if text.endswith("\n") or not text else lines


def _atomic(column: pl.Series, kind: str, line: pl.Series, path: Path) -> pl.Series:
    """A column of text as its declared type; empty fields are missing."""
    text = column.set(column == "", None)
    if kind == "token":
        return _whole_ids(text) if column.name in ("user_id", "item_id") else text
    if kind == "float":
        number = text.cast(pl.Float64, strict=False)
        _refuse(text, number.is_null() & text.is_not_null(), line, path, "is not a number, as the header declares")
        return number
    parts = text.str.strip_chars().str.split(" ").list.filter(pl.element() != "")
    if kind == "token_seq":
        return parts
    numbers = parts.list.eval(pl.element().cast(pl.Float64, strict=False))
    broken = numbers.list.eval(pl.element().is_null()).list.any().fill_null(False)
    _refuse(text, broken, line, path, "is not a list of numbers divided by spaces, as the header declares")
    return numbers


def _whole_ids(text: pl.Series) -> pl.Series:
    """Int64 where every id is written as a plain whole number, as in a CSV; otherwise text."""
    whole = text.cast(pl.Int64, strict=False)
    same = whole.null_count() == text.null_count() and bool((whole.cast(pl.String) == text).all())
    return whole if same else text


def _refuse(text: pl.Series, wrong: pl.Series, line: pl.Series, path: Path, words: str) -> None:
    if wrong.any():
        at = wrong.arg_max() or 0
        raise DataError(f"{path}: line {line[at]}: {text.name} {text[at]!r} {words}; mend the value or the header.")


# -- Gorse ----------------------------------------------------------------------------------------------------------


def _gorse(source: Path) -> Imported:
    """feedback.jsonl, users.jsonl and items.jsonl, one JSON object per line with the names of Gorse's API (FeedbackType, UserId ...)."""
    folder = source if source.is_dir() else source.parent
    path = next((p for p in (folder / "feedback.jsonl", folder / "feedbacks.jsonl") if p.exists()), None)
    path = source if source.is_file() else path
    if path is None:
        raise DataError(
            f"{folder}: no feedback.jsonl; export users.jsonl, items.jsonl and feedback.jsonl into one folder."
        )
    events = _gorse_events(path)
    notes: list[str] = []
    timestamp = ""
    if "timestamp" in events.columns:
        unset = events["timestamp"].null_count()
        timestamp = "timestamp" if unset < events.height else ""
        if unset:
            notes.append(
                f"{unset:,} of {events.height:,} feedbacks have no time"
                + ("; training sets them aside." if timestamp else ": the log has no order.")
            )
        events = events if timestamp else events.drop("timestamp")
    sides: dict[str, pl.DataFrame | None] = {}
    for kind in ("item", "user"):
        side = folder / f"{kind}s.jsonl"
        sides[kind] = _gorse_side(side, kind) if side.exists() else None
        if sides[kind] is None:
            notes.append(f"no {side.name}: {kind}s are known from the feedback alone.")
    items = sides["item"]
    if items is not None and "is_hidden" in items.columns and items["is_hidden"].any():
        notes.append(
            f"{int(items['is_hidden'].sum()):,} items are hidden in Gorse; here they are like others, with a field is_hidden."
        )
    roles = Roles(user="user_id", item="item_id", timestamp=timestamp, action="action", labels=("",))
    return Imported(events=events, items=items, users=sides["user"], roles=roles, notes=tuple(notes))


def _gorse_events(path: Path) -> pl.DataFrame:
    rows = _json_lines(path)
    names = {"FeedbackType": "action", "UserId": "user_id", "ItemId": "item_id"}
    for line, row in rows:
        _refuse_nameless(row, names, path, line)
    columns = {ours: pl.Series(ours, [row[name] for _, row in rows], dtype=pl.String) for name, ours in names.items()}
    columns = {name: column if name == "action" else _whole_ids(column) for name, column in columns.items()}
    if any("Timestamp" in row for _, row in rows):
        columns["timestamp"] = _gorse_times(
            "timestamp", [row.get("Timestamp") for _, row in rows], [n for n, _ in rows], path
        )
    values = pl.Series("feedback_value", [row.get("Value") for _, row in rows], dtype=pl.Float64, strict=False)
    if values.null_count() < len(values) and values.n_unique() > 1:
        columns["feedback_value"] = values
    return pl.DataFrame(list(columns.values()))


def _refuse_nameless(row: Mapping[str, Any], names: Iterable[str], path: Path, line: int) -> None:
    for name in names:
        if not isinstance(row.get(name), str) or not row[name]:
            raise DataError(f"{path}: line {line}: {name} is missing or no text; mend the line or export again.")


def _gorse_times(name: str, values: list[Any], lines: Sequence[int], path: Path) -> pl.Series:
    """RFC 3339 text as Datetime("ms") UTC; null where it is missing or was never set."""
    text = pl.Series(name, values, dtype=pl.String, strict=False)
    text = text.set(text.is_in(["", _NO_TIME]), None)
    parsed = text.str.to_datetime(format="%+", time_unit="us", time_zone="UTC", strict=False).dt.replace_time_zone(None)
    _refuse(
        text, parsed.is_null() & text.is_not_null(), pl.Series(lines), path, "is no time such as 2024-05-31T18:00:00Z"
    )
    return parsed.cast(pl.Datetime("ms"))


def _gorse_side(path: Path, kind: str) -> pl.DataFrame:
    """Users or items with their id first; labels by key (`labels` where they are a list), empty columns left out."""
    rows = _json_lines(path)
    id_name = "ItemId" if kind == "item" else "UserId"
    for line, row in rows:
        _refuse_nameless(row, (id_name,), path, line)
    columns = [_whole_ids(pl.Series(f"{kind}_id", [row[id_name] for _, row in rows], dtype=pl.String))]
    if kind == "item":
        columns.append(pl.Series("is_hidden", [bool(row.get("IsHidden")) for _, row in rows]))
        columns.append(_column("categories", [row.get("Categories") or None for _, row in rows]))
        lines = [line for line, _ in rows]
        columns.append(_gorse_times("added_at", [row.get("Timestamp") for _, row in rows], lines, path))
    columns.append(_column("comment", [row.get("Comment") or None for _, row in rows]))
    labels = [row.get("Labels") for _, row in rows]
    keys = sorted({key for value in labels if isinstance(value, dict) for key in value})
    taken = {column.name for column in columns}
    for key in keys:
        name = f"label_{key}" if key in taken or key == "labels" else key
        columns.append(_column(name, [value.get(key) if isinstance(value, dict) else None for value in labels]))
    columns.append(_column("labels", [None if isinstance(value, dict) else value for value in labels]))
    filled = [column for column in columns if column.null_count() < len(column)]
    return pl.DataFrame([column for column in filled if column.name != "is_hidden" or column.any()])


def _column(name: str, values: list[Any]) -> pl.Series:
    """Booleans, numbers, text, or lists of one of them where all values agree; otherwise JSON text. Empty ones are missing."""
    values = [None if value in ("", [], {}) else value for value in values]
    kinds = {_kind(value) for value in values if value is not None}
    if not kinds:
        return pl.Series(name, [None] * len(values), dtype=pl.String)
    if kinds <= {"number", "text", "truth", "numbers", "texts"} and len(kinds) == 1:
        types = {"number": pl.Float64(), "text": pl.String(), "truth": pl.Boolean(),
                 "numbers": pl.List(pl.Float64), "texts": pl.List(pl.String)}  # fmt: skip
        return pl.Series(name, values, dtype=types[kinds.pop()], strict=False)
    return pl.Series(
        name, [None if value is None else json.dumps(value, ensure_ascii=False) for value in values], dtype=pl.String
    )


def _kind(value: Any) -> str:
    match value:
        case bool():
            return "truth"
        case int() | float():
            return "number"
        case str():
            return "text"
        case list() if all(isinstance(part, str) for part in value):
            return "texts"
        case list() if all(isinstance(part, int | float) and not isinstance(part, bool) for part in value):
            return "numbers"
    return "other"


def _json_lines(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """Line number and object of every line that is not blank."""
    rows: list[tuple[int, Mapping[str, Any]]] = []
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except ValueError as error:
                raise DataError(f"{path}: line {line} is no JSON ({error}); mend the line or export again.") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}: line {line} is no JSON object; the dump has one object per line.")
            rows.append((line, row))
    return rows


# -- FuxiCTR --------------------------------------------------------------------------------------------------------


def _fuxictr(source: Path) -> Imported:
    """train, valid and test (any of them, CSV or Parquet) in one folder, end to end, with their name as the column `split`."""
    folder = source if source.is_dir() else source.parent
    found: dict[str, Path] = {}
    for part in _SPLITS:
        paths = [
            p for p in (folder / f"{part}.csv", folder / f"{part}.parquet", folder / f"{part}.csv.gz") if p.exists()
        ]
        if len(paths) > 1:
            raise DataError(f"{folder}: both {paths[0].name} and {paths[1].name}; leave one of them in the folder.")
        found |= {part: paths[0]} if paths else {}
    if "train" not in found:
        raise DataError(
            f"{folder}: no train.csv or train.parquet; FuxiCTR's dataset_config names them train_data, valid_data, test_data."
        )
    frames = {}
    for part, path in found.items():
        table = load_table(path)
        if table.bad.height:
            line, reason, row = table.bad.row(0)
            raise DataError(f"{path}: line {line}: {reason}: {row[:120]}; mend the line or export again.")
        frames[part] = table.frame
    events = _stacked(frames, list(found.values()))
    label = next((name for name in ("label", "click", "clk", "is_click") if name in events.columns), None)
    roles = Roles(labels=() if label is None else (label,))
    notes = (
        _split_note(list(found)),
        "columns that vary from event to event are taken for outcomes: name those known before the click with "
        "--set 'data.context=[\"COLUMN\"]'.",
    )
    return Imported(events=events, items=None, users=None, roles=roles, notes=notes)


def _stacked(frames: Mapping[str, pl.DataFrame], paths: Sequence[Path]) -> pl.DataFrame:
    """Parts end to end with their name as `split`; a column that is text in one part is text in all."""
    first = next(iter(frames.values()))
    if "split" in first.columns:
        raise DataError(f"{paths[0]}: line 1: a column is called split, which the parts need; rename it.")
    for (_, frame), path in islice(zip(frames.items(), paths, strict=True), 1, None):
        missing = sorted(set(first.columns) ^ set(frame.columns))
        if missing:
            raise DataError(
                f"{path}: line 1: column {missing[0]!r} is not in all parts; give all of them the same header."
            )
    text = {name for frame in frames.values() for name, dtype in frame.schema.items() if dtype == pl.String}
    parts = [
        frame.select(first.columns).with_columns(
            *(pl.col(name).cast(pl.String) for name in first.columns if name in text), split=pl.lit(part)
        )
        for part, frame in frames.items()
    ]
    return pl.concat(parts, how="vertical_relaxed")


def _split_note(parts: Sequence[str]) -> str:
    return (
        f"the parts {', '.join(parts)} stand in the column split and are not used: what is held out is chosen by "
        "--set data.protocol=time, last-group, user or leave-last-out-as-published."
    )

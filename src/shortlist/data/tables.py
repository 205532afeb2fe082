"""Any table source becomes a polars frame with line numbers; lines that cannot be read are set aside.

A well-formed CSV is read in one pass by polars. Counts of line ends, separators and quotes tell whether it is well formed;
only if it is not are its lines split and counted one by one (still vectorised) and the bad ones named.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import polars as pl

from shortlist.errors import DataError

_SEPARATORS = (",", "\t", ";", "|", "\x01", " ")
_UNIT_SEPARATOR = "\x1f"  # stands for "::", since polars splits at one byte only
_MISSING = ("", "null", "NULL", "None", "none", "nan", "NaN", "\\N")
_MISSING_NUMBERS = (*_MISSING, "NA", "N/A", "n/a", "-", "?")
_MOVIELENS = ("user_id", "item_id", "rating", "timestamp")
_BLOCK = 1 << 26
_HEAD = 1 << 16
UNREADABLE = (pl.exceptions.PolarsError, OSError, EOFError, zlib.error)
"""What readers of files give up with."""
_NOT_BLANK = pl.col("text").str.strip_chars() != ""
_BAD_SCHEMA = {"line": pl.Int64, "reason": pl.String, "row": pl.String}


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A source read into memory."""

    frame: pl.DataFrame
    """Source columns under their own names; text columns of a CSV are typed where every value agrees."""
    lines: pl.Series
    """Int64 [rows]: line of the file (1-based, header counted), or row number (1-based) where there are no lines."""
    bad: pl.DataFrame
    """line, reason, row (the raw text) of lines that could not be read."""
    name: str
    """Path, or what kind of frame it was."""
    notes: tuple[str, ...] = ()
    """What was assumed while reading, in sentences."""


def load_table(source: object, *, separator: str | None = None, encoding: str | None = None) -> Table:
    """Read a path (CSV with any separator, .gz, Parquet, JSONL, Arrow IPC) or a polars, pandas or Arrow frame.

    Raises DataError when the source is absent, of an unknown kind, or not readable at all.
    """
    if separator is not None and separator != "::" and len(separator.encode()) != 1:
        raise DataError(f"a separator is one plain character or '::', got {separator!r}.")
    if isinstance(source, str | Path):
        return _load_path(Path(source), separator, encoding)
    if isinstance(source, pl.LazyFrame):
        return _from_frame(source.collect(), "a polars LazyFrame")
    if isinstance(source, pl.DataFrame):
        return _from_frame(source, "a polars DataFrame")
    package = type(source).__module__.partition(".")[0]
    kind = type(source).__name__
    if package == "pandas" and kind == "DataFrame":
        return _from_frame(pl.from_pandas(source), "a pandas DataFrame")
    if package == "pyarrow" and kind in ("Table", "RecordBatch"):
        frame = pl.from_arrow(source)
        if isinstance(frame, pl.DataFrame):
            return _from_frame(frame, f"a pyarrow {kind}")
    raise DataError(f"cannot read a table from {package}.{kind}; give a path, or a polars, pandas or pyarrow table.")


def unreadable(name: str, error: Exception) -> DataError:
    """What to raise for a source whose reader gave up, with the first line of its reason."""
    detail = str(error).strip().splitlines()
    return DataError(f"{name}: not readable ({detail[0] if detail else type(error).__name__}); is the file whole?")


def suffix_of(path: Path) -> str:
    """What kind of file it is, in lower case, ".gz" not counted: ".csv"."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def csv_layout(path: Path, head: bytes, separator: str | None) -> tuple[str, bool]:
    """Separator (found out where None) and whether there is a header, from the beginning of a text table.

    Raises DataError where it is empty or no text.
    """
    if b"\0" in head:
        raise DataError(
            f"{path}: not a text table; name Parquet files *.parquet, Arrow files *.arrow, JSON lines *.jsonl."
        )
    if not head.strip():
        raise DataError(f"{path}: the file is empty.")
    head_lines = _head_lines(head)
    separator = separator or _sniff(head_lines[:-1] if len(head) >= _HEAD and len(head_lines) > 1 else head_lines)
    return separator, not any(_is_number(field) for field in _fields(head_lines[0], separator))


def _head_lines(head: bytes) -> list[str]:
    text = head[:_HEAD].decode("utf-8-sig", errors="replace")
    return [line for line in text.splitlines() if line.strip()]


def _fields(line: str, separator: str) -> list[str]:
    return [field.strip().strip('"') for field in line.split(separator)]


def _load_path(path: Path, separator: str | None, encoding: str | None) -> Table:
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path.")
    suffix = suffix_of(path)
    try:
        if path.is_dir():
            return _from_frame(pl.read_parquet(path / "**/*.parquet"), str(path))
        if suffix in (".parquet", ".pq"):
            return _from_frame(pl.read_parquet(path), str(path))
        if suffix in (".arrow", ".ipc", ".feather"):
            return _from_frame(_read_ipc(path), str(path))
        if suffix in (".jsonl", ".ndjson", ".json"):
            return _load_json(path)
        return _load_csv(path, separator, encoding)
    except UNREADABLE as error:
        raise unreadable(str(path), error) from error


def _from_frame(frame: pl.DataFrame, name: str) -> Table:
    lines = pl.int_range(1, frame.height + 1, eager=True).alias("line")
    return Table(frame=frame, lines=lines, bad=pl.DataFrame(schema=_BAD_SCHEMA), name=name)


def _read_ipc(path: Path) -> pl.DataFrame:
    with path.open("rb") as file:
        is_file_format = file.read(6) == b"ARROW1"
    return pl.read_ipc(path) if is_file_format else pl.read_ipc_stream(path)


# -- JSON lines ---------------------------------------------------------------------------------------------------


def _load_json(path: Path) -> Table:
    data = opened(path).read()
    if data.lstrip()[:1] == b"[":
        return _from_frame(pl.read_json(io.BytesIO(data)), str(path))
    bad = pl.DataFrame(schema=_BAD_SCHEMA)
    texts = _text_lines([data.decode("utf-8", errors="replace")]).filter(_NOT_BLANK)
    try:
        frame = pl.read_ndjson(io.BytesIO(data), infer_schema_length=None)
    except pl.exceptions.PolarsError:
        wrong = ~texts["text"].map_elements(_is_json_object, return_dtype=pl.Boolean)
        bad = texts.filter(wrong).select(
            "line", pl.lit("not a JSON object").alias("reason"), pl.col("text").alias("row")
        )
        texts = texts.filter(~wrong)
        good = texts["text"].str.join("\n")[0].encode()
        frame = pl.read_ndjson(io.BytesIO(good), infer_schema_length=None) if texts.height else pl.DataFrame()
    return Table(frame=frame, lines=texts["line"], bad=bad, name=str(path))


def _is_json_object(text: str) -> bool:
    with suppress(ValueError, RecursionError):
        return isinstance(json.loads(text), dict)
    return False


# -- separated text -----------------------------------------------------------------------------------------------


def _load_csv(path: Path, separator: str | None, encoding: str | None) -> Table:
    with opened(path) as file:
        head = file.read(_HEAD)
    separator, has_header = csv_layout(path, head, separator)
    first = _fields(_head_lines(head)[0], separator)
    clean = None if encoding else _read_clean_csv(path, separator, has_header, len(first))
    notes: tuple[str, ...] = ()
    bad = pl.DataFrame(schema=_BAD_SCHEMA)
    if clean is not None:
        frame = clean
        lines = pl.int_range(1 + has_header, frame.height + 1 + has_header, eager=True)
    else:
        texts, notes = _decoded_lines(path, encoding)
        frame, lines, bad = _read_ragged_csv(texts, separator, has_header)
    frame, naming = _name_columns(frame, has_header)
    commas = [] if separator == "," else [name for name in frame.columns if _has_decimal_commas(frame[name])]
    frame = frame.with_columns(pl.col(commas).str.replace(",", ".", literal=True)) if commas else frame
    if commas:
        naming = (*naming, f"commas in {', '.join(commas)} were read as decimal points.")
    frame = frame.select(_typed(frame[name]) for name in frame.columns)
    return Table(frame=frame, lines=lines.alias("line"), bad=bad, name=str(path), notes=notes + naming)


def opened(path: Path) -> IO[bytes]:
    """The bytes of a file, unpacked where it is a .gz."""
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def _sniff(lines: list[str]) -> str:
    """The separator found most evenly in the first lines; "," where there is none (one column)."""
    lines = lines[:100]
    if sum("::" in line for line in lines) > 0.9 * len(lines):
        return "::"
    best, best_score = ",", (0.0, 0)
    for separator in _SEPARATORS:
        counts = [re.sub(r'"[^"]*"', "", line).count(separator) for line in lines]
        usual = counts[0]
        share = sum(count == usual for count in counts) / len(counts)
        if usual > 0 and (share, usual) > best_score:
            best, best_score = separator, (share, usual)
    return best


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", text) is not None


def _csv_bytes(path: Path, separator: str) -> Path | io.BytesIO:
    """What polars reads: the path itself, or the bytes with "::" made one byte."""
    if separator != "::":
        return path
    with opened(path) as file:
        return io.BytesIO(file.read().replace(b"::", _UNIT_SEPARATOR.encode()))


def _parse(source: Path | io.BytesIO, separator: str, has_header: bool, quoted: bool = True) -> pl.DataFrame:
    """All columns as text; raises polars' error on malformed input."""
    one_byte = _UNIT_SEPARATOR if separator == "::" else separator
    quote = '"' if quoted and separator != "::" else None
    return pl.read_csv(source, separator=one_byte, has_header=has_header, infer_schema=False, quote_char=quote)


def _read_clean_csv(path: Path, separator: str, has_header: bool, num_columns: int) -> pl.DataFrame | None:
    """The file in one pass, or None when it may hold blank, ragged, multi-line or undecodable lines."""
    ends = separators = quotes = 0
    last = b"\n"
    with opened(path) as file:
        while block := file.read(_BLOCK):
            ends += block.count(b"\n")
            separators += block.count(separator.encode())
            quotes += block.count(b'"')
            last = block[-1:]
    num_lines = ends + (last != b"\n")
    try:
        frame = _parse(_csv_bytes(path, separator), separator, has_header)
    except pl.exceptions.PolarsError:
        return None
    one_line_each = frame.height + has_header == num_lines
    # polars refuses lines with too many fields; with too few, separators are missing from the total or the last column has gaps
    full = quotes == 0 and separators == (num_columns - 1) * num_lines
    full = full or (frame.width == num_columns and frame.height > 0 and frame.to_series(-1).null_count() == 0)
    return frame if one_line_each and full and frame.width == num_columns else None


def _blocks(path: Path, decode: Callable[[bytes], str]) -> Iterator[str]:
    with opened(path) as file:
        while block := file.read(_BLOCK):
            yield decode(block + file.readline())


def _decoded_lines(path: Path, encoding: str | None) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """line, text of every line of the file, and what was assumed about its encoding."""
    if encoding:
        return _text_lines(_blocks(path, lambda block: block.decode(encoding))), ()
    try:
        return _text_lines(_blocks(path, lambda block: block.decode("utf-8"))), ()
    except UnicodeDecodeError as error:
        note = f"{path.name} is not UTF-8 (byte {error.object[error.start]:#04x}); read as Latin-1, so letters outside it look wrong."
        return _text_lines(_blocks(path, lambda block: block.decode("latin-1"))), (note,)


def _text_lines(blocks: Iterator[str] | list[str]) -> pl.DataFrame:
    parts = []
    for number, block in enumerate(blocks):
        text = block.removeprefix("\ufeff") if number == 0 else block
        parts.append(pl.Series("text", [text.removesuffix("\n")]).str.split("\n").explode().str.strip_suffix("\r"))
    texts = pl.concat(parts) if parts else pl.Series("text", [], dtype=pl.String)
    return pl.DataFrame({"line": pl.int_range(1, len(texts) + 1, eager=True), "text": texts})


def _read_ragged_csv(
    texts: pl.DataFrame, separator: str, has_header: bool
) -> tuple[pl.DataFrame, pl.Series, pl.DataFrame]:
    """Frame, line numbers and bad lines of a file in which some lines do not fit."""
    escaped = re.escape(separator)
    quoted = separator != "::" and bool(texts["text"].str.contains(f'(^|{escaped})"').any())
    if quoted:
        texts = _join_quoted_lines(texts, separator)
        bare = pl.col("text").str.replace_all(r'"[^"]*"', "")
        unclosed = pl.col("text").str.count_matches('"', literal=True) % 2 == 1
    else:
        bare, unclosed = pl.col("text"), pl.lit(False)
    # blank lines inside a quoted field belong to it, others are skipped
    texts = texts.filter(_NOT_BLANK).with_columns(
        fields=bare.str.count_matches(separator, literal=True) + 1, unclosed=unclosed
    )
    wanted = texts["fields"][0]
    reason = (
        pl.when("unclosed").then(pl.lit("quote not closed"))
        .when(pl.col("fields") != wanted).then(pl.lit("wrong number of fields"))
    )  # fmt: skip
    texts = texts.with_columns(reason=reason)
    bad = texts.filter(pl.col("reason").is_not_null()).select("line", "reason", pl.col("text").alias("row"))
    good = texts.filter(pl.col("reason").is_null())
    text = good["text"].str.join("\n")[0] or ""
    if separator == "::":
        text = text.replace("::", _UNIT_SEPARATOR)
    frame = _parse(io.BytesIO(text.encode()), separator, has_header, quoted)
    return frame, good["line"].slice(int(has_header)), bad.cast(pl.Schema(_BAD_SCHEMA))


def _join_quoted_lines(texts: pl.DataFrame, separator: str) -> pl.DataFrame:
    """Join the lines of a field that spans several; a quote that never closes stays a line of its own.

    Only lines with an odd number of quotes are looked at: two such with nothing odd between them may be one record.
    """
    quotes = texts["text"].str.count_matches('"', literal=True)
    odd = (quotes % 2 == 1).arg_true().to_list()
    if not odd:
        return texts
    header = texts.filter(_NOT_BLANK)["text"][0]
    wanted = re.sub(r'"[^"]*"', "", header).count(separator)
    joined: dict[int, str] = {}
    swallowed: list[int] = []
    at = 0
    while at + 1 < len(odd):
        first, last = odd[at], odd[at + 1]
        record = "\n".join(texts["text"][first : last + 1])
        if re.sub(r'"[^"]*"', "", record).count(separator) == wanted and last - first < 1000:
            joined[first] = record
            swallowed.extend(range(first + 1, last + 1))
            at += 2
        else:
            at += 1
    if not joined:
        return texts
    text = texts["text"].scatter(list(joined), list(joined.values()))
    kept = ~pl.int_range(texts.height, eager=True).is_in(swallowed)
    return texts.with_columns(text=text).filter(kept)


def _name_columns(frame: pl.DataFrame, has_header: bool) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """Strip names; drop a nameless first column (a row index); name the MovieLens layout that comes without header."""
    if not has_header:
        if frame.width == 4 and frame.height > 0 and _is_epoch(frame.to_series(3)):
            frame.columns = list(_MOVIELENS)
            return frame, (f"the file has no header; its four columns were taken as {', '.join(_MOVIELENS)}.",)
        frame.columns = [f"column_{number}" for number in range(1, frame.width + 1)]
        return frame, ("the file has no header; columns are called column_1, column_2 ...",)
    stripped = [name.strip() for name in frame.columns]
    if len(set(stripped)) == len(stripped):
        frame.columns = stripped
    if frame.columns[0] in ("", "Unnamed: 0", "_duplicated_0"):
        return frame.drop(frame.columns[0]), ("the nameless first column was taken as a row index and left out.",)
    return frame, ()


def _is_epoch(column: pl.Series) -> bool:
    middle: Any = column.cast(pl.Float64, strict=False).median()
    return middle is not None and 1e8 <= middle < 1e10


def _typed(column: pl.Series) -> pl.Series:
    """Int64, Float64 or Boolean where every value agrees, else text as it stands. "007" is text: an id must not change."""
    column = column.set(column.is_in(_MISSING), None) if _has_any(column, _MISSING) else column
    filled = column.drop_nulls().head(1000)
    numbers = column.set(column.is_in(_MISSING_NUMBERS), None) if _has_any(column, _MISSING_NUMBERS) else column
    sample = filled.filter(~filled.is_in(_MISSING_NUMBERS))
    if len(sample) == 0:
        return column
    if sample.cast(pl.Int64, strict=False).null_count() == 0:
        whole = numbers.cast(pl.Int64, strict=False)
        if whole.null_count() == numbers.null_count() and bool((whole.cast(pl.String) == numbers).all()):
            return whole
    # without a point or an exponent anywhere these are whole numbers that 64 bits cannot hold: ids, not quantities
    has_fractions = bool(numbers.str.contains(r"[.eEiI]").any())
    if has_fractions and not numbers.str.contains(r"^[+-]?0\d|^\+").any():
        real = numbers.cast(pl.Float64, strict=False)
        if real.null_count() == numbers.null_count():
            return real
    if sample.str.to_lowercase().is_in(["true", "false"]).all():
        lower = column.str.to_lowercase()
        if lower.drop_nulls().is_in(["true", "false"]).all():
            return (lower == "true").alias(column.name)
    return column


def _has_decimal_commas(column: pl.Series) -> bool:
    """Numbers such as "3,50" throughout; not where every comma stands before three digits, which may be thousands."""
    number, thousands = r"^[+-]?\d+(,\d+)?$", r"^[+-]?\d{1,3},\d{3}$"
    filled = column.drop_nulls()
    filled = filled.filter(~filled.is_in(_MISSING_NUMBERS))
    if not filled.head(1000).str.contains(number).all() or not filled.str.contains(number).all():
        return False
    with_comma = filled.filter(filled.str.contains(",", literal=True))
    return not with_comma.str.contains(thousands).all()  # nothing with a comma: all of nothing


def _has_any(column: pl.Series, values: tuple[str, ...]) -> bool:
    return bool(column.is_in(values).any())

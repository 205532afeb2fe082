"""A log of any kind as something that is read in parts: Parquet and Arrow as they are, text block by block into Parquet.

Every block goes through the reader that reads whole files, so that quotes, broken lines and odd forms mean the same in both. A column has
one type in the end: where blocks disagree, the smallest that holds both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import polars as pl

from shortlist.data.tables import UNREADABLE, Table, csv_layout, load_table, opened, suffix_of, unreadable
from shortlist.errors import DataError

LINE = "\0line"
"""Column of the staged blocks: line of the file, 1-based, header counted."""
_PARQUET = (".parquet", ".pq")
_ARROW = (".arrow", ".ipc", ".feather")
_JSON = (".jsonl", ".ndjson", ".json")
_RECORD_LINES = 1_000
"""Lines that one quoted field may span."""
_BLOCKS_TOLD = 8
"""Blocks between two words of progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A log that can be read in parts."""

    name: str
    """Its path."""
    frame: pl.LazyFrame
    """The source's columns, typed; of staged text also LINE."""
    bad: pl.DataFrame
    """line, reason, row (the raw text) of lines that could not be read."""
    notes: tuple[str, ...] = ()
    """What was assumed while reading, in sentences."""

    def batches(self, rows: int) -> Iterator[Table]:
        """The rows in file order, so many at a time."""
        first = 1
        try:
            for frame in self.frame.collect_batches(chunk_size=rows, maintain_order=True, engine="streaming"):
                numbers = pl.int_range(first, first + frame.height, dtype=pl.Int64, eager=True)
                lines = (frame[LINE] if LINE in frame.columns else numbers).alias("line")
                yield Table(frame=frame.drop(LINE, strict=False), lines=lines, bad=self.bad.clear(), name=self.name)
                first += frame.height
        except pl.exceptions.PolarsError as error:
            raise unreadable(self.name, error) from error


def open_source(
    path: Path,
    scratch: Path,
    *,
    separator: str | None = None,
    block_bytes: int = 1 << 26,
    say: Callable[[str], None] = lambda line: None,
) -> Source:
    """Make a log readable in parts; text is staged in `scratch`, a folder that exists and is empty.

    Args:
        path: Parquet (a file, or a folder of them), Arrow IPC, CSV with any separator or JSON lines, the last two also .gz.
        block_bytes: text read at a time.
        say: is told how far it is.

    Raises DataError: absent, not readable, or one JSON array.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path.")
    suffix = suffix_of(path)
    try:
        if path.is_dir() or suffix in _PARQUET:
            lazy = pl.scan_parquet(path / "**/*.parquet" if path.is_dir() else path)
        elif suffix in _ARROW:
            lazy = pl.scan_ipc(path)
        else:
            return _staged(path, scratch, separator, block_bytes, say)
        lazy.collect_schema()
    except UNREADABLE as error:
        raise unreadable(str(path), error) from error
    bad = pl.DataFrame(schema={"line": pl.Int64, "reason": pl.String, "row": pl.String})
    return Source(name=str(path), frame=lazy, bad=bad)


# -- text -----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class _Stage:
    """What the blocks so far have in common."""

    separator: str | None
    header: bytes = b""
    lines: int = 0
    schemas: list[dict[str, pl.DataType]] = field(default_factory=list)
    bad: list[pl.DataFrame] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _staged(path: Path, scratch: Path, separator: str | None, block_bytes: int, say: Callable[[str], None]) -> Source:
    """Block after block through `load_table` into Parquet."""
    suffix = suffix_of(path)
    is_json = suffix in _JSON
    stage = _Stage(separator=separator)
    files: list[Path] = []
    piece = scratch / f"block{suffix}"
    for block in _blocks(path, block_bytes, quoted=not is_json):
        if is_json and not files and block.lstrip()[:1] == b"[":
            raise DataError(f"{path}: one JSON array is read only as a whole; write one object per line.")
        table = _block_table(path, piece, block, stage, is_json)
        files.append(scratch / f"{len(files):06}.parquet")
        frame = table.frame.with_columns(pl.lit(None).alias(c.name) for c in table.frame if c.null_count() == len(c))
        stage.schemas.append(dict(frame.schema))
        frame.with_columns(table.lines.alias(LINE)).write_parquet(files[-1], compression="lz4")
        if len(files) % _BLOCKS_TOLD == 0:
            say(f"{stage.lines:,} lines read into Parquet")
    piece.unlink(missing_ok=True)
    if not files:
        raise DataError(f"{path}: the file is empty.")
    types, notes = _common_types(stage.schemas)
    scans = [
        pl.scan_parquet(file).select(
            LINE,
            *(
                (pl.col(name) if name in schema else pl.lit(None)).cast(dtype).alias(name)
                for name, dtype in types.items()
            ),
        )
        for file, schema in zip(files, stage.schemas, strict=True)
    ]
    bad = pl.concat(stage.bad)
    return Source(name=str(path), frame=pl.concat(scans), bad=bad, notes=(*dict.fromkeys(stage.notes), *notes))


def _block_table(path: Path, piece: Path, block: bytes, stage: _Stage, is_json: bool) -> Table:
    """One block as a table, with the lines of the file; `stage` learns the header from the first."""
    if not stage.schemas and not is_json and block.strip():
        stage.separator, has_header = csv_layout(path, block, stage.separator)
    piece.write_bytes(stage.header + block)
    try:
        table = load_table(piece, separator=stage.separator)
    except DataError as error:
        raise DataError(str(error).replace(str(piece), str(path))) from error
    stage.notes += [note.replace(piece.name, path.name) for note in table.notes]
    shift = stage.lines - bool(stage.header)
    table = replace(table, lines=table.lines + shift, bad=table.bad.with_columns(pl.col("line") + shift))
    if not stage.schemas and not is_json:
        names = (stage.separator or ",").join(table.frame.columns).encode() + b"\n"
        stage.header = next(line for line in block.splitlines(True) if line.strip()) if has_header else names
    stage.lines += block.count(b"\n")
    stage.bad.append(table.bad)
    return table


def _blocks(path: Path, block_bytes: int, *, quoted: bool) -> Iterator[bytes]:
    """Whole lines, about so many bytes at a time; a block ends where no quoted field is open."""
    try:
        with opened(path) as file:
            while block := file.read(block_bytes):
                pieces = [block, file.readline()]
                is_open = quoted and sum(piece.count(b'"') for piece in pieces) % 2 == 1
                while is_open and len(pieces) < _RECORD_LINES and (line := file.readline()):
                    pieces.append(line)
                    is_open ^= line.count(b'"') % 2 == 1
                yield b"".join(pieces)
    except UNREADABLE as error:
        raise unreadable(str(path), error) from error


def _common_types(schemas: list[dict[str, pl.DataType]]) -> tuple[dict[str, pl.DataType], tuple[str, ...]]:
    """One type per column, and a note on those that became text since blocks disagreed."""
    frames = [pl.DataFrame(schema=schema) for schema in schemas]
    merged: dict[str, pl.DataType] = {}
    notes = []
    for name in dict.fromkeys(name for schema in schemas for name in schema):
        kinds = {schema[name] for schema in schemas if schema.get(name, pl.Null) != pl.Null}
        together = pl.concat([f.select(name) for f in frames if name in f.columns], how="vertical_relaxed")
        # A block of yes and no beside one of numbers is neither.
        mixed = len(kinds) > 1 and bool(kinds & {pl.Boolean(), pl.String()})
        merged[name] = pl.String() if mixed or not kinds else together.schema[name]
        if mixed:
            notes.append(f"column {name!r} holds numbers in one part of the file and text in another: read as text.")
    return merged, tuple(notes)

"""A fitted field: how the raw values of one column become the numbers a system reads, in training and in serving.

Fitting decides from TRAINING values only: the vocabulary of a categorical, the mean and spread of a number. Values met later that
are not among them are unknown (0).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
import torch
from torch import Tensor

from shortlist.data.jagged import Jagged
from shortlist.data.schema import Categorical, Column, Field, FieldTable, Image, Numeric, Side, Text, Vector
from shortlist.data.schema import Sequence as SequenceField
from shortlist.data.vocabulary import Vocabulary
from shortlist.errors import DataError

Kind = Literal["Categorical", "Numeric", "Sequence", "Vector", "Text", "Image"]
WORDS = "words"
_WORD = r"[\p{L}\p{N}]+"
_FARTHEST = 10.0
"""Numbers are cut at so many standard deviations, so that one absurd value in serving can not drown the rest."""
_S_PER_DAY = 86_400


@dataclass(frozen=True, kw_only=True, slots=True)
class FittedField:
    """One field of one side, with what was learned about it."""

    name: str
    """Name among the fields of its side."""
    side: Side
    """Whose field it is."""
    column: str
    """Source column."""
    kind: Kind
    """Its type in the schema."""
    why: str
    """What the type was inferred from, in words."""
    vocabulary: Vocabulary | None = None
    """Known values of a Categorical or tokens of a Sequence; value i has id i."""
    split: str = ""
    """Sequence: the separator of its tokens, or "words"; empty for list columns."""
    log: bool = False
    """Numeric: log(1 + x) before scaling, for heavy tails."""
    mean: float = 0.0
    """Numeric: of the training values, after the logarithm."""
    std: float = 1.0
    """Numeric: of the training values, after the logarithm."""
    dim: int = 0
    """Vector: its length."""

    @property
    def size(self) -> int:
        """Known values; 0 for numbers, vectors, text and images."""
        return len(self.vocabulary) if self.vocabulary is not None else 0

    @property
    def field(self) -> Field:
        """What systems see of it."""
        match self.kind:
            case "Categorical":
                return Categorical(name=self.name, size=self.size)
            case "Sequence":
                return SequenceField(name=self.name, size=self.size)
            case "Numeric":
                return Numeric(name=self.name)
            case "Vector":
                return Vector(name=self.name, dim=self.dim)
            case "Text":
                return Text(name=self.name)
            case _:
                return Image(name=self.name)

    def encode(self, values: pl.Series) -> Column:
        """One row per value, null = unknown or missing. DataError names the field where the type can not be read."""
        try:
            match self.kind:
                case "Categorical":
                    return torch.from_numpy(self._known.encode(as_text(values)))
                case "Sequence":
                    return self._sequence(values)
                case "Numeric":
                    return torch.from_numpy(self.scaled(values).astype(np.float32))
                case "Vector":
                    return self._vector(values)
                case _:
                    return _bytes(values)
        except pl.exceptions.PolarsError as error:
            raise DataError(
                f"field {self.name!r}: a column of type {values.dtype} can not be read as {self.kind} ({error})"
            ) from error

    @property
    def _known(self) -> Vocabulary:
        if self.vocabulary is None:
            raise DataError(f"field {self.name!r} of type {self.kind} has no vocabulary")
        return self.vocabulary

    def scaled(self, values: pl.Series) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Centred and scaled numbers [n]; missing is 0."""
        raw = as_number(values).to_numpy()
        number = np.log1p(np.maximum(raw, 0.0)) if self.log else raw
        with np.errstate(invalid="ignore"):
            scaled = np.clip((number - self.mean) / self.std, -_FARTHEST, _FARTHEST)
        return np.nan_to_num(scaled, nan=0.0)

    def _sequence(self, values: pl.Series) -> Jagged:
        row, token = tokens(values, self.split)
        ids = self._known.encode(token)
        known = ids > 0
        lengths = np.bincount(row[known], minlength=len(values)).astype(np.int64)
        return Jagged.from_lengths(torch.from_numpy(ids[known]), torch.from_numpy(lengths))

    def _vector(self, values: pl.Series) -> Tensor:
        lists = _as_lists(values)
        whole = (lists.list.len() == self.dim).fill_null(False)
        out = np.zeros((len(values), self.dim), dtype=np.float32)
        if whole.any():
            flat = lists.filter(whole).explode().cast(pl.Float32).fill_null(0.0)
            out[whole.to_numpy()] = np.nan_to_num(flat.to_numpy().reshape(-1, self.dim))
        return torch.from_numpy(out)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unused:
    """A column that is no field, and why."""

    side: Side
    column: str
    why: str


def field_table(fitted: Iterable[FittedField], frame: pl.DataFrame) -> FieldTable:
    """Columns of a frame whose rows are the table's rows but the unknown one, which is put before them."""
    fitted = tuple(fitted)
    columns = {}
    for f in fitted:
        unknown = pl.Series(f.column, [None], dtype=frame[f.column].dtype)
        columns[f.name] = f.encode(pl.concat([unknown, frame[f.column]]))
    return FieldTable(frame.height + 1, tuple(f.field for f in fitted), columns)


def first_rows(table: FieldTable, num_rows: int) -> FieldTable:
    """The table's rows 0 .. num_rows - 1."""
    columns: dict[str, Column] = {}
    for name, column in table.columns.items():
        if isinstance(column, Jagged):
            offsets = column.offsets[: num_rows + 1]
            columns[name] = Jagged(column.values[: int(offsets[-1])], offsets)
        else:
            columns[name] = column[:num_rows]
    return FieldTable(num_rows, table.fields, columns)


def stacked(upper: FieldTable, lower: FieldTable) -> FieldTable:
    """The rows of `upper`, then those of `lower` without its unknown row; both have the same fields."""
    columns: dict[str, Column] = {}
    for name, column in upper.columns.items():
        other = lower.columns[name]
        if isinstance(column, Jagged) and isinstance(other, Jagged):
            values = torch.cat([column.values, other.values[int(other.offsets[1]) :]])
            columns[name] = Jagged.from_lengths(values, torch.cat([column.lengths, other.lengths[1:]]))
        elif isinstance(column, Tensor) and isinstance(other, Tensor):
            columns[name] = torch.cat([column, other[1:]])
        else:
            raise DataError(f"field {name!r} is ragged in one table and not in the other")
    return FieldTable(upper.num_rows + lower.num_rows - 1, upper.fields, columns)


# -- raw values -----------------------------------------------------------------------------------------------------


def as_text(values: pl.Series) -> pl.Series:
    """Values as String, so that 3, 3.0 and "3" are one value; blank text is missing."""
    if values.dtype.is_float():
        whole = values.cast(pl.Int64, strict=False)
        text = pl.select(
            pl.when(whole.cast(values.dtype) == values).then(whole.cast(pl.String)).otherwise(values.cast(pl.String))
        )
        return text.to_series().alias(values.name)
    stripped = values.cast(pl.String).str.strip_chars()
    return stripped.set(stripped == "", None)


def as_number(values: pl.Series) -> pl.Series:
    """Values as Float64, times as days since 1970; null becomes NaN."""
    if values.dtype.is_temporal():
        values = values.cast(pl.Datetime("ms")).dt.timestamp("ms") / (1000 * _S_PER_DAY)
    return values.cast(pl.Float64, strict=False).fill_null(float("nan"))


def tokens(values: pl.Series, split: str) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], pl.Series]:
    """Row number [total] and token [total] of every token, in order; missing and blank ones are left out."""
    if split == WORDS:
        lists = values.cast(pl.String).str.to_lowercase().str.extract_all(_WORD)
    elif split:
        lists = values.cast(pl.String).str.split(split)
    else:
        lists = _as_lists(values)
    frame = pl.DataFrame({"row": pl.int_range(len(values), dtype=pl.Int64, eager=True), "token": lists}).explode(
        "token"
    )
    frame = frame.with_columns(as_text(frame["token"]).alias("token")).drop_nulls("token")
    return frame["row"].to_numpy(), frame["token"]


def _as_lists(values: pl.Series) -> pl.Series:
    if isinstance(values.dtype, pl.Array):
        return values.arr.to_list()
    return values.cast(pl.List(pl.String)) if values.dtype == pl.Null else values


def _bytes(values: pl.Series) -> Jagged:
    if values.dtype == pl.Binary:
        blobs: Sequence[bytes] = [blob or b"" for blob in values.to_list()]
        lengths, flat = torch.tensor([len(blob) for blob in blobs], dtype=torch.int64), b"".join(blobs)
    else:
        text = values.cast(pl.String).fill_null("")
        lengths = torch.from_numpy(text.str.len_bytes().to_numpy().astype(np.int64))
        # One string of polars holds 4 GB.
        flat = b"".join(part.to_series().str.join("")[0].encode() for part in text.to_frame().iter_slices(1 << 16))
    return Jagged.from_lengths(torch.from_numpy(np.frombuffer(flat, dtype=np.uint8).copy()), lengths)

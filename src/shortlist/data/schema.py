"""What a log offers, typed: fields of items, users, contexts and user-item pairs, and the tables that hold them.

This file needs torch and numpy alone; fitting fields to a log is in `data/encode.py`.
n items, u users; row 0 of every table is the unknown one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from shortlist.data.jagged import Jagged
from shortlist.errors import DataError

Side = Literal["item", "user", "context", "pair"]
Column = Tensor | Jagged


@dataclass(frozen=True, kw_only=True, slots=True)
class Categorical:
    """One id per row: int64 [rows], 0 = unknown, 1..size are known."""

    name: str
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Numeric:
    """One number per row: float32 [rows], already centred and scaled; missing is 0 (the mean)."""

    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequence:
    """A set or list of ids per row, such as genres or the words of a title: Jagged int64, 1..size, unknown ones left out."""

    name: str
    size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Vector:
    """A ready-made vector per row, such as an image embedding: float32 [rows, dim]; missing is 0."""

    name: str
    dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Raw text per row, kept for content systems as UTF-8 bytes: Jagged uint8. Rankers read its words as a Sequence."""

    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """An encoded image per row (PNG or JPEG bytes), kept for content systems: Jagged uint8; empty where missing."""

    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """One task's outcome per candidate: float32 [total], 0/1 for binary tasks."""

    name: str


Field = Categorical | Numeric | Sequence | Vector | Text | Image
FIELD_TYPES: dict[str, type] = {t.__name__: t for t in (Categorical, Numeric, Sequence, Vector, Text, Image, Label)}


@dataclass(frozen=True, slots=True)
class FieldTable:
    """Columns of one side for rows 0..num_rows-1; row 0 is the unknown item or user."""

    num_rows: int
    fields: tuple[Field, ...] = ()
    columns: Mapping[str, Column] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for f in self.fields:
            column = self.columns[f.name]
            rows = column.num_rows if isinstance(column, Jagged) else len(column)
            if rows != self.num_rows:
                raise DataError(f"field {f.name!r} has {rows} rows where its table has {self.num_rows}")

    def gather(self, rows: Tensor) -> dict[str, Column]:
        """The columns of the given rows [n] int64."""
        return {
            f.name: column.select(rows)
            if isinstance(column := self.columns[f.name], Jagged)
            else column.index_select(0, rows)
            for f in self.fields
        }

    def to(self, device: torch.device | str) -> FieldTable:
        """The same on another device."""
        return FieldTable(
            self.num_rows, self.fields, {name: column.to(device) for name, column in self.columns.items()}
        )

    def __iter__(self) -> Iterator[Field]:
        return iter(self.fields)


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """All that a system must know of the log's shape before it sees a batch. Built from training data only."""

    items: FieldTable
    """The catalogue: row 0 unknown, rows 1..num_items; includes items without events."""
    known_items: Tensor
    """bool [num_items + 1]: had training events. The id embedding of the others is the unknown row; their fields carry them."""
    num_users: int
    """Users at training time are rows 1..num_users; anyone else is row 0."""
    user_fields: tuple[Field, ...] = ()
    context_fields: tuple[Field, ...] = ()
    pair_fields: tuple[Numeric, ...] = ()
    """Numbers about (request, candidate), in the order in which they stand in `Candidates.pair`."""
    actions: tuple[str, ...] = ("event",)
    """Action names; action ids in histories are 1..len(actions), 0 = unknown."""
    tasks: tuple[str, ...] = ("target",)
    """Names of the labels a ranker predicts; the first one orders the page unless the stage says otherwise."""
    has_clock: bool = True
    """False where times only give an order."""

    @property
    def num_items(self) -> int:
        """Number of items, the unknown row not counted."""
        return self.items.num_rows - 1

    def id_rows(self, rows: Tensor) -> Tensor:
        """Rows of the id embedding for catalogue rows of any shape: the row itself where trained, else 0."""
        return torch.where(self.known_items.to(rows.device)[rows], rows, torch.zeros_like(rows))

    def with_pairs(self, pair_fields: tuple[Numeric, ...]) -> Space:
        """The same with other pair fields: what a later stage sees."""
        return replace(self, pair_fields=pair_fields)

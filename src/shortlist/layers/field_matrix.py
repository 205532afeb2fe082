"""All fields of a request and its candidates as vectors of one width: what models of field interactions start from.

Names of fields, unique whatever the log calls its columns:

    user, user.NAME, context.NAME    the user's id row, a user field, a context field                     once per request
    history, history.NAME            the mean of the past items' id rows, or of one of their fields       once per request
    item, item.NAME                  the candidate's id row, an item field                                once per candidate

B requests, t candidates end to end, E history events end to end, F = Fr + Fc fields of request and candidate, D width of a vector.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from shortlist.data.batches import Batch
from shortlist.data.histories import View
from shortlist.data.jagged import Jagged, segment_mean
from shortlist.data.schema import Column, Field, Image, Space, Text
from shortlist.embeddings.base import TableChoice, dropped_ids, make_table
from shortlist.errors import ConfigError
from shortlist.layers.fields import FieldEmbeddings
from shortlist.registry import nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class FieldsConfig:
    """Which fields a model reads, and how they become vectors."""

    dim: int = 16
    """Width of one vector."""
    names: tuple[str, ...] = ()
    """Fields to read, such as ("user", "item", "context.hour"); empty = all that the log has, `user` where the head reads user ids."""
    use_history: bool = True
    """Read the past as the mean of its items and of each of their fields; for an empty `names` alone."""
    max_history: int = 50
    """Newest events read per request."""
    table: TableChoice = TableChoice()  # noqa: RUF009  (frozen)
    """Which table holds the id rows of items and users, and the fields that it says."""

    def check(self, system: str) -> None:
        """Raises ConfigError, in the name of `system`, where a number is out of range."""
        if self.dim < 1 or self.max_history < 1:
            raise ConfigError(
                f"{system}: fields.dim and fields.max_history must be at least 1, got {self.dim} and {self.max_history}"
            )
        if len(set(self.names)) < len(self.names):
            raise ConfigError(f"{system}: fields.names lists a field twice: {list(self.names)}")


def readable(fields: Sequence[Field]) -> tuple[Field, ...]:
    """Without raw text and images, which content systems read."""
    return tuple(f for f in fields if not isinstance(f, Text | Image))


def field_names(space: Space, *, user: bool, history: bool) -> tuple[str, ...]:
    """All names that a log offers; `user` and `history` say whether the user's id and the past are among them."""
    own = [f.name for f in readable(space.items.fields)]
    return (
        *(("user",) if user else ()),
        *(f"user.{f.name}" for f in readable(space.user_fields)),
        *(f"context.{f.name}" for f in readable(space.context_fields)),
        *(("history", *(f"history.{name}" for name in own)) if history else ()),
        "item",
        *(f"item.{name}" for name in own),
    )


class ItemColumns(nn.Module):
    """The catalogue's columns of some item fields, as buffers that are not saved: they belong to the snapshot, not to the weights."""

    def __init__(self, space: Space, fields: Sequence[Field]) -> None:
        super().__init__()
        self.names = tuple(f.name for f in fields)
        for name in self.names:
            column = space.items.columns[name]
            if isinstance(column, Jagged):
                self.register_buffer(f"values_of_{name}", column.values, persistent=False)
                self.register_buffer(f"offsets_of_{name}", column.offsets, persistent=False)
            else:
                self.register_buffer(f"column_of_{name}", column, persistent=False)

    def keep(self, names: Collection[str]) -> None:
        """Drop the columns of all other fields."""
        for name in self.names:
            for buffer in (f"column_of_{name}", f"values_of_{name}", f"offsets_of_{name}"):
                if name not in names and buffer in self._buffers:
                    delattr(self, buffer)
        self.names = tuple(name for name in self.names if name in names)

    def forward(self, rows: Tensor) -> dict[str, Column]:
        """Columns of the catalogue rows [n] int64, by field name."""
        return {name: self.column(name, rows) for name in self.names}

    def column(self, name: str, rows: Tensor) -> Column:
        """One column of the catalogue rows [n] int64."""
        if f"column_of_{name}" in self._buffers:
            return getattr(self, f"column_of_{name}").index_select(0, rows)
        return Jagged(getattr(self, f"values_of_{name}"), getattr(self, f"offsets_of_{name}")).select(rows)


class FieldMatrix(nn.Module):
    """The named fields as vectors [F, D]: those of a request, made once per request, and those of its candidates.

    An item without training events, and a user who is not known, read the unknown row of their table, which `id_dropout` trains.

    Args:
        space: what the log offers.
        dim: D.
        names: which fields, in any order; ConfigError names one that the log lacks.
        max_history: newest events behind the fields of the history.
        id_dropout: share of id rows replaced by the unknown row in training.
        table: of the id rows, and of the fields that it says.
    """

    known_items: Tensor

    def __init__(
        self,
        space: Space,
        dim: int,
        names: Sequence[str],
        *,
        max_history: int = 50,
        id_dropout: float = 0.0,
        table: TableChoice | None = None,
    ) -> None:
        super().__init__()
        offered = field_names(space, user=True, history=True)
        for name in names:
            if name not in offered:
                raise ConfigError(f"the log has no field {name!r}: {nearest(name, list(offered))}")
        ordered = tuple(name for name in offered if name in names)
        self.candidate_names = tuple(n for n in ordered if n == "item" or n.startswith("item."))
        self.request_names = tuple(n for n in ordered if n not in self.candidate_names)
        self.dim, self.max_history, self.id_dropout = dim, max_history, id_dropout
        self.item_ids = make_table(space.num_items + 1, dim, table) if {"item", "history"} & set(names) else None
        self.user_ids = make_table(space.num_users + 1, dim, table) if "user" in names else None
        self.user_fields = FieldEmbeddings(_of(space.user_fields, "user", names), dim, table=table)
        self.context_fields = FieldEmbeddings(_of(space.context_fields, "context", names), dim, table=table)
        item_fields = readable(space.items.fields)
        self.item_fields = FieldEmbeddings(
            [f for f in item_fields if {f"item.{f.name}", f"history.{f.name}"} & set(names)], dim, table=table
        )
        self.columns = ItemColumns(space, self.item_fields.fields)
        self.register_buffer("known_items", space.known_items, persistent=False)
        self._place_item_fields()

    def _place_item_fields(self) -> None:
        """Which of the item fields the candidate reads, and which the history."""
        kept = [f.name for f in self.item_fields.fields]
        self.of_item = [kept.index(n.removeprefix("item.")) for n in self.candidate_names if n != "item"]
        self.of_history = [
            kept.index(n.removeprefix("history.")) for n in self.request_names if n.startswith("history.")
        ]

    def keep(self, names: Collection[str]) -> None:
        """Read only the fields of these names from now on; tables, maps and columns that none of them reads are dropped."""
        self.candidate_names = tuple(n for n in self.candidate_names if n in names)
        self.request_names = tuple(n for n in self.request_names if n in names)
        kept = (*self.request_names, *self.candidate_names)
        if not {"item", "history"} & set(kept):
            self.item_ids = None
        if "user" not in kept:
            self.user_ids = None
        for side, fields in (("user.", self.user_fields), ("context.", self.context_fields)):
            fields.keep({n.removeprefix(side) for n in kept if n.startswith(side)})
        own = {n.partition(".")[2] for n in kept if n.startswith(("item.", "history."))}
        self.item_fields.keep(own)
        self.columns.keep(own)
        self._place_item_fields()

    def count_ids(self, view: View) -> None:
        """Tell the tables how often each id and field value occurs in the view's events; those of a context are not in a view."""
        item = torch.bincount(torch.from_numpy(view.histories.item.copy()), minlength=len(self.known_items))
        item = item.to(self.known_items.device)
        users = view.users.num_rows
        user = torch.from_numpy(np.diff(view.histories.offsets)[:users].astype(np.int64))
        user = nn.functional.pad(user, (0, users - len(user)))
        if self.item_ids is not None:
            self.item_ids.prepare(item.masked_fill(~self.known_items, 0))
        if self.user_ids is not None:
            self.user_ids.prepare(user)
        self.user_fields.prepare(view.users.columns, user)
        self.item_fields.prepare(self.columns(torch.arange(len(item), device=item.device)), item)

    @property
    def num_request(self) -> int:
        """Fr."""
        return len(self.request_names)

    @property
    def num_candidate(self) -> int:
        """Fc."""
        return len(self.candidate_names)

    def request(self, batch: Batch) -> Tensor:
        """float32 [B, Fr, D], in the order of `request_names`."""
        parts = [self.user_fields(batch.user_fields, batch.size), self.context_fields(batch.context, batch.size)]
        if self.user_ids is not None:
            parts.insert(0, self.user_ids(dropped_ids(batch.user, self._dropout))[:, None])
        if any(map(_is_past, self.request_names)):
            items = batch.history.last(self.max_history).items
            past_EFD = self._item_vectors(items.values, "history" in self.request_names, self.of_history)
            parts.append(segment_mean(past_EFD, items.row_of_value, batch.size))
        return torch.cat(parts, dim=1)

    def candidate(self, rows: Tensor) -> Tensor:
        """float32 [t, Fc, D] for catalogue rows [t] int64, in the order of `candidate_names`."""
        return self._item_vectors(rows, "item" in self.candidate_names, self.of_item)

    def _item_vectors(self, rows: Tensor, with_id: bool, chosen: list[int]) -> Tensor:
        parts = []
        if with_id:
            assert self.item_ids is not None
            ids = rows.masked_fill(~self.known_items[rows], 0)
            parts.append(self.item_ids(dropped_ids(ids, self._dropout))[:, None])
        if chosen:
            columns = {f.name: self.columns.column(f.name, rows) for f in (self.item_fields.fields[i] for i in chosen)}
            parts.append(self.item_fields(columns, len(rows), chosen))
        if not parts:
            return self.item_fields.nothing.new_zeros(len(rows), 0, self.dim)
        return torch.cat(parts, dim=1)

    @property
    def _dropout(self) -> float:
        return self.id_dropout if self.training else 0.0

    @property
    def candidate_flops(self) -> int:
        """Per candidate: linear maps of numbers and vectors; look-ups are not counted."""
        return sum(_linear(self.item_fields.maps[i]) for i in self.of_item)

    def request_flops(self, num_history: int) -> int:
        """Per request with so many past events: linear maps, and the sums over the past."""
        num_past = min(num_history, self.max_history)
        of_past = sum(map(_is_past, self.request_names)) * self.dim
        fields = sum(_linear(self.item_fields.maps[i]) for i in self.of_history)
        return _linear(self.user_fields) + _linear(self.context_fields) + num_past * (fields + of_past)

    def rows_read(self, num_history: int, num_candidates: int, *, cached: bool = False) -> int:
        """Rows of tables that a request reads."""
        of_past = sum(map(_is_past, self.request_names))
        once = self.num_request - of_past + of_past * min(num_history, self.max_history)
        return num_candidates * self.num_candidate + (0 if cached else once)


def _of(fields: Sequence[Field], side: str, names: Sequence[str]) -> list[Field]:
    return [f for f in readable(fields) if f"{side}.{f.name}" in names]


def _is_past(name: str) -> bool:
    return name == "history" or name.startswith("history.")


def _linear(module: nn.Module) -> int:
    return sum(2 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))

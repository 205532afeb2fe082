"""Typed fields become vectors: the first layer of every model that reads fields.

F fields, d width, rows = any number of items, users or requests.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from shortlist.data.histories import View
from shortlist.data.jagged import Jagged, segment_mean
from shortlist.data.schema import Categorical, Column, Field, Image, Numeric, Space, Text, Vector
from shortlist.data.schema import Sequence as SequenceField
from shortlist.embeddings.base import Table, TableChoice, dropped_ids, make_table


class FieldEmbeddings(nn.Module):
    """Each field as one vector: an id by a table, a set of ids by the mean of its rows, a number or vector by a linear map.

    Raw text and images are left to content systems. `fields` lists those that are read, in output order.

    Args:
        fields: what to read.
        dim: d.
        table: holds the fields that have at least `table.min_field_size` values; the others, or all without it, have plain tables.
    """

    nothing: Tensor

    def __init__(self, fields: Sequence[Field], dim: int, *, table: TableChoice | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.table = table
        self.fields = tuple(f for f in fields if not isinstance(f, Text | Image))
        self.maps = nn.ModuleList(self._map(f) for f in self.fields)
        self.register_buffer(
            "nothing", torch.empty(0), persistent=False
        )  # knows the device where there are no parameters

    def _map(self, f: Field) -> nn.Module:
        match f:
            case Categorical() | SequenceField() if self._takes_table(f.size):
                return make_table(f.size + 1, self.dim, self.table)
            case Categorical():
                module: nn.Module = nn.Embedding(f.size + 1, self.dim)
            case SequenceField():
                module = nn.EmbeddingBag(f.size + 1, self.dim, mode="mean", include_last_offset=True)
            case Numeric():
                module = nn.Linear(1, self.dim)
            case Vector():
                module = nn.Linear(f.dim, self.dim)
            case _:
                raise TypeError(f"field {f.name!r} of type {type(f).__name__} has no embedding")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            nn.init.normal_(module.weight, std=0.02)
        return module

    def _takes_table(self, size: int) -> bool:
        least = self.table.min_field_size if self.table is not None else None
        return least is not None and size >= least

    def prepare(self, columns: Mapping[str, Column], count: Tensor) -> None:
        """Tell the fields' tables how often each value occurs, where row i of the columns occurs count[i] times (int64 [rows])."""
        for f, module in zip(self.fields, self.maps):
            if isinstance(module, Table):
                column = columns[f.name]
                values = column.values if isinstance(column, Jagged) else column
                times = count[column.row_of_value] if isinstance(column, Jagged) else count
                module.prepare(count.new_zeros(module.num_rows).index_add(0, values, times))

    def keep(self, names: Collection[str]) -> None:
        """Read only the fields of these names from now on; what maps the others is dropped."""
        kept = [(f, module) for f, module in zip(self.fields, self.maps) if f.name in names]
        self.fields = tuple(f for f, _ in kept)
        self.maps = nn.ModuleList(module for _, module in kept)

    def forward(self, columns: Mapping[str, Column], num_rows: int = 0, chosen: Sequence[int] | None = None) -> Tensor:
        """float32 [rows, F, d] from columns by field name, as a FieldTable or a Batch holds them.

        `num_rows` is only read where F = 0; `chosen` are the places of the fields to give, in that order, None = all. Raises KeyError with
        the field's name when a column is missing.
        """
        places = range(len(self.fields)) if chosen is None else chosen
        if not places:
            return self.nothing.new_zeros(num_rows, 0, self.dim)
        return torch.stack([self._embed(self.maps[p], columns[self.fields[p].name]) for p in places], dim=1)

    def _embed(self, module: nn.Module, column: Column) -> Tensor:
        if isinstance(column, Jagged):
            if isinstance(module, Table):
                return segment_mean(module(column.values), column.row_of_value, column.num_rows)
            return module(column.values, column.offsets)
        if isinstance(module, nn.Linear) and column.dim() == 1:
            return module(column[:, None])
        return module(column)


class ItemEncoder(nn.Module):
    """An item's vector: its id row plus a linear map of its fields. Items without training events are carried by their fields.

    Args:
        space: gives the number of items, which have an id row, and the field columns (kept as buffers that are not saved:
            the catalogue belongs to the snapshot, not to the weights).
        dim: d.
        id_dropout: share of id rows replaced by the unknown row in training, so that row 0 stands for a new item.
        use_fields: read the item fields, where there are any.
        table: holds the id rows, and the fields that it says.
    """

    known_items: Tensor

    def __init__(
        self,
        space: Space,
        dim: int,
        *,
        id_dropout: float = 0.0,
        use_fields: bool = True,
        table: TableChoice | None = None,
    ) -> None:
        super().__init__()
        self.id_dropout = id_dropout
        self.ids = make_table(space.num_items + 1, dim, table)
        fields = space.items.fields if use_fields else ()
        self.fields = FieldEmbeddings(fields, dim, table=table)
        self.num_fields = len(self.fields.fields)
        self.mix = nn.Linear(self.num_fields * dim, dim, bias=False) if self.num_fields else None
        self.register_buffer("known_items", space.known_items, persistent=False)
        for f in self.fields.fields:
            column = space.items.columns[f.name]
            if isinstance(column, Jagged):
                self.register_buffer(f"values_of_{f.name}", column.values, persistent=False)
                self.register_buffer(f"offsets_of_{f.name}", column.offsets, persistent=False)
            else:
                self.register_buffer(f"column_of_{f.name}", column, persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """float32 [*, d] for catalogue rows [...] int64."""
        flat = rows.reshape(-1)
        ids = flat.masked_fill(~self.known_items[flat], 0)
        vector = self.ids(dropped_ids(ids, self.id_dropout if self.training else 0.0))
        if self.mix is not None:
            vector = vector + self.mix(self.fields(self._gather(flat)).flatten(1))
        return vector.view(*rows.shape, vector.shape[-1])

    def count_ids(self, view: View) -> None:
        """See Counted: events of each item, and of each value of its fields."""
        item = torch.from_numpy(view.histories.item.copy()).to(self.known_items.device)
        count = torch.bincount(item, minlength=len(self.known_items))
        self.ids.prepare(count.masked_fill(~self.known_items, 0))
        self.fields.prepare(self._gather(torch.arange(len(count), device=count.device)), count)

    def all(self) -> Tensor:
        """float32 [num_items + 1, d]: every item's vector, for a full softmax; carries gradients."""
        return self(torch.arange(len(self.known_items), device=self.known_items.device))

    def _gather(self, rows: Tensor) -> dict[str, Column]:
        columns: dict[str, Column] = {}
        for f in self.fields.fields:
            if isinstance(f, SequenceField):
                whole = Jagged(getattr(self, f"values_of_{f.name}"), getattr(self, f"offsets_of_{f.name}"))
                columns[f.name] = whole.select(rows)
            else:
                columns[f.name] = getattr(self, f"column_of_{f.name}")[rows]
        return columns

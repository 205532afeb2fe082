"""The interface of embedding tables and the plain one. Any model takes any table by its config.

    [systems.din.table]
    name = "bh"             picks the table; the other keys are that table's own settings
    compression = 100.0

n rows, d width. Row 0 is the unknown id and is trained like the others (by id dropout).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from shortlist.errors import ConfigError, DataError
from shortlist.registry import find, system

if TYPE_CHECKING:
    from shortlist.data.histories import View


@dataclass(frozen=True, kw_only=True, slots=True)
class TableChoice:
    """Which table a model uses, with that table's settings; part of the models' own settings.

    This class chooses the plain table. Every other table has its own settings class, which inherits these fields, replaces the name
    and adds its own: `DINConfig(table=BHConfig(compression=100))`.
    """

    name: str = "full"
    """Registered name of the table."""
    init_std: float = 0.02
    """Standard deviation of the normal initial values of a vector."""
    sparse: bool = False
    """Row-wise updates: a step reads and writes only the rows of its batch. Not for tables that a full softmax scores whole."""
    min_field_size: int | None = None
    """Categorical and sequence fields with at least this many values take such a table too; None = only the ids of items and users do.
    Tables made by counts leave the context's fields full, since a log does not count those."""

    def __post_init__(self) -> None:
        if self.init_std <= 0:
            raise ConfigError(f"init_std must be above 0, got {self.init_std}")
        if self.min_field_size is not None and self.min_field_size < 1:
            raise ConfigError(f"min_field_size must be at least 1, got {self.min_field_size}")


class Table(nn.Module, ABC):
    """Maps ids to vectors. `Config` is its settings dataclass; `cls(num_rows, dim, config)` builds it.

    A table may change the shapes of its parameters in `prepare` and `finish`; loading weights takes the shapes that were saved.
    """

    kind: ClassVar[str] = "table"
    Config: ClassVar[type[TableChoice]]
    needs_counts: ClassVar[bool] = False
    """True where the table is made by how often ids occur; until `prepare` is called it is a full table."""

    def __init__(self, num_rows: int, dim: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.dim = dim
        self.register_load_state_dict_pre_hook(_take_shapes)

    @abstractmethod
    def forward(self, ids: Tensor) -> Tensor:
        """float32 [*, d] for ids [...] int64 in 0..n-1."""

    def weight(self) -> Tensor:
        """All vectors, float32 [n, d], for scoring every row; carries gradients."""
        return self(torch.arange(self.num_rows, device=next(self.parameters()).device))

    def prepare(self, counts_N: Tensor) -> None:
        """Learn how often each id occurs in the training events, int64 [n]; once, before training. Most tables do not care.

        A table that has been prepared keeps what it made of the first counts, so that training can go on with new events.
        """

    def finish(self) -> None:
        """Drop what only training needed; vectors stay as they are. A finished table can still be trained."""

    @property
    def num_floats(self) -> int:
        """Trained numbers that are stored now, side tables included."""
        return sum(p.numel() for p in self.parameters())

    def bytes(self) -> int:
        """Bytes of all that is stored now: trained numbers, and the buffers that tell where they are."""
        return sum(t.numel() * t.element_size() for t in (*self.parameters(), *self.buffers()))

    def check_counts(self, counts_N: Tensor) -> None:
        """Raises DataError where counts do not fit the table."""
        if counts_N.shape != (self.num_rows,) or bool((counts_N < 0).any()):
            raise DataError(
                f"a table of {self.num_rows} ids needs as many counts, none below 0; got {tuple(counts_N.shape)} "
                "of them: count the ids that this table is asked for"
            )


def _take_shapes(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before weights are loaded: give parameters and buffers the shapes that were saved, whatever they are."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        saved = state.get(prefix + name)
        if saved is not None and saved.shape != tensor.shape:
            tensor.data = tensor.new_empty(saved.shape)


def rows_of(num_rows: int, dim: int, *, std: float, sparse: bool) -> nn.Embedding:
    """Rows of parameters, normal with the standard deviation `std`."""
    rows = nn.Embedding(num_rows, dim, sparse=sparse)
    nn.init.normal_(rows.weight, std=std)
    return rows


def summed_rows(rows: nn.Embedding, codes: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sum of rows, each times its weight [..., k] where given: float32 [*, d] for codes [..., k] int64.

    In one pass: `rows(codes).sum(-2)` would write all k rows of every id first, at three times the time (benchmarks/table_lookup.py).
    """
    k = codes.shape[-1]
    flat = nn.functional.embedding_bag(
        codes.reshape(-1, k),
        rows.weight,
        mode="sum",
        sparse=rows.sparse,
        per_sample_weights=None if weights is None else weights.reshape(-1, k),
    )
    return flat.view(*codes.shape[:-1], rows.weight.shape[1])


@system("full", stage="embeddings", paper="baseline")
class FullTable(Table):
    """One row of parameters per id."""

    Config = TableChoice

    def __init__(self, num_rows: int, dim: int, config: TableChoice) -> None:
        super().__init__(num_rows, dim)
        self.rows = rows_of(num_rows, dim, std=config.init_std, sparse=config.sparse)

    def forward(self, ids: Tensor) -> Tensor:
        """float32 [*, d] for ids [...]."""
        return self.rows(ids)

    def weight(self) -> Tensor:
        """float32 [n, d]: the parameters themselves."""
        return self.rows.weight


def table_class(name: str) -> type[Table]:
    """The table registered under `name`; ConfigError where it is none."""
    entry = find(name)
    if not issubclass(entry.cls, Table):
        raise ConfigError(f"{name!r} is a {entry.kind}, not an embedding table")
    return entry.cls


def make_table(num_rows: int, dim: int, choice: TableChoice | None = None) -> Table:
    """Build the chosen table for `num_rows` ids (row 0 included) of width `dim`.

    Raises ConfigError where the name and the class of the settings belong to two tables.
    """
    choice = choice or TableChoice()
    cls = table_class(choice.name)
    if type(choice) is not cls.Config:
        raise ConfigError(
            f"{type(choice).__name__} are not the settings of the table {choice.name!r}: use {cls.Config.__name__}"
        )
    build: Any = cls  # each table's constructor names its own settings class
    table: Table = build(num_rows, dim, choice)
    return table


@runtime_checkable
class Counted(Protocol):
    """A layer that owns tables and knows which ids of a log they hold."""

    def count_ids(self, view: View) -> None:
        """Tell the layer's tables how often each of their ids occurs in the view's events."""


def prepare_tables(module: nn.Module, view: View) -> None:
    """Before training: tables made by counts learn those of the training events. Tables that are prepared already stay."""
    for inner in module.modules():
        if isinstance(inner, Counted) and any(table.needs_counts for table in tables_of(inner)):
            inner.count_ids(view)


def finish_tables(module: nn.Module) -> None:
    """After training: tables drop what only training needed."""
    for table in tables_of(module):
        table.finish()


def tables_of(module: Any) -> list[Table]:
    """All tables inside a module, each once."""
    return [inner for inner in module.modules() if isinstance(inner, Table)]


class TableSize(NamedTuple):
    """What one table of a system stores."""

    place: str
    """Path of the table inside the system."""
    table: str
    """Class of the table."""
    num_rows: int
    """Ids, the unknown one included."""
    dim: int
    num_floats: int
    """Trained numbers, side tables included; a full table has num_rows * dim."""
    bytes: int
    """Trained numbers and index."""


def table_sizes(module: nn.Module) -> list[TableSize]:
    """What each table inside a module stores now."""
    return [
        TableSize(place, type(table).__name__, table.num_rows, table.dim, table.num_floats, table.bytes())
        for place, table in module.named_modules()
        if isinstance(table, Table)
    ]


def dropped_ids(ids: Tensor, rate: float) -> Tensor:
    """Ids with a share `rate` replaced by the unknown id 0, so that row 0 learns to stand for an item without its own row."""
    return ids.masked_fill(torch.rand(ids.shape, device=ids.device) < rate, 0) if rate else ids

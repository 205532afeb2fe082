"""The interface of embedding tables and the plain one. Any model takes any table by its config.

n rows, d width. Row 0 is the unknown id and is trained like the others (by id dropout).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from shortlist.errors import ConfigError
from shortlist.registry import find, system


class Table(nn.Module, ABC):
    """Maps ids to vectors. `Config` is its settings dataclass."""

    kind: ClassVar[str] = "table"
    Config: ClassVar[type]

    @abstractmethod
    def forward(self, ids: Tensor) -> Tensor:
        """float32 [*, d] for ids [...] int64 in 0..n-1."""

    @abstractmethod
    def weight(self) -> Tensor:
        """All vectors, float32 [n, d], for scoring every row; carries gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FullTableConfig:
    """Settings of the plain table."""

    init_std: float = 0.02
    """Standard deviation of the normal initial values."""
    sparse: bool = False
    """Row-wise updates: a step reads and writes only the rows of its batch. Not for tables that a full softmax scores whole."""

    def __post_init__(self) -> None:
        if self.init_std <= 0:
            raise ConfigError(f"init_std must be above 0, got {self.init_std}")


@system("full", stage="embeddings", paper="baseline")
class FullTable(Table):
    """One row of parameters per id."""

    Config = FullTableConfig

    def __init__(self, num_rows: int, dim: int, config: FullTableConfig) -> None:
        super().__init__()
        self.rows = nn.Embedding(num_rows, dim, sparse=config.sparse)
        nn.init.normal_(self.rows.weight, std=config.init_std)

    def forward(self, ids: Tensor) -> Tensor:
        """float32 [*, d] for ids [...]."""
        return self.rows(ids)

    def weight(self) -> Tensor:
        """float32 [n, d]."""
        return self.rows.weight


@dataclass(frozen=True, kw_only=True, slots=True)
class TableChoice:
    """Which table a model uses; part of the models' own settings."""

    name: str = "full"
    """Registered name of the table."""
    init_std: float = 0.02
    sparse: bool = False


def make_table(num_rows: int, dim: int, choice: TableChoice | None = None) -> Table:
    """Build the chosen table with `num_rows` rows (row 0 included) of width `dim`."""
    choice = choice or TableChoice()
    entry = find(choice.name)
    if not issubclass(entry.cls, Table):
        raise ConfigError(f"{choice.name!r} is a {entry.kind}, not an embedding table")
    settings = {"init_std": choice.init_std, "sparse": choice.sparse}
    return entry.cls(num_rows, dim, entry.config(settings))


def dropped_ids(ids: Tensor, rate: float) -> Tensor:
    """Ids with a share `rate` replaced by the unknown id 0, so that row 0 learns to stand for an item without its own row."""
    return ids.masked_fill(torch.rand(ids.shape, device=ids.device) < rate, 0) if rate else ids

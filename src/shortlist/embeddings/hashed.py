"""Hashed table: the hashing trick (Weinberger et al., ICML 2009).

    e(id) = E[h(id) mod R]

Ids that meet in a row are one and the same to the model. With a random h, n ids in R rows are expected to use

    R (1 - (1 - 1/R)^n)

of them; running numbers modulo R use min(n, R) and meet evenly.

n ids, d width, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shortlist.embeddings.base import Table, TableChoice, rows_of
from shortlist.embeddings.hashing import check_compression, mixed, rows_left
from shortlist.registry import system


@dataclass(frozen=True, kw_only=True, slots=True)
class HashedConfig(TableChoice):
    """Settings of the hashing trick."""

    name: str = "hashed"
    """Registered name of the table."""
    compression: float = 10.0
    """Ids per row."""
    scramble: bool = True
    """Hash the id first; False takes its running number modulo the rows."""
    seed: int = 0
    """Of the hash."""

    def __post_init__(self) -> None:
        TableChoice.__post_init__(self)
        check_compression(self.compression)


@system("hashed", stage="embeddings", paper="Weinberger et al., ICML 2009", tiny={"compression": 2.0})
class HashedTable(Table):
    """Each id shares a row with those of the same hash."""

    Config = HashedConfig

    def __init__(self, num_rows: int, dim: int, config: HashedConfig) -> None:
        super().__init__(num_rows, dim)
        self.config = config
        self.num_hashed = rows_left(num_rows, config.compression)
        self.rows = rows_of(self.num_hashed + 1, dim, std=config.init_std, sparse=config.sparse)

    def forward(self, ids: Tensor) -> Tensor:
        """float32 [*, d] for ids [...]."""
        return self.rows(self.codes(ids))

    def codes(self, ids: Tensor) -> Tensor:
        """Row of each id, int64 [...]: 0 for id 0, else 1..R."""
        number = mixed(ids - 1, self.config.seed) if self.config.scramble else ids - 1
        return torch.where(ids > 0, number % self.num_hashed + 1, 0)
